"""A worker that waits for chunks of a pool: what it does itself, and what happens when others die at them."""

import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from dbos import DBOS, DBOSClient

from ml_backend.chunks import CutPool, cut
from ml_backend.claims import PostgresClaims
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.pool import score_pool_in_steps
from ml_backend.service import Service
from ml_backend.team import ScoringTeam
from ml_backend.worker import _workflow_engine
from model.errors import TSPError
from scripts.label_studio_server import LabelStudioServer
from tests.ml_backend.examples import VERSION, add_version, data_uri, key_of, phantom_images, settings
from tests.ml_backend.test_worker import wait
from tests.postgres import Postgres

pytestmark = pytest.mark.label_studio

TASKS, CHUNK = 5, 2


@pytest.fixture(scope="module")
def address(postgres: Postgres) -> str:
    return postgres.new_database()


@pytest.fixture(scope="module")
def waiting(
    label_studio: LabelStudioServer, address: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, ScoringTeam]]:
    """A worker's part that waits for chunks, while it takes none: nothing happens to them but what a test does."""
    service = Service.connect(
        settings(
            tmp_path_factory.mktemp("worker"),
            DATABASE_URL=address,
            LABEL_STUDIO_URL=label_studio.url,
            LABEL_STUDIO_API_KEY=label_studio.token,
        )
    )
    claims = PostgresClaims(address)
    team = ScoringTeam(service, claims, process="waiting")
    DBOS(config=_workflow_engine(service.settings, "waiting"))
    DBOS.listen_queues([team.queue])
    DBOS.launch()
    yield service, team
    DBOS.destroy()
    claims.close()
    service.close()


@pytest.fixture
def pool(waiting: tuple[Service, ScoringTeam], client: LabelStudioClient, project: Project) -> CutPool:
    """Five tasks in three chunks, for a version that has seen none of them."""
    service, _ = waiting
    key = key_of(service, project)
    add_version(service, key)
    tasks = [{"id": 10 + n, "data": {"image": data_uri(png)}} for n, png in enumerate(phantom_images(TASKS))]
    return cut(service.chunks_folder(key, VERSION), key, VERSION, tasks, size=CHUNK)


def chunk_workflows(address: str) -> dict[str, str]:
    """The queue of each workflow that there is."""
    with psycopg.connect(address) as connection:
        rows = connection.execute("SELECT workflow_uuid, queue_name FROM dbos.workflow_status").fetchall()
    return dict(rows)


def test_a_worker_that_trains_looks_itself_at_chunks_that_nobody_takes(
    waiting: tuple[Service, ScoringTeam], pool: CutPool, address: str
) -> None:
    """Somebody wants an older version back meanwhile: that must not last as long as the training."""
    _, team = waiting
    with team.paused():
        found = list(filter(None, team.see(pool)))
    assert [line["task"] for line in found] == [10 + number for number in range(TASKS)]
    assert all("result" in line for line in found)
    assert set(chunk_workflows(address).values()) == {"chunks"}  # seen by nobody else
    team.forget(pool)
    assert chunk_workflows(address) == {}


def test_who_waits_for_a_chunk_can_do_something_else_meanwhile(
    waiting: tuple[Service, ScoringTeam], pool: CutPool
) -> None:
    _, team = waiting
    seeing = team.see(pool)
    assert [next(seeing) for _ in range(3)] == [None] * 3
    with team.paused():  # it looks itself
        assert next(line for line in seeing if line)["task"] == 10
    team.forget(pool)


def test_a_look_that_is_given_up_leaves_no_chunks(
    waiting: tuple[Service, ScoringTeam], pool: CutPool, address: str
) -> None:
    service, team = waiting
    look = score_pool_in_steps(service, pool.project_key, VERSION, team=team)
    assert next(look) is False  # nobody takes a chunk
    assert pool.folder.exists()
    look.close()
    assert chunk_workflows(address) == {}
    assert not pool.folder.exists()


class Dying:
    """A worker after another that takes the first chunk of a pool and dies at it."""

    def __init__(self, address: str, pool: CutPool, *, deaths: int) -> None:
        self._address, self._deaths = address, deaths
        self._chunk = f"chunk-{pool.project_key}-{pool.version}-{pool.folder.name}-0"
        self.seen: list[str] = []  # the queues in which it was found

    def __enter__(self) -> "Dying":
        self._client = DBOSClient(system_database_url=self._address)
        self._thread = threading.Thread(target=self._die)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        self._client.destroy()

    def _die(self) -> None:
        for number in range(self._deaths):
            wait(lambda: chunk_workflows(self._address).get(self._chunk) == "chunks", lambda: self.seen)
            claims = PostgresClaims(self._address)
            wait(lambda claims=claims: claims.take(self._chunk), lambda: self.seen)
            self._client.resume_workflow(self._chunk, queue_name=f"chunks-dead-{number}")
            self.seen.append(chunk_workflows(self._address)[self._chunk])
            claims.close()


def test_a_chunk_whose_worker_died_waits_again(
    waiting: tuple[Service, ScoringTeam], pool: CutPool, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, team = waiting
    found: list[dict[str, Any]] = []
    with Dying(address, pool, deaths=2) as dying:
        looking = threading.Thread(target=lambda: found.extend(filter(None, team.see(pool))))
        looking.start()
    wait(
        lambda: chunk_workflows(address).get(f"chunk-{pool.project_key}-{VERSION}-{pool.folder.name}-0") == "chunks",
        lambda: dying.seen,
    )
    with team.paused():
        looking.join(timeout=30)
    assert dying.seen == ["chunks-dead-0", "chunks-dead-1"]
    assert [line["task"] for line in found] == [10 + number for number in range(TASKS)]
    assert caplog.text.count("the worker at chunk 0 of") == 2
    team.forget(pool)


def test_a_chunk_at_which_ten_workers_die_is_given_up_and_told(
    waiting: tuple[Service, ScoringTeam], pool: CutPool, address: str
) -> None:
    _, team = waiting
    told = r"10 workers died while they looked at the tasks 10 to 11; .*out of memory"
    with Dying(address, pool, deaths=10) as dying, pytest.raises(TSPError, match=told):
        list(team.see(pool))
    assert len(dying.seen) == 10
    assert chunk_workflows(address) == {}
    assert not pool.folder.exists()


def test_a_forgotten_project_leaves_no_chunks(
    waiting: tuple[Service, ScoringTeam], pool: CutPool, address: str
) -> None:
    _, team = waiting
    with team.paused():
        next(iter(team.see(pool)))  # and then the scoring fails
    assert len(chunk_workflows(address)) == pool.chunks
    team.forget_project("7-1")  # the beginning of another key
    assert len(chunk_workflows(address)) == pool.chunks
    team.forget_project(pool.project_key)
    assert chunk_workflows(address) == {}
