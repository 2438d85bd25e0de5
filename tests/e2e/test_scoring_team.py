"""Three workers score one pool on one PostgreSQL, and one of them is killed while it looks at a chunk."""

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
import torch

from ml_backend.inbox import ProjectName
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.pool import read_scores, score_pool
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.registry import Registry
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from scripts.tiny_version import tiny_version
from tests.e2e.test_takeover import WORKERS, Team, database
from tests.label_studio import POLYGON_CONFIG, polygon_result
from tests.ml_backend.examples import VERSION, import_images, phantom_images
from tests.ml_backend.test_worker import Running, environment, wait
from tests.postgres import Postgres

__all__ = ["database"]

pytestmark = pytest.mark.label_studio

ANNOTATED, POOL, CHUNK = 2, 95, 6
CHUNKS = -(-POOL // CHUNK)
_BEGUN, _SEEN = re.compile(r"looking at chunk (\d+) of"), re.compile(r"chunk (\d+) of \S+ is seen")


@pytest.fixture
def team(label_studio: LabelStudioServer, database: Postgres, tmp_path: Path) -> Iterator[Team]:
    settings = environment(
        tmp_path,
        DATABASE_URL=database.new_database(),
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        LOG_LEVEL="DEBUG",  # tells of each chunk
        TSP_IMAGE_SIZE="128",
        TSP_STRATEGY="mc_dropout",  # draws at random, by image
        TSP_BATCH_SIZE=str(ANNOTATED),
        TSP_VALIDATION_FRACTION="0",
        TSP_EPOCHS="1",
        TSP_SCORING_CHUNK=str(CHUNK),
    )
    with Team(tmp_path, settings) as team:
        yield team


@pytest.mark.parametrize("runs_the_cycle", [False, True], ids=["one that helps", "the one that runs the cycle"])
def test_every_image_is_scored_once_when_a_worker_is_killed_in_the_middle_of_a_chunk(
    team: Team, client: LabelStudioClient, project: Project, runs_the_cycle: bool
) -> None:
    tasks = import_images(client, project, phantom_images(ANNOTATED + POOL))
    for task in tasks[:ANNOTATED]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    setup = {"project": project.uid, "schema": POLYGON_CONFIG}
    httpx.post(f"{team.urls[0]}/setup", json=setup, timeout=30).raise_for_status()

    wait(lambda: all(map(_SEEN.search, map(team.log, range(WORKERS)))), team.status)  # all three take part
    victim = _killed(team, runs_the_cycle=runs_the_cycle)
    wait(lambda: all(cycles[0]["finished_at"] for cycles in team.cycles().values()), team.status)

    ((key, (cycle,)),) = team.cycles().items()
    assert (cycle["status"], cycle["error"]) == ("done", "")
    assert cycle["facts"]["pool"] == POOL
    assert cycle["facts"].get("restarts", 0) == int(runs_the_cycle)
    assert client.predicted_task_ids(project.id, cycle["version"]) == set(tasks[ANNOTATED:])
    _check_chunks(team, victim)
    _check_scores(team, key, cycle["version"], tasks[ANNOTATED:])


def test_a_chunk_that_fails_is_told_and_repeated(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, database: Postgres, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(phantom_images(24)):
        (tmp_path / "images" / f"{number:02}.png").write_bytes(image)
    tasks = client.import_files(project.id, sorted((tmp_path / "images").iterdir()))
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    registry = Registry(tmp_path / "models" / "versions")
    registry.add(name.key, *tiny_version(VERSION, ("cell", "lesion")))
    registry.activate(name.key, VERSION)
    is_away = threading.Event()
    asked: set[str] = set()

    def choose(call: Call) -> Fault | None:
        return Fault(kind="refuse") if is_away.is_set() else None

    def look(call: Call) -> None:
        if call.path.endswith("-12.png") and call.path not in asked:  # once, in the middle
            asked.add(call.path)
            is_away.set()

    with (
        FaultProxy(label_studio.url, choose, look=look) as proxy,
        Running(
            tmp_path,
            DATABASE_URL=database.new_database(),
            LABEL_STUDIO_URL=proxy.url,
            LABEL_STUDIO_API_KEY=label_studio.token,
            LOG_LEVEL="DEBUG",
            TSP_SCORING_CHUNK="3",
        ) as running,
    ):
        running.connect(project.uid)
        running.wait(lambda status: "no answer from Label Studio" in status["problem"])
        assert " failed here: " in running.log.read_text()
        assert client.model_versions(project.id) == {}
        is_away.clear()
        wait(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks), running.log.read_text)
        assert running.wait(lambda status: not status["problem"])
    assert [
        line["task"] for line in read_scores(tmp_path / "models" / "scores" / name.key / f"{VERSION}.jsonl")
    ] == tasks
    seen = Counter(_SEEN.findall(running.log.read_text()))
    assert seen == {str(number): 1 for number in range(8)}


def _killed(team: Team, *, runs_the_cycle: bool) -> int:
    """A worker that has begun with a chunk, stands still in the middle of it, and is killed there."""
    victims: list[int] = []

    def caught() -> bool:
        for number in _candidates(team, runs_the_cycle=runs_the_cycle):
            if _unfinished(team, number):
                pid = team.workers[number].pid("worker")
                os.kill(pid, signal.SIGSTOP)
                if _unfinished(team, number):
                    victims.append(number)
                    return True
                os.kill(pid, signal.SIGCONT)
        return False

    wait(caught, team.status)
    team.workers[victims[0]].kill("worker")
    return victims[0]


def _candidates(team: Team, *, runs_the_cycle: bool) -> list[int]:
    workers = team.status()["worker"]["workers"]
    return [team.number_of(worker["name"]) for worker in workers if bool(worker["project"]) is runs_the_cycle]


def _unfinished(team: Team, number: int) -> list[str]:
    log = team.log(number)
    return list((Counter(_BEGUN.findall(log)) - Counter(_SEEN.findall(log))).elements())


def _check_chunks(team: Team, victim: int) -> None:
    """Each was finished once, only the victim's was begun twice, and no worker loads the network for each."""
    logs = [team.log(number) for number in range(WORKERS)]
    (lost,) = _unfinished(team, victim)
    every = {str(number): 1 for number in range(CHUNKS)}
    assert Counter(chunk for log in logs for chunk in _SEEN.findall(log)) == every
    assert Counter(chunk for log in logs for chunk in _BEGUN.findall(log)) == every | {lost: 2}
    # The last chunk may come back when a worker has let go of its network.
    assert all(log.count("to look at the pool") in (1, 2) for log in logs)
    with psycopg.connect(team.settings["DATABASE_URL"]) as connection:
        left = connection.execute("SELECT workflow_uuid FROM dbos.workflow_status").fetchall()
    assert [name for (name,) in left if not name.startswith("cycle-")] == []


def _check_scores(team: Team, key: str, version: str, pool: list[int]) -> None:
    """Byte for byte what one worker alone finds, which knows no chunks."""
    for worker in team.workers:
        worker.stop()  # they would miss the file that is made anew here
    torch.set_num_threads(1)  # as the workers
    alone = {name: value for name, value in team.settings.items() if name != "DATABASE_URL"}
    service = Service.connect(Settings(**alone))
    assert not service.chunks_folder(key, version).exists()
    scores = service.scores_file(key, version)
    assert [line["task"] for line in read_scores(scores)] == pool
    together = scores.read_bytes()
    scores.unlink()
    assert score_pool(service, key, version) == POOL
    assert scores.read_bytes() == together
    service.close()
