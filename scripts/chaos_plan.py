"""What a chaos run consists of, and what a run that goes on must find again."""

import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.files import write_json
from scripts.label_studio_server import free_port


class ChaosError(Exception):
    """The run itself cannot go on; nothing is known about what it was to show."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run consists of. The same plan and the same folder go on with the same run."""

    kills: int
    seed: int
    images: int = 800
    first_images: int = 70
    size: int = 64
    batch_size: int = 8
    steps: int = 40
    checkpoint_steps: int = 5
    worker_seconds: float = 20.0  # a worker that is ready lives at most so long, from 0 on, uniformly drawn
    web_seconds: float = 24.0
    early: float = 0.2  # share of kills whose time runs from the start of the process, ready or not
    aimed: float = 0.5  # share of the worker's kills that wait for a stage of a cycle, one after the other of a list
    annotator_seconds: float = 3.0  # longest pause between two things that annotators do
    kills_a_restart: int = 25  # Label Studio is stopped once for so many kills
    trained_again: int = 1000  # cycles that are trained once more at the end, the newest first

    @classmethod
    def quick(cls, *, kills: int, seed: int) -> "Plan":
        """A run of about a minute, as in the tests."""
        return cls(
            kills=kills, seed=seed, images=90, first_images=40, batch_size=6, steps=24, checkpoint_steps=4,
            worker_seconds=8, web_seconds=10, aimed=0.8, annotator_seconds=0.8, kills_a_restart=10, trained_again=1,
        )  # fmt: skip

    def settings(self, folder: Path, *, label_studio_url: str, token: str, port: int) -> dict[str, str]:
        """The environment of our processes: small and quick, with several checkpoints in each training."""
        return {
            "LABEL_STUDIO_URL": label_studio_url,
            "LABEL_STUDIO_API_KEY": token,
            "MODEL_DIR": str(folder / "backend"),
            "PORT": str(port),
            "LOG_LEVEL": "DEBUG",  # each training step is a line
            "TSP_BATCH_SIZE": str(self.batch_size),
            "TSP_IMAGE_SIZE": str(self.size),
            "TSP_EPOCHS": "1",
            "TSP_MIN_STEPS": str(self.steps),
            "TSP_CHECKPOINT_STEPS": str(self.checkpoint_steps),
            "TSP_CLASS_THRESHOLD": "0.3",  # a network that has learnt so little would trust nothing
            "TSP_BOX_THRESHOLD": "0.3",
            "TSP_MASK_THRESHOLD": "0.3",
            "TSP_DETECTIONS": "20",
            "TSP_RECONCILE_SECONDS": "5",
            "TSP_THREADS": "1",
            "TSP_NICENESS": "0",
        }


@dataclass
class State:
    """What a run that goes on must find again."""

    path: Path
    label_studio_port: int
    web_port: int
    webhook_port: int
    api_port: int
    project_id: int | None = None

    @classmethod
    def read(cls, path: Path, plan: Plan) -> "State":
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if known and known["plan"] != asdict(plan):
            raise ChaosError(f"{path.parent} holds a run of another plan: expected {known['plan']}, got {asdict(plan)}")
        ports: list[int] = known.get("ports") or [free_port() for _ in range(4)]
        state = cls(path, *ports)
        state.project_id = known.get("project_id")
        state.write(plan)
        return state

    def write(self, plan: Plan) -> None:
        ports = [self.label_studio_port, self.web_port, self.webhook_port, self.api_port]
        write_json(self.path, {"plan": asdict(plan), "ports": ports, "project_id": self.project_id})


class Events:
    """A file of lines: kills, starts, switches, violations. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.all: list[dict[str, Any]] = []
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self.all = [json.loads(line) for line in lines]
            path.write_text("".join(lines))

    def tell(self, kind: str, **about: Any) -> None:
        event = {"kind": kind, "at": time.time(), **about}
        with self._lock:
            self.all.append(event)
            with self._path.open("a") as file:
                file.write(json.dumps(event) + "\n")

    def of(self, kind: str) -> list[dict[str, Any]]:
        with self._lock:
            return [event for event in self.all if event["kind"] == kind]

    def since_the_last(self, kind: str) -> list[dict[str, Any]]:
        """The events from the last one of this kind on."""
        with self._lock:
            starts = [number for number, event in enumerate(self.all) if event["kind"] == kind]
            return self.all[starts[-1] if starts else 0 :]
