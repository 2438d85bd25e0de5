"""Three workers, two projects, one PostgreSQL: the worker that trains is killed, and another one goes on."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from ml_backend.ls_client import LabelStudioClient, Project
from model.files import read_tensors
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, polygon_result
from tests.ml_backend.examples import import_images, phantom_images
from tests.ml_backend.test_worker import environment, wait
from tests.postgres import Postgres, postgres

__all__ = ["postgres"]

pytestmark = pytest.mark.label_studio

WORKERS = 3
ANNOTATED, POOL = 4, 2
STEPS, INTERVAL = 60, 4  # of a training, and between checkpoints
_STEP = re.compile(r"project (\S+), cycle 1: step (\d+) of")
_READY = re.compile(r"the worker is ready as (\S+);")


class Team:
    """A web process and workers on one database and one folder; they end with the block."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder = folder
        self.settings = settings
        self.url = f"http://127.0.0.1:{settings['PORT']}"
        self.web = BackendProcesses(settings=settings, log_dir=folder)
        self.workers = [
            BackendProcesses(settings=settings, log_dir=folder / f"worker{number}") for number in range(WORKERS)
        ]

    def __enter__(self) -> Self:
        self.web.start_one("web")
        for number, worker in enumerate(self.workers):
            (self._folder / f"worker{number}").mkdir()
            worker.start_one("worker")
        self.web.wait_until_it_answers()
        wait(lambda: all(_READY.search(self.log(number)) for number in range(WORKERS)), lambda: self.log(0))
        return self

    def __exit__(self, *_: object) -> None:
        for processes in (self.web, *self.workers):
            processes.stop()

    def log(self, number: int) -> str:
        return (self._folder / f"worker{number}" / "worker.log").read_text()

    def number_of(self, name: str) -> int:
        """Which of the processes has this name."""
        names = {ready[1]: number for number in range(WORKERS) if (ready := _READY.search(self.log(number)))}
        return names[name]

    def steps(self, number: int, key: str) -> list[int]:
        """The training steps that a worker did for a project."""
        return [int(step) for project, step in _STEP.findall(self.log(number)) if project == key]

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/status", timeout=30).json()
        return answer

    def cycles(self) -> dict[str, list[dict[str, Any]]]:
        """Of each project, by its key."""
        return {project["key"]: project["cycles"] for project in self.status()["projects"]}

    def in_the_middle(self) -> tuple[str, int] | None:
        """A project whose training is past its first checkpoint and far from its end, and the worker that trains it."""
        status = self.status()
        for project in status["projects"]:
            for cycle in project["cycles"]:
                if cycle["stage"].startswith("training") and INTERVAL < cycle["done"] < STEPS / 2:
                    for worker in status["worker"]["workers"]:
                        if worker["project"] == project["key"]:
                            return project["key"], self.number_of(worker["name"])
        return None


@pytest.fixture
def team(label_studio: LabelStudioServer, postgres: Postgres, tmp_path: Path) -> Iterator[Team]:
    settings = environment(
        tmp_path,
        DATABASE_URL=postgres.new_database(),
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        LOG_LEVEL="DEBUG",  # tells of each step
        TSP_BATCH_SIZE=str(ANNOTATED),
        TSP_VALIDATION_FRACTION="0",
        TSP_EPOCHS="1",
        TSP_MIN_STEPS=str(STEPS),
        TSP_CHECKPOINT_STEPS=str(INTERVAL),
    )
    with Team(tmp_path, settings) as team:
        yield team


def test_another_worker_goes_on_with_the_cycle_of_one_that_is_killed_while_it_trains(
    team: Team, client: LabelStudioClient
) -> None:
    projects = [client.create_project(title=f"taken over {n}", label_config=POLYGON_CONFIG) for n in (1, 2)]
    pools = [_annotated(client, project) for project in projects]
    for project in projects:
        setup = {"project": project.uid, "schema": POLYGON_CONFIG}
        httpx.post(f"{team.url}/setup", json=setup, timeout=30).raise_for_status()

    found: list[tuple[str, int]] = []
    wait(lambda: found.extend(filter(None, [team.in_the_middle()])) or found, team.status)
    key, victim = found[0]
    team.workers[victim].kill("worker")
    checkpoint = Path(team.settings["MODEL_DIR"]) / "cycles" / key / "1" / "checkpoint.safetensors"
    saved = int(read_tensors(checkpoint)[1]["step"])
    before = team.steps(victim, key)
    assert before == list(range(1, before[-1] + 1))
    assert before[-1] - saved <= INTERVAL  # what is done twice

    wait(lambda: all(cycles and cycles[0]["finished_at"] for cycles in team.cycles().values()), team.status)
    (heir,) = (number for number in range(WORKERS) if number != victim and team.steps(number, key))
    assert team.steps(heir, key) == list(range(saved + 1, STEPS + 1))
    for project, pool in zip(projects, pools, strict=True):
        (name,) = (name for name in team.cycles() if name.startswith(f"{project.id}-"))
        (cycle,) = team.cycles()[name]
        assert (cycle["status"], cycle["error"]) == ("done", "")
        assert cycle["facts"].get("restarts", 0) == (name == key)
        assert client.project(project.id).model_version == cycle["version"]
        assert client.model_versions(project.id) == {cycle["version"]: POOL}
        assert client.predicted_task_ids(project.id, cycle["version"]) == pool


def _annotated(client: LabelStudioClient, project: Project) -> set[int]:
    """A batch is annotated; returns the tasks that are left."""
    tasks = import_images(client, project, phantom_images(ANNOTATED + POOL))
    for task in tasks[:ANNOTATED]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return set(tasks[ANNOTATED:])
