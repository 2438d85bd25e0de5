"""How soon after its start the web process answers: ours, and the same process if it loaded torch at its start."""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from scripts.bench_version import LABEL_CONFIG, UID, add_version, data_uri, environment
from scripts.label_studio_server import HOST, free_port
from scripts.make_phantoms import phantom

GOAL_SECONDS = 2.0
_MAIN = "from ml_backend.app import main; main()"
_OURS = ("-c", _MAIN)
_THEIRS = ("-c", f"import ml_backend.backend, ml_backend.loaded_version, label_studio_sdk.client; {_MAIN}")
_LONGEST_SECONDS = 120.0


@dataclass(frozen=True)
class Start:
    """What one start took until /health answered, in seconds and MB, and the first answers `after` it, in seconds."""

    health: float
    cpu: float
    memory_mb: float
    after: dict[str, float]


def start(options: Namespace) -> dict[str, Any]:
    """`options.rounds` starts of each in turn, after one that warms the disk cache up. `ours` and `theirs` are medians
    of the seconds from the start of the process until /health answered."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        settings = environment(Path(folder), port=free_port())
        add_version(settings, options.profile)
        pairs: list[tuple[Start, Start]] = []
        for number in range(options.rounds + 1):
            both = (_OURS, _THEIRS) if number % 2 else (_THEIRS, _OURS)
            started = {command: _start(command, settings, ask=command is _OURS) for command in both}
            pairs.append((started[_OURS], started[_THEIRS]))
    ours, theirs = zip(*pairs[1:], strict=True)
    return {
        "ours": _median([one.health for one in ours]),
        "theirs": _median([one.health for one in theirs]),
        "ratio": _median([a.health / b.health for a, b in pairs[1:]]),
        "goal_seconds": GOAL_SECONDS,
        "slowest": round(max(one.health for one in ours), 3),
        "cpu_seconds": [_median([one.cpu for one in ours]), _median([one.cpu for one in theirs])],
        "memory_mb": [_median([one.memory_mb for one in side]) for side in (ours, theirs)],
        **{name: _median([one.after[name] for one in ours]) for name in ours[0].after},
        "profile": options.profile,
        "rounds": options.rounds,
    }


def _start(command: Sequence[str], settings: dict[str, str], *, ask: bool) -> Start:
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        env={"PATH": os.environ["PATH"], **settings},
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://{HOST}:{settings['PORT']}"
        _wait_for(url, process)
        health = time.perf_counter() - began
        cpu, memory = _used(process.pid)
        return Start(health, cpu, memory, _first_answers(url) if ask else {})
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LONGEST_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5.0).is_success:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(
                f"the web process ended ({process.poll()}) or gave no answer: start it by hand to see why"
            )
        time.sleep(0.01)


def _first_answers(url: str) -> dict[str, float]:
    """Seconds of the first /setup, the first webhook, and the first two predictions: torch and weights come with the
    first of these."""
    setup = {"project": UID, "schema": LABEL_CONFIG}
    webhook = {"action": "ANNOTATION_CREATED", "project": {"id": 7, "created_at": "2023-11-14T22:13:20.654321Z"}}
    task = {"id": 1, "data": {"image": data_uri(phantom(0, 256).image)}}
    predict = {"tasks": [task], "project": UID, "label_config": LABEL_CONFIG}
    requests = {
        "first_setup": ("/setup", setup),
        "first_webhook": ("/webhook", webhook),
        "first_predict": ("/predict", predict),
        "second_predict": ("/predict", predict),
    }
    seconds = {}
    for name, (path, body) in requests.items():
        began = time.perf_counter()
        httpx.post(url + path, json=body, timeout=_LONGEST_SECONDS).raise_for_status()
        seconds[name] = time.perf_counter() - began
    return seconds


def _used(pid: int) -> tuple[float, float]:
    """CPU seconds, and peak memory in MB, of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return cpu, int(peak.split()[1]) / 1024


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)
