"""How long workers that share a PostgreSQL take to score one pool: one, two and three of them, in turn in one run.

A real Label Studio, a version of an untrained network, images in the cache, one thread for each worker. The time runs
from the moment when the pool is cut into chunks until all lines are in the scores file; each worker loads the network
within it.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ml_backend.errors import SettingsError
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.pool import read_scores
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
IMAGES, CHUNK = 120, 10
_LONGEST_SECONDS = 600.0


def score_workers(
    options: Namespace, *, server: LabelStudioServer | None = None, images: int = IMAGES, most: int = MOST_WORKERS
) -> dict[str, Any]:
    """`ours` is the median of the seconds with two workers, `theirs` with one; `seconds` and `ratios`, to one worker in
    the same round, tell of each number. A first round, which fills the cache and counts for nothing, has all workers.

    At `most` so many workers. `server`: a Label Studio that runs; without one, a new one is started. SettingsError
    without a PostgreSQL.
    """
    if not options.database_url.startswith("postgres"):
        raise SettingsError("--database-url: expected the address of an empty PostgreSQL database, postgresql://...")
    with _pool(options, server, images) as (service, project, settings, folder):
        run = partial(_seconds, service, project, settings, folder, images)
        run(most, 0)
        numbers = range(1, most + 1)
        rounds = []
        for number in range(options.rounds):
            order = numbers if number % 2 else reversed(numbers)
            rounds.append({workers: run(workers, number * most + workers) for workers in order})
    return {
        "ours": _median([seconds[2] for seconds in rounds]),
        "theirs": _median([seconds[1] for seconds in rounds]),
        "ratio": _median([seconds[2] / seconds[1] for seconds in rounds]),
        "seconds": {str(workers): [round(seconds[workers], 2) for seconds in rounds] for workers in numbers},
        "ratios": {str(w): _median([seconds[w] / seconds[1] for seconds in rounds]) for w in numbers},
        "images": images,
        "chunk": CHUNK,
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
            TSP_SCORING_CHUNK=str(CHUNK),
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
    service: Service, project: Project, settings: dict[str, str], folder: Path, images: int, workers: int, number: int
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
            process = BackendProcesses(settings=settings, log_dir=log, end_with_us=True)
            running.callback(process.stop)
            process.start_one("worker")
        _wait(lambda: all("the worker is ready" in (log / "worker.log").read_text() for log in logs), logs)
        service.registry.activate(name.key, version)
        remember_project(service.database, name)
        _wait(lambda: any(chunks.glob("[!.]*")), logs)
        began = time.perf_counter()
        _wait(lambda: not chunks.exists(), logs)
        seconds = time.perf_counter() - began
    lines = sum(1 for _ in read_scores(scores))
    if lines != images:
        raise RuntimeError(f"{scores}: expected {images} lines, got {lines}")
    return seconds


def _copied(service: Service, version: str) -> tuple[ModelCard, MaskRCNNWithScores]:
    network, card = service.registry.load(bench_version.KEY, VERSION)
    return replace(card, version=version), network


def _wait(until: Callable[[], bool], logs: Sequence[Path]) -> None:
    deadline = time.monotonic() + _LONGEST_SECONDS
    while not until():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the workers did not get so far:\n{(logs[0] / 'worker.log').read_text()[-2000:]}")
        time.sleep(0.02)


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 3)
