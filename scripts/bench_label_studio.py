"""A real Label Studio for the benchmarks, and projects of any size in it."""

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

from ml_backend.inbox import ProjectName, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.pool import append_line, open_lines
from ml_backend.service import Service
from ml_backend.settings import Settings
from scripts.label_studio_server import LabelStudioServer
from scripts.make_phantoms import CLASS_NAMES
from scripts.tiny_version import tiny_version

LABEL_CONFIG = (
    '<View><Image name="image" value="$image"/><PolygonLabels name="label" toName="image">'
    + "".join(f'<Label value="{name}"/>' for name in CLASS_NAMES)
    + "</PolygonLabels></View>"
)
SIZE, VERTICES = 512, 24


@dataclass(frozen=True)
class Connected:
    """Our service with a Label Studio."""

    service: Service
    server: LabelStudioServer

    @property
    def client(self) -> LabelStudioClient:
        return self.service.label_studio

    def new_project(self, title: str, tasks: list[dict[str, Any]]) -> tuple[int, str, list[int]]:
        """A project of these tasks that the service knows: its id and key, and the ids of its tasks."""
        project = self.client.create_project(title=title, label_config=LABEL_CONFIG)
        name = ProjectName.from_uid(project.uid)
        if name is None:
            raise ValueError(f"expected a project's name such as 7.1700000000, got {project.uid!r}")
        remember_project(self.service.database, name)
        return project.id, name.key, self.client.import_tasks(project.id, tasks)

    def add_version(self, key: str, version: str, task_ids: list[int], regions: int) -> None:
        """A version of a project that has seen these tasks, and so many polygons in each."""
        self.service.registry.add(key, *tiny_version(version, CLASS_NAMES))
        path = self.service.scores_file(key, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_lines(path) as lines:
            for task in task_ids:
                score = float(np.random.default_rng(task).uniform())
                line = {"task": task, "image": f"{task:064x}", "score": score, "result": polygons(regions, task)}
                append_line(lines, line)


def own_server(folder: Path, environment: Mapping[str, str] | None = None) -> LabelStudioServer:
    """A Label Studio for a benchmark alone, which keeps everything in `folder` and ends with the benchmark, with these
    variables besides its own."""
    return LabelStudioServer(
        data_dir=folder / "label-studio",
        username="bench@example.com",
        password="as-quick-as-can",
        report=lambda _: None,
        end_with_us=True,
        environment=environment,
    )


@contextmanager
def connected(
    server: LabelStudioServer | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Connected]:
    """Our service with a Label Studio that runs; without one, a new one is started, which takes a minute more, with
    these variables besides its own."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        server = server or running.enter_context(own_server(folder, environment))
        ours = {
            "LABEL_STUDIO_URL": server.url,
            "LABEL_STUDIO_API_KEY": server.token,
            "MODEL_DIR": str(folder / "backend"),
        }
        service = Service.connect(Settings.model_validate(ours))
        running.callback(service.close)
        yield Connected(service, server)


def image_tasks(count: int) -> list[dict[str, Any]]:
    """Tasks whose images nobody fetches here."""
    return [{"data": {"image": f"https://images.example/{number:06d}.png"}} for number in range(count)]


def polygons(count: int, seed: int, *, origin: str = "prediction") -> list[dict[str, Any]]:
    """Regions as our predictions have them: `count` polygons of 24 vertices, about 650 bytes each."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, VERTICES, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    regions = []
    for number in range(count):
        points = rng.uniform(20, 80, 2) + circle * rng.uniform(2, 20) * rng.uniform(0.8, 1.0, (VERTICES, 1))
        regions.append(
            {
                "id": f"{seed:08x}{number:08x}", "from_name": "label", "to_name": "image", "type": "polygonlabels",
                "original_width": SIZE, "original_height": SIZE, "image_rotation": 0, "origin": origin,
                "score": round(float(rng.uniform()), 4),
                "meta": {"text": ["class .93 box .88 mask .79, certainty .87"]},
                "value": {"points": points.round(3).tolist(), "closed": True,
                          "polygonlabels": [CLASS_NAMES[int(rng.integers(len(CLASS_NAMES)))]]},
            }
        )  # fmt: skip
    return regions


def make_older(server: LabelStudioServer) -> None:
    """Label Studio's tasks of today spread over the month before yesterday."""
    with closing(sqlite3.connect(server.data_dir / "label_studio.sqlite3", timeout=60.0)) as database, database:
        minutes = "(2880 + abs(random()) % 43200)"
        moment = f"strftime('%Y-%m-%d %H:%M:%f', updated_at, '-' || {minutes} || ' minutes')"
        database.execute(f"UPDATE task SET updated_at = {moment}")  # noqa: S608


class Requests:
    """Seconds, CPU seconds, and what our client asked of Label Studio and got."""

    def __init__(self, label_studio: Connected) -> None:
        self._label_studio = label_studio
        self.costs: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._requests = self._bytes = 0
        self._hooks().append(self._count)
        self._began = time.perf_counter(), time.process_time(), cpu_seconds(self._label_studio.server.process_id)
        return self

    def _count(self, response: httpx.Response) -> None:
        self._requests += 1
        self._bytes += len(response.read())

    def __exit__(self, *_: object) -> None:
        wall, ours, theirs = self._began
        self.costs = {
            "seconds": round(time.perf_counter() - wall, 2),
            "our_cpu_seconds": round(time.process_time() - ours, 2),
            "label_studio_cpu_seconds": round(cpu_seconds(self._label_studio.server.process_id) - theirs, 2),
            "requests": self._requests,
            "megabytes": round(self._bytes / 1e6, 4),
        }
        self._hooks().remove(self._count)

    def _hooks(self) -> list[Any]:
        return self._label_studio.client._http.event_hooks["response"]


def cpu_seconds(process: int) -> float:
    """What a process has used so far, with its threads (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset_peak_memory(process: int) -> None:
    """Let `peak_memory_mb` begin anew, with what the process holds at this moment (Linux)."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_memory_mb(process: int) -> int:
    """The largest resident memory of a process since it was started, or since `reset_peak_memory` (Linux)."""
    peak = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) // 1024
