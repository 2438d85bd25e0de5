"""How quickly the web process answers Label Studio while the worker trains on the same cores.

Label Studio waits one second for an answer to a webhook and to /health, three to /setup, and never asks again; requests
come at their times whether earlier ones are answered or not, each on a connection of its own as Label Studio's do, and
what counts is the time from the moment a request was due.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sqlalchemy import func, select

from ml_backend.db import Database, EventRow
from ml_backend.inbox import ProjectName
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.settings import Settings
from model.dataset import read_coco
from scripts.backend_processes import BackendProcesses
from scripts.bench_label_studio import own_server
from scripts.label_studio_server import HOST, LabelStudioServer, free_port
from scripts.make_phantoms import make_phantoms
from scripts.oracle import Oracle

IMAGES, SIZE = 16, 256
_TRAINING_SECONDS = 600.0
_LONGEST_SECONDS = 60.0  # for one answer, which is far more than Label Studio waits

Request = tuple[str, str, bytes]  # method, path, body


@dataclass(frozen=True, kw_only=True)
class Load:
    """So many requests, so many a second."""

    requests: int
    rate: float


@dataclass(frozen=True)
class Training:
    """A project whose cycle trains at this moment."""

    project: Project
    database: Database
    port: int
    is_training: Callable[[], bool]


def webhook(load: Load, training: Training) -> dict[str, Any]:
    """Webhooks of annotations, 11 kB each; lost ones are those that the database does not have afterwards."""
    before = _events(training)
    body = json.dumps(_annotation_created(training.project)).encode()
    answers = _ask(training, [("POST", "/webhook", body)] * load.requests, load)
    stored = _events(training) - before
    return {**_measured(answers, waits_seconds=1.0), "lost": load.requests - stored, "body_bytes": len(body)}


def health(load: Load, training: Training) -> dict[str, Any]:
    """/health and /setup in turn, as Label Studio asks them again and again."""
    setup = json.dumps({"project": training.project.uid, "schema": training.project.label_config}).encode()
    both: list[Request] = [("GET", "/health", b""), ("POST", "/setup", setup)]
    answers = _ask(training, [both[number % 2] for number in range(load.requests)], load)
    return {
        **_measured(answers[::2], waits_seconds=1.0),
        "setup": _measured(answers[1::2], waits_seconds=3.0),
        "lost": sum(status != 200 for status, _ in answers),
    }


SOAKS: dict[str, tuple[str, Callable[[Load, Training], dict[str, Any]]]] = {
    "webhook": ("webhooks while a cycle trains", webhook),
    "health": ("/health and /setup while a cycle trains", health),
}


def soak(name: str, load: Load, *, database_url: str = "", server: LabelStudioServer | None = None) -> dict[str, Any]:
    """Run one; `ours` is the 99th percentile, `theirs` how long Label Studio waits, in seconds. `server`: a Label
    Studio that runs; without one, a new one is started, which takes a minute more."""
    _, work = SOAKS[name]
    with _training(database_url, server) as training:
        measured = work(load, training)
    return {
        **measured,
        "requests": load.requests,
        "rate": load.rate,
        "database": "postgresql" if database_url else "sqlite",
    }


@contextmanager
def _training(database_url: str, server: LabelStudioServer | None) -> Iterator[Training]:
    """A real Label Studio, our two processes, and a first cycle that trains until the block ends."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        server = server or running.enter_context(own_server(folder))
        make_phantoms(folder / "phantoms", images=IMAGES, size=SIZE, seed=0)
        truth = read_coco(folder / "phantoms" / "annotations.json")
        environment = {
            "LABEL_STUDIO_URL": server.url,
            "LABEL_STUDIO_API_KEY": server.token,
            "MODEL_DIR": str(folder / "backend"),
            "DATABASE_URL": database_url,
            "PORT": str(free_port()),
            "TSP_BATCH_SIZE": str(IMAGES),
            "TSP_IMAGE_SIZE": str(SIZE),
            "TSP_MIN_STEPS": "100000",
        }
        client = running.enter_context(LabelStudioClient(server.url, server.token))
        labels = "".join(f'<Label value="{name}"/>' for name in truth.class_names)
        project = client.create_project(
            title="bench",
            label_config='<View><Image name="image" value="$image"/>'
            f'<PolygonLabels name="label" toName="image">{labels}</PolygonLabels></View>',
        )
        client.import_files(project.id, [image.path for image in truth.images])
        backend = running.enter_context(BackendProcesses(settings=environment, log_dir=folder / "logs"))
        client.connect_backend(project.id, url=backend.url, title="TSP")
        oracle = Oracle(client, project.id, truth)
        while oracle.annotate_next() is not None:
            pass

        def is_training() -> bool:
            backend.check()
            projects = httpx.get(f"{backend.url}/status", timeout=60).json()["projects"]
            return any(c["stage"].startswith("training on") and c["done"] > 0 for p in projects for c in p["cycles"])

        deadline = time.monotonic() + _TRAINING_SECONDS
        while not is_training():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no cycle trained within {_TRAINING_SECONDS:.0f} s")
            time.sleep(0.5)
        settings = Settings.model_validate(environment)
        database = Database(settings.database)
        running.callback(database.close)
        yield Training(project, database, settings.port, is_training)


def _ask(training: Training, requests: Sequence[Request], load: Load) -> list[tuple[int, float]]:
    """Status (0: no answer) and seconds of each."""
    answers = asyncio.run(_ask_at_their_times(training.port, requests, load.rate))
    if not training.is_training():
        raise RuntimeError("the training was over before the last request: nothing was measured")
    return answers


async def _ask_at_their_times(port: int, requests: Sequence[Request], rate: float) -> list[tuple[int, float]]:
    started = asyncio.get_running_loop().time() + 0.5

    async def one(number: int, request: Request) -> tuple[int, float]:
        due = started + number / rate
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        status = await _status(port, request)
        return status, asyncio.get_running_loop().time() - due

    return list(await asyncio.gather(*(one(number, request) for number, request in enumerate(requests))))


async def _status(port: int, request: Request) -> int:
    method, path, body = request
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nUser-Agent: heartex/bench\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        answer = await asyncio.wait_for(_answer(port, head.encode() + body), _LONGEST_SECONDS)
    except (OSError, TimeoutError):
        return 0
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


async def _answer(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(request)
        return await reader.read()
    finally:
        writer.close()


def _measured(answers: Sequence[tuple[int, float]], *, waits_seconds: float) -> dict[str, Any]:
    milliseconds = np.array([seconds for _, seconds in answers]) * 1000
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return {
        "ours": round(float(p99) / 1000, 4),
        "theirs": waits_seconds,
        "ratio": round(float(p99) / 1000 / waits_seconds, 4),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "max_ms": round(float(milliseconds.max()), 1),
        "refused": sum(status != 200 for status, _ in answers),
        "too_late": int((milliseconds > waits_seconds * 1000).sum()),
    }


def _events(training: Training) -> int:
    name = ProjectName.from_uid(training.project.uid)
    with training.database.session() as session:
        of_project = EventRow.project_key == (name.key if name else "")
        query = select(func.count()).select_from(EventRow).where(of_project, EventRow.action == "ANNOTATION_UPDATED")
        return session.scalar(query) or 0


def _annotation_created(project: Project) -> dict[str, Any]:
    """What Label Studio sends, with 15 polygons of 24 vertices."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([50 + 40 * np.cos(angles), 50 + 40 * np.sin(angles)], axis=1).round(6).tolist()
    region = {
        "from_name": "label", "to_name": "image", "type": "polygonlabels", "original_width": SIZE,
        "original_height": SIZE, "image_rotation": 0, "origin": "manual",
        "value": {"points": points, "closed": True, "polygonlabels": ["oedema"]},
    }  # fmt: skip
    return {
        "action": "ANNOTATION_UPDATED",
        "annotation": {"id": 1, "result": [{**region, "id": f"r{number}"} for number in range(15)], "task": 1},
        "task": {"id": 1, "data": {"image": "/data/upload/1/image.png"}, "is_labeled": True, "total_annotations": 1},
        "project": {"id": project.id, "created_at": project.created_at.isoformat(), "title": project.title,
                    "label_config": project.label_config},
    }  # fmt: skip
