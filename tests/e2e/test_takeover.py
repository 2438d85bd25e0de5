"""Two web processes, three workers, two projects, one PostgreSQL: one that trains is killed, PostgreSQL restarted."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from model.files import read_tensors
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import LabelStudioServer, free_port
from tests.label_studio import POLYGON_CONFIG, polygon_result
from tests.ml_backend.examples import import_images, phantom_images
from tests.ml_backend.test_worker import environment, wait
from tests.postgres import Postgres, running_postgres

pytestmark = pytest.mark.label_studio

WORKERS, WEB_PROCESSES = 3, 2
ANNOTATED, POOL = 4, 2
STEPS, INTERVAL = 48, 4  # of a training, and between checkpoints
_STEP = re.compile(r"project (\S+), cycle 1: step (\d+) of")
_READY = re.compile(r"the worker is ready as (\S+);")


class Team:
    """Web processes and workers on one database and one folder; they end with the block."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder = folder
        self.settings = settings
        ports = [settings["PORT"], *(str(free_port()) for _ in range(WEB_PROCESSES - 1))]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.webs = [
            BackendProcesses(settings={**settings, "PORT": port}, log_dir=folder / f"web{number}")
            for number, port in enumerate(ports)
        ]
        self.workers = [
            BackendProcesses(settings=settings, log_dir=folder / f"worker{number}") for number in range(WORKERS)
        ]

    def __enter__(self) -> Self:
        for number, web in enumerate(self.webs):
            (self._folder / f"web{number}").mkdir()
            web.start_one("web")
        for number, worker in enumerate(self.workers):
            (self._folder / f"worker{number}").mkdir()
            worker.start_one("worker")
        for web in self.webs:
            web.wait_until_it_answers()
        wait(lambda: all(map(_READY.search, map(self.log, range(WORKERS)))), lambda: self.log(0))
        return self

    def __exit__(self, *_: object) -> None:
        for processes in (*self.webs, *self.workers):
            processes.stop()

    def log(self, number: int) -> str:
        return (self._folder / f"worker{number}" / "worker.log").read_text()

    def number_of(self, name: str) -> int:
        """Which of the processes has this name."""
        names = {ready[1]: number for number in range(WORKERS) if (ready := _READY.search(self.log(number)))}
        return names[name]

    def steps(self, key: str) -> list[list[int]]:
        """The training steps that each worker did for a project."""
        found = [_STEP.findall(self.log(number)) for number in range(WORKERS)]
        return [[int(step) for project, step in steps if project == key] for steps in found]

    def saved_steps(self, key: str) -> int:
        """Those that the checkpoint of a project's first cycle holds."""
        folder = Path(self.settings["MODEL_DIR"]) / "cycles" / key / "1"
        return int(read_tensors(folder / "checkpoint.safetensors")[1]["step"])

    def status(self, web: int = 0) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.urls[web]}/status", timeout=30).json()
        return answer

    def cycles(self, web: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Of each project, by its key."""
        return {project["key"]: project["cycles"] for project in self.status(web)["projects"]}

    def in_the_middle(self) -> tuple[str, int] | None:
        """A project whose training is past its first checkpoint and far from its end, and which worker trains it."""
        status = self.status()
        trained = {worker["project"]: self.number_of(worker["name"]) for worker in status["worker"]["workers"]}
        for project in status["projects"]:
            number = trained.get(project["key"])
            for cycle in project["cycles"]:
                trains = cycle["stage"].startswith("training") and INTERVAL < cycle["done"] < 5 * INTERVAL
                if trains and number is not None:
                    return project["key"], number
        return None

    def wait_for_the_middle(self) -> tuple[str, int]:
        found: list[tuple[str, int]] = []
        wait(lambda: found.extend(filter(None, [self.in_the_middle()])) or found, self.status)
        return found[0]


@pytest.fixture
def database() -> Iterator[Postgres]:
    """One that may be restarted."""
    with running_postgres() as database:
        yield database


@pytest.fixture
def team(label_studio: LabelStudioServer, database: Postgres, tmp_path: Path) -> Iterator[Team]:
    settings = environment(
        tmp_path,
        DATABASE_URL=database.new_database(),
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


def test_a_cycle_is_gone_on_with_when_its_worker_is_killed_and_when_the_database_is_restarted(
    team: Team, client: LabelStudioClient, database: Postgres
) -> None:
    projects = [client.create_project(title=f"taken over {n}", label_config=POLYGON_CONFIG) for n in (1, 2)]
    pools = [_annotated(client, project) for project in projects]
    for project, url in zip(projects, team.urls, strict=True):  # each is connected to another web process
        setup = {"project": project.uid, "schema": POLYGON_CONFIG}
        httpx.post(f"{url}/setup", json=setup, timeout=30).raise_for_status()

    key, victim = team.wait_for_the_middle()
    team.workers[victim].kill("worker")
    saved, killed = team.saved_steps(key), team.steps(key)[victim]
    assert killed == list(range(1, killed[-1] + 1))
    assert killed[-1] - saved <= INTERVAL  # what is done twice

    heir = _heir(team, key, victim)
    _restart(team, database, projects[0], dead=victim)
    before, again = team.steps(key), team.saved_steps(key)
    assert before[heir] == list(range(saved + 1, before[heir][-1] + 1))
    assert before[heir][-1] - again <= INTERVAL
    for number in set(range(WORKERS)) - {victim}:
        team.workers[number].start_one("worker")

    wait(lambda: all(cycles and cycles[0]["finished_at"] for cycles in team.cycles().values()), team.status)
    assert team.cycles(web=0) == team.cycles(web=1)
    after = [now[len(then) :] for now, then in zip(team.steps(key), before, strict=True)]
    assert [steps for steps in after if steps] == [list(range(again + 1, STEPS + 1))]
    for project, pool in zip(projects, pools, strict=True):
        (name,) = (name for name in team.cycles() if name.startswith(f"{project.id}-"))
        (cycle,) = team.cycles()[name]
        assert (cycle["status"], cycle["error"]) == ("done", "")
        assert cycle["facts"].get("restarts", 0) in ((2,) if name == key else (0, 1))
        assert client.project(project.id).model_version == cycle["version"]
        assert client.model_versions(project.id) == {cycle["version"]: POOL}
        assert client.predicted_task_ids(project.id, cycle["version"]) == pool


def _heir(team: Team, key: str, victim: int) -> int:
    """Who goes on with a project's training, once it has done a few steps."""
    others = [number for number in range(WORKERS) if number != victim]
    wait(lambda: any(len(team.steps(key)[number]) > INTERVAL for number in others), team.status)
    return next(number for number in others if team.steps(key)[number])


def _restart(team: Team, database: Postgres, project: Project, *, dead: int) -> None:
    """Every worker that lives ends, as it must; what Label Studio says meanwhile is kept."""
    events = next(p["events"]["received"] for p in team.status()["projects"] if p["id"] == project.id)
    database.stop()
    event = {
        "action": "ANNOTATION_UPDATED",
        "project": {"id": project.id, "created_at": project.created_at.isoformat()},
    }
    with ThreadPoolExecutor(WEB_PROCESSES) as pool:
        webhooks = [pool.submit(httpx.post, f"{url}/webhook", json=event, timeout=60) for url in team.urls]
        for number in set(range(WORKERS)) - {dead}:
            worker = team.workers[number]
            wait(lambda worker=worker: worker.ended("worker") is not None, lambda number=number: team.log(number))
            assert worker.ended("worker") == 1
            assert "its connection to the database is lost" in team.log(number)
        assert not any(webhook.done() for webhook in webhooks)
        database.start()
        assert [webhook.result().status_code for webhook in webhooks] == [200] * WEB_PROCESSES
    wait(
        lambda: (
            [p["events"]["received"] for p in team.status()["projects"] if p["id"] == project.id]
            == [events + WEB_PROCESSES]
        ),
        team.status,
    )


def _annotated(client: LabelStudioClient, project: Project) -> set[int]:
    """A batch is annotated; returns the tasks that are left."""
    tasks = import_images(client, project, phantom_images(ANNOTATED + POOL))
    for task in tasks[:ANNOTATED]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return set(tasks[ANNOTATED:])
