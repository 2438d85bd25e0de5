"""How long workers that share a PostgreSQL take to score one pool: one, two and three of them, and one that looks at
the pool without chunks, in turn in one run.

A real Label Studio, a version of an untrained network, images in the cache, one thread for each worker. The time runs
from the moment when the pool is cut into chunks, or its scores file opened, until all lines are in the scores file;
each worker loads the network within it.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ml_backend.errors import SettingsError
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.dataset import read_coco
from model.network import MaskRCNNWithScores
from model.registry import ModelCard
from scripts import bench_version
from scripts.backend_processes import BackendProcesses
from scripts.bench_label_studio import own_server
from scripts.bench_version import LABEL_CONFIG, VERSION, environment
from scripts.label_studio_server import LabelStudioServer, free_port
from scripts.make_phantoms import make_phantoms

MOST_WORKERS = 3
CHUNK = int(Settings.model_fields["scoring_chunk"].default)
IMAGES = 6 * CHUNK
ALONE = "1 without chunks"
_LONGEST_SECONDS = 3600.0


def score_workers(
    options: Namespace,
    *,
    server: LabelStudioServer | None = None,
    images: int = IMAGES,
    chunk: int = CHUNK,
    most: int = MOST_WORKERS,
) -> dict[str, Any]:
    """`ours` is the median of the seconds with two workers, `theirs` with one that takes chunks, too; `seconds` and
    `ratios`, to that one in the same round, tell of each number and of one worker without chunks, with which
    `ratio_without_chunks` compares two. A first round, which fills the cache and counts for nothing, has all workers.

    At `most` so many workers. `server`: a Label Studio that runs; without one, a new one is started. SettingsError
    without a PostgreSQL.
    """
    if not options.database_url.startswith("postgres"):
        raise SettingsError("--database-url: expected the address of an empty PostgreSQL database, postgresql://...")
    rows = {ALONE: (1, images), **{str(workers): (workers, chunk) for workers in range(1, most + 1)}}
    numbers = count()
    with _pool(options, server, images) as pool:
        _seconds(*pool, images, *rows[str(most)], next(numbers))
        rounds = []
        for number in range(options.rounds):
            order = list(rows) if number % 2 else list(reversed(rows))
            rounds.append({row: _seconds(*pool, images, *rows[row], next(numbers)) for row in order})
    return {
        "ours": _median([seconds["2"] for seconds in rounds]),
        "theirs": _median([seconds["1"] for seconds in rounds]),
        "ratio": _median([seconds["2"] / seconds["1"] for seconds in rounds]),
        "ratio_without_chunks": _median([seconds["2"] / seconds[ALONE] for seconds in rounds]),
        "seconds": {row: [round(seconds[row], 2) for seconds in rounds] for row in rows},
        "ratios": {row: _median([seconds[row] / seconds["1"] for seconds in rounds]) for row in rows},
        "images": images,
        "chunk": chunk,
        "profile": options.profile,
        "size": options.size,
        "rounds": options.rounds,
    }


@contextmanager
def _pool(
    options: Namespace, server: LabelStudioServer | None, images: int
) -> Iterator[tuple[Service, Project, dict[str, str], Path]]:
    """A project with images, and a version that has seen none of them but is not the active one."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        server = server or running.enter_context(own_server(folder))
        settings = environment(
            folder,
            port=free_port(),
            LABEL_STUDIO_URL=server.url,
            LABEL_STUDIO_API_KEY=server.token,
            DATABASE_URL=options.database_url,
            TSP_THREADS="1",
            TSP_NICENESS="0",
            TSP_RECONCILE_SECONDS="1",
        )
        make_phantoms(folder / "phantoms", images=images, size=options.size, seed=0)
        client = running.enter_context(LabelStudioClient(server.url, server.token))
        project = client.create_project(title="bench", label_config=LABEL_CONFIG)
        truth = read_coco(folder / "phantoms" / "annotations.json")
        client.import_files(project.id, [image.path for image in truth.images])
        sides = {"min_size": options.size, "max_size": options.size}
        bench_version.add_version(settings, options.profile, **sides)
        variables: dict[str, Any] = dict(settings)
        service = Service.connect(Settings(**variables))
        running.callback(service.close)
        yield service, project, settings, folder


def _seconds(
    service: Service,
    project: Project,
    settings: dict[str, str],
    folder: Path,
    images: int,
    workers: int,
    chunk: int,
    number: int,
) -> float:
    """So many workers are ready when the version, under a new name, becomes the active one."""
    name = ProjectName.from_uid(project.uid)
    if name is None:
        raise ValueError(f"project.uid: expected <id>.<unix time>, got {project.uid!r}")
    version = f"tsp-1-{number:08x}"
    service.registry.add(name.key, *_copied(service, version))
    scores, chunks = service.scores_file(name.key, version), service.chunks_folder(name.key, version)
    logs = [folder / f"worker-{number}-{worker}" for worker in range(workers)]
    with ExitStack() as running:
        for log in logs:
            log.mkdir()
            process = BackendProcesses(
                settings=settings | {"TSP_SCORING_CHUNK": str(chunk)}, log_dir=log, end_with_us=True
            )
            running.callback(process.stop)
            process.start_one("worker")
        _wait(lambda: all("the worker is ready" in (log / "worker.log").read_text() for log in logs), logs)
        service.registry.activate(name.key, version)
        remember_project(service.database, name)
        _wait(lambda: scores.exists() or any(chunks.glob("[!.]*")), logs)
        began = time.perf_counter()
        _wait(lambda: not chunks.exists() and _lines(scores) >= images, logs, every_seconds=0.25)
        seconds = time.perf_counter() - began
    if (lines := _lines(scores)) != images:
        raise RuntimeError(f"{scores}: expected {images} lines, got {lines}")
    return seconds


def _lines(scores: Path) -> int:
    return scores.read_bytes().count(b"\n") if scores.exists() else 0


def _copied(service: Service, version: str) -> tuple[ModelCard, MaskRCNNWithScores]:
    network, card = service.registry.load(bench_version.KEY, VERSION)
    return replace(card, version=version), network


def _wait(until: Callable[[], bool], logs: Sequence[Path], *, every_seconds: float = 0.02) -> None:
    deadline = time.monotonic() + _LONGEST_SECONDS
    while not until():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the workers did not get so far:\n{(logs[0] / 'worker.log').read_text()[-2000:]}")
        time.sleep(every_seconds)


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)
