"""A database that another program keeps locked, or that is restarted, while a cycle trains and webhooks come in."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ml_backend.db import Database, EventRow
from ml_backend.ls_client import LabelStudioClient, Project
from ml_backend.settings import Settings
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result
from tests.ml_backend.examples import import_images, locked, phantom_images
from tests.ml_backend.test_worker import Running, is_training, wait
from tests.postgres import running_postgres

pytestmark = pytest.mark.label_studio

INTERVAL = 5  # training steps between checkpoints


@contextmanager
def training(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, folder: Path, **others: str
) -> Iterator[Running]:
    """A worker that is in the middle of the training of its first cycle; two tasks wait for predictions."""
    tasks = import_images(client, project, phantom_images(6))
    for task in tasks[:4]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    with Running(
        folder,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        TSP_BATCH_SIZE="4",
        TSP_EPOCHS="16",  # of 2 steps
        TSP_CHECKPOINT_STEPS=str(INTERVAL),
        TSP_VALIDATION_FRACTION="0",
        LOG_LEVEL="DEBUG",
        **others,
    ) as running:
        running.connect(project.uid)
        running.wait(lambda p: is_training(p) and p["cycles"][0]["done"] > INTERVAL)
        yield running


def steps_of(log: str) -> list[int]:
    """The training steps that were done, as the worker's log tells them."""
    return [int(line.partition(": step ")[2].split()[0]) for line in log.splitlines() if ": step " in line]


def check_steps(log: str, *, attempts: int) -> None:
    """All were done, in as many attempts, and no more was done twice than what lies between two checkpoints."""
    steps = steps_of(log)
    assert set(steps) == set(range(1, 33))
    starts = [i for i, (before, step) in enumerate(zip([0, *steps], steps, strict=False)) if step != before + 1]
    assert len(starts) <= attempts - 1
    assert all(steps[i - 1] - steps[i] < INTERVAL and steps[i] % INTERVAL == 1 for i in starts)


def tell(running: Running, project: Project) -> None:
    """What Label Studio sends, but with the patience that it lacks."""
    of = {"id": project.id, "created_at": project.created_at.isoformat()}
    running.web.post("/webhook", json={"action": "ANNOTATION_UPDATED", "project": of}).raise_for_status()


def events(running: Running) -> list[str]:
    database = Database(Settings(**running.environment).database)
    with database.session() as session:
        actions = [row.action for row in session.query(EventRow).order_by(EventRow.id)]
    database.close()
    return actions


def check_published(running: Running, client: LabelStudioClient, project: Project, cycle: dict[str, Any]) -> None:
    assert (cycle["status"], cycle["error"]) == ("done", "")
    assert "waiting" not in cycle["facts"]
    assert client.project(project.id).model_version == cycle["version"] == running.status()["active_version"]
    assert client.model_versions(project.id) == {cycle["version"]: 2}


def test_nothing_is_lost_while_another_program_locks_the_database(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    state = tmp_path / "state.sqlite3"
    with (
        training(label_studio, client, project, tmp_path, DATABASE_URL=f"sqlite:///{state}?timeout=1") as running,
        ThreadPoolExecutor(1) as pool,
    ):
        before = events(running)
        with locked(state):
            webhook = pool.submit(tell, running, project)
            wait(
                lambda: "waits: (sqlite3.OperationalError) database is locked" in running.log.read_text(),
                running.log.read_text,
            )
            wait(lambda: "are kept as soon as it does" in running.web.get("/ui").text, running.log.read_text)
            wait(lambda: f"Another program keeps {state}" in running.web.get("/ui").text, running.log.read_text)
            assert not webhook.done()
            assert events(running) == before
        webhook.result(timeout=30)
        assert events(running) == [*before, "ANNOTATION_UPDATED"]
        status = running.web.get("/status").json()
        assert (status["events"]["problem"], "Another program" in status["worker"]["problem"]) == ("", False)
        (cycle,) = running.wait(lambda p: p["cycles"][0]["finished_at"])["cycles"]
        check_published(running, client, project, cycle)
    check_steps(running.log.read_text(), attempts=2)


def test_a_restart_of_postgresql_costs_a_worker_and_nothing_else(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    with (
        running_postgres() as server,
        training(label_studio, client, project, tmp_path, DATABASE_URL=server.new_database()) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        before = events(running)
        server.stop()
        webhook = pool.submit(tell, running, project)
        wait(lambda: running.worker.ended("worker") is not None, running.log.read_text)
        assert running.worker.ended("worker") == 1
        assert "its connection to the database is lost" in running.log.read_text()
        assert not webhook.done()
        server.start()
        webhook.result(timeout=30)
        assert events(running) == [*before, "ANNOTATION_UPDATED"]
        running.worker.start_one("worker")
        (cycle,) = running.wait(lambda p: p["cycles"][0]["finished_at"])["cycles"]
        check_published(running, client, project, cycle)
    check_steps(running.log.read_text(), attempts=2)
