"""How long the parts of a benchmark's cycle take, by wall clock and CPU; a training's time survives interruptions."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.files import write_json
from model.train import Progress

Seconds = dict[str, float]  # "wall" and "cpu"


@dataclass
class Stopwatch:
    """The seconds of a training's steps, kept beside its checkpoint, so that they outlive an interruption."""

    path: Path
    every_steps: int

    def __post_init__(self) -> None:
        self._known = json.loads(self.path.read_text()) if self.path.exists() else {"measured": 0, "wall": 0, "cpu": 0}
        self._last = time.perf_counter(), time.process_time()

    def on_step(self, progress: Progress) -> None:
        """Count a step; write when the training has written its checkpoint."""
        now = time.perf_counter(), time.process_time()
        self._known["wall"] += now[0] - self._last[0]
        self._known["cpu"] += now[1] - self._last[1]
        self._known["measured"] += 1
        self._known["steps"] = progress.steps
        self._last = now
        if progress.step % self.every_steps == 0 or progress.step == progress.steps:
            write_json(self.path, self._known)

    def seconds(self) -> Seconds | None:
        """Of the whole training; steps whose time was lost when the process was killed count like the others."""
        if not self._known["measured"]:
            return None
        scale = self._known["steps"] / self._known["measured"]
        return {clock: round(self._known[clock] * scale, 3) for clock in ("wall", "cpu")}


@contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[None]:
    """Put the seconds of what is inside into `seconds` under a name."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    seconds[name] = {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}
