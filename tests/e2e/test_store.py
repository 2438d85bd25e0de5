"""A web process and workers with nothing in common but PostgreSQL and a bucket: a worker is killed, the bucket is away,
and the host of the images is gone for good."""

import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from scripts.backend_processes import BackendProcesses
from scripts.fault_proxy import Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, polygon_result
from tests.ml_backend.examples import import_images, phantom_images
from tests.ml_backend.test_frozen import image_server
from tests.ml_backend.test_worker import environment, wait
from tests.postgres import Postgres, postgres
from tests.s3 import SECRET, running_s3

__all__ = ["postgres"]

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]

ANNOTATED, POOL, STEPS, CHUNK = 4, 3, 24, 4
_SEEN = re.compile(r"chunk (\d+) of \S+ is seen")
_STEP = re.compile(r"cycle 1: step (\d+) of")


class Machines:
    """A web process and two workers, each with a MODEL_DIR of its own; those that run end with the block."""

    def __init__(self, folder: Path, settings: dict[str, str], bucket: Callable[[], set[str]]) -> None:
        self.folder, self.url, self.bucket = folder, f"http://127.0.0.1:{settings['PORT']}", bucket
        self.processes = {
            name: BackendProcesses(
                settings={**settings, "MODEL_DIR": str(folder / name / "models")}, log_dir=folder / name
            )
            for name in ("web", "first", "second")
        }

    def start(self, name: str) -> None:
        (self.folder / name).mkdir()
        self.processes[name].start_one("web" if name == "web" else "worker")

    def log(self, name: str) -> str:
        return (self.folder / name / ("web.log" if name == "web" else "worker.log")).read_text()

    def projects(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.url}/status", timeout=60).json()["projects"])

    def project(self) -> dict[str, Any]:
        (project,) = self.projects()
        return project

    def cycle(self) -> dict[str, Any]:
        cycles = self.project()["cycles"]
        return dict(cycles[0]) if cycles else {"stage": "", "facts": {}, "done": 0, "finished_at": None}

    def waits_for(self) -> str:
        return str(self.cycle()["facts"].get("waiting", {}).get("for", ""))


@pytest.fixture
def away() -> threading.Event:
    """Set while the bucket answers nobody."""
    return threading.Event()


@pytest.fixture
def machines(
    label_studio: LabelStudioServer, postgres: Postgres, tmp_path: Path, away: threading.Event
) -> Iterator[Machines]:
    with (
        running_s3(tmp_path) as s3,
        FaultProxy(
            s3.environment["AWS_ENDPOINT_URL"], lambda _: Fault(kind="refuse") if away.is_set() else None
        ) as proxy,
    ):
        bucket = s3.new_bucket()
        settings = environment(
            tmp_path,
            **{**s3.environment, "AWS_ENDPOINT_URL": proxy.url},
            TSP_STORE_URL=f"s3://{bucket}/tsp",
            DATABASE_URL=postgres.new_database(),
            LABEL_STUDIO_URL=label_studio.url,
            LABEL_STUDIO_API_KEY=label_studio.token,
            LOG_LEVEL="DEBUG",  # tells of each step
            TSP_ALLOWED_IMAGE_HOSTS="127.0.0.0/8",
            TSP_BATCH_SIZE=str(ANNOTATED),
            TSP_VALIDATION_FRACTION="0",
            TSP_EPOCHS="1",
            TSP_MIN_STEPS=str(STEPS),
            TSP_CHECKPOINT_STEPS="4",
            TSP_SCORING_CHUNK=str(CHUNK),
        )
        machines = Machines(tmp_path, settings, partial(s3.keys, bucket))
        try:
            machines.start("web")
            machines.processes["web"].wait_until_it_answers()
            yield machines
        finally:
            for processes in machines.processes.values():
                processes.stop()
    kept = _everything_in(settings["DATABASE_URL"])
    assert "positionalArgs" in kept  # of workflows: the tables of their engine are among them
    assert SECRET not in kept + "".join(path.read_text() for path in tmp_path.glob("*/*.log"))


def test_a_cycle_begun_on_one_machine_is_finished_on_another_and_served_by_a_third(
    machines: Machines, client: LabelStudioClient, project: Project, away: threading.Event, tmp_path: Path
) -> None:
    with image_server(tmp_path) as host:
        annotated = _annotated(client, project, tmp_path, host)
        pool = set(import_images(client, project, phantom_images(ANNOTATED + POOL)[ANNOTATED:]))
        setup = {"project": project.uid, "schema": POLYGON_CONFIG}
        httpx.post(f"{machines.url}/setup", json=setup, timeout=60).raise_for_status()
        machines.start("first")
        wait(lambda: machines.cycle()["stage"].startswith("training") and machines.cycle()["done"] > 4, machines.cycle)
        machines.processes["first"].kill("worker")
    away.set()
    machines.start("second")
    wait(lambda: "the store does not answer" in machines.waits_for(), machines.cycle)
    assert "TSP_STORE_URL" in machines.waits_for()
    away.clear()
    wait(lambda: machines.cycle()["finished_at"], machines.cycle)

    cycle, version = machines.cycle(), machines.cycle()["version"]
    assert (cycle["status"], cycle["error"]) == ("done", "")
    assert cycle["facts"]["restarts"] == 1
    assert "training_problems" not in cycle["facts"]  # their host is gone: they came from the store
    assert [int(step) for step in _STEP.findall(machines.log("second"))] == list(range(1, STEPS + 1))
    assert client.predicted_task_ids(project.id, version) == pool
    _check_that_it_is_served(machines, client, project, annotated[0], version)
    wait(lambda: not [key for key in machines.bucket() if "/checkpoint" in key], machines.bucket)
    assert [key for key in machines.bucket() if key.endswith("/1/recipe.json")]


def test_workers_without_a_common_disk_look_at_one_pool(
    machines: Machines, client: LabelStudioClient, project: Project
) -> None:
    tasks = import_images(client, project, phantom_images(ANNOTATED + 60))
    for name in ("first", "second"):
        machines.start(name)
    wait(lambda: all("the worker is ready" in machines.log(name) for name in ("first", "second")), machines.projects)
    for task in tasks[:ANNOTATED]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    setup = {"project": project.uid, "schema": POLYGON_CONFIG}
    httpx.post(f"{machines.url}/setup", json=setup, timeout=60).raise_for_status()
    wait(lambda: machines.projects() and machines.cycle()["finished_at"], machines.projects)
    cycle = machines.cycle()
    assert (cycle["status"], cycle["error"]) == ("done", "")
    assert client.predicted_task_ids(project.id, cycle["version"]) == set(tasks[ANNOTATED:])
    seen = [_SEEN.findall(machines.log(name)) for name in ("first", "second")]
    assert all(seen)
    assert sorted(map(int, chain(*seen))) == list(range(60 // CHUNK))  # each once


def _everything_in(database: str) -> str:
    """Of all tables, as text."""
    with psycopg.connect(database) as connection:
        tables = connection.execute(
            "SELECT format('%I.%I', table_schema, table_name) FROM information_schema.tables "
            "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        rows = [row for (table,) in tables for row in connection.execute(f"SELECT one::text FROM {table} one")]
    return "\n".join(text for (text,) in rows)


def _annotated(client: LabelStudioClient, project: Project, folder: Path, host: str) -> list[int]:
    """A batch whose images lie at a host, in a folder of it."""
    for number, image in enumerate(phantom_images(ANNOTATED)):
        (folder / f"{number}.png").write_bytes(image)
    tasks = import_images(client, project, [f"{host}/{number}.png" for number in range(ANNOTATED)])
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return tasks


def _check_that_it_is_served(
    machines: Machines, client: LabelStudioClient, project: Project, task_id: int, version: str
) -> None:
    """By the web process, which has made nothing of it, for a task whose image nobody can fetch any more."""
    (task,) = (task for task in client.tasks(project.id) if task.id == task_id)
    question = {
        "tasks": [{"id": task.id, "data": task.data}],
        "project": project.uid,
        "label_config": POLYGON_CONFIG,
    }

    def answered() -> str:
        answer = httpx.post(f"{machines.url}/predict", json=question, timeout=120).raise_for_status()
        (result,) = answer.json()["results"]
        return str(result["model_version"])

    wait(lambda: answered() == version, answered)
    assert machines.project()["active_version"] == version
    folder = machines.folder / "web" / "models"
    assert len(list(folder.glob("versions/*/*/weights.safetensors"))) == 1
    assert len(list(folder.glob("cache/images/*/*.png"))) == 1
    assert not list(folder.glob("scores/*/*.jsonl"))
    assert "image of task" not in machines.log("web")  # what it says when an image cannot be had
