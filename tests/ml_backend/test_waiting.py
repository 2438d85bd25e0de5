"""A worker in mid-training whose database another program locks, and whose disk is full to the last byte."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ml_backend.inbox import ProjectName
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from model.registry import Registry
from scripts.label_studio_server import LabelStudioServer
from scripts.tiny_version import tiny_version
from tests.label_studio import polygon_result
from tests.ml_backend.examples import VERSION, import_images, locked, phantom_images
from tests.ml_backend.test_worker import Running, is_training, wait
from tests.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.label_studio

INTERVAL, STEPS = 5, 40  # training steps between checkpoints, and in all


def test_a_cycle_waits_for_a_locked_database_and_for_space_on_the_disk_and_nothing_is_lost(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = import_images(client, project, phantom_images(6))
    for task in tasks[:4]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    with small_disk(tmp_path / "disk", megabytes=250) as disk:
        registry = Registry(disk.folder / "versions")
        registry.add(name.key, *tiny_version(VERSION, ("cell", "lesion")))
        registry.activate(name.key, VERSION)
        state = disk.folder / "state.sqlite3"
        with Running(
            tmp_path,
            MODEL_DIR=str(disk.folder),
            DATABASE_URL=f"sqlite:///{state}?timeout=1",
            LABEL_STUDIO_URL=label_studio.url,
            LABEL_STUDIO_API_KEY=label_studio.token,
            TSP_BATCH_SIZE="4",
            TSP_EPOCHS=str(STEPS // 2),
            TSP_CHECKPOINT_STEPS=str(INTERVAL),
            TSP_VALIDATION_FRACTION="0",
            LOG_LEVEL="DEBUG",  # tells of each step
        ) as running:
            running.connect(project.uid)
            running.wait(lambda p: is_training(p) and p["cycles"][0]["done"] > INTERVAL)
            _lock(running, state, project)
            # A lock is waited for in 15 s; then training goes on.
            last = max(_steps(running))
            wait(lambda: _steps(running)[-1] > last, running.log.read_text)
            _fill(running, disk)
            (cycle,) = running.wait(lambda p: p["cycles"][0]["finished_at"])["cycles"]
            assert (cycle["status"], cycle["error"], "waiting" in cycle["facts"]) == ("done", "", False)
            assert running.status()["active_version"] == cycle["version"]
        assert client.project(project.id).model_version == cycle["version"]
        assert client.predicted_task_ids(project.id, cycle["version"]) == set(tasks[4:])
    assert "Traceback" not in running.log.read_text()
    steps = _steps(running)
    assert set(steps) == set(range(1, STEPS + 1))
    again = [(steps[i - 1], steps[i]) for i in range(1, len(steps)) if steps[i] != steps[i - 1] + 1]
    assert len(again) <= 2
    assert all(step % INTERVAL == 1 and last - step < INTERVAL for last, step in again)


def _lock(running: Running, state: Path, project: Project) -> None:
    """Another program keeps the database from being written, longer than anybody waits at once."""
    event = {
        "action": "ANNOTATION_UPDATED",
        "project": {"id": project.id, "created_at": project.created_at.isoformat()},
    }
    received = running.status()["events"]["received"]
    with ThreadPoolExecutor(1) as pool:
        with locked(state):
            webhook = pool.submit(running.web.post, "/webhook", json=event)
            told = "waits: the database does not answer, or refuses this: database is locked"
            wait(lambda: told in running.log.read_text(), running.log.read_text)
            wait(lambda: "They are kept as soon as it does" in running.web.get("/ui").text, running.log.read_text)
            wait(lambda: f"Another program keeps {state}" in running.web.get("/ui").text, running.log.read_text)
            assert not webhook.done()
            assert running.status()["events"]["received"] == received
        assert webhook.result(timeout=60).status_code == 200
    assert running.status()["events"]["received"] == received + 1
    status = running.web.get("/status").json()
    assert (status["events"]["problem"], "Another program" in status["worker"]["problem"]) == ("", False)


def _fill(running: Running, disk: SmallDisk) -> None:
    """The disk is full until the worker has noticed; the old model stays."""
    told = len(running.log.read_text())
    with disk.full():
        wait(lambda: "number 1 waits: " in running.log.read_text()[told:], running.log.read_text)
        assert "disk is full" in running.log.read_text()[told:] or "no space for" in running.log.read_text()[told:]
        assert "The worker waits: no space" in running.web.get("/ui").text
        status = running.status()
        assert (status["active_version"], status["cycles"][0]["status"]) == (VERSION, "running")


def _steps(running: Running) -> list[int]:
    """The training steps that were done, as the worker's log tells them."""
    lines = running.log.read_text().splitlines()
    return [int(line.partition(": step ")[2].split()[0]) for line in lines if ": step " in line]
