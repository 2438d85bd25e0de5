"""Large imports of several workers, by files and by a real PostgreSQL, into a server that counts those under way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from ml_backend.claims import open_claims
from ml_backend.errors import LabelStudioError
from ml_backend.forget import forget
from ml_backend.import_turns import ImportTurns
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.overview import overview
from ml_backend.service import Service
from ml_backend.settings import Settings
from model.errors import TSPError
from tests.label_studio import prediction
from tests.ml_backend.examples import KEY, begin_cycle, cycle_row, settings
from tests.postgres import Postgres
from tests.scripted_server import Answer, says, scripted

IMPORT = "/api/projects/1/import/predictions"
SECONDS = 60.0
LARGE = 10**9
IN_A_TURN = """
import os, signal, sys, time
from pathlib import Path
from ml_backend.claims import open_claims
from ml_backend.import_turns import ImportTurns
from ml_backend.settings import Settings
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
folder, database = sys.argv[1:]
turns = ImportTurns(open_claims(Settings(MODEL_DIR=folder, DATABASE_URL=database)))
print("waits", flush=True)
with turns.turn(10**9):
    print("has it", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings by which workers find each other."""
    if request.param == "sqlite":
        return settings(tmp_path)
    server: Postgres = request.getfixturevalue("postgres")
    return settings(tmp_path, DATABASE_URL=server.new_database())


@pytest.fixture
def worker(place: Settings) -> Iterator[Callable[[], ImportTurns]]:
    """The turns of one more worker."""
    with ExitStack() as stack:
        yield lambda: ImportTurns(stack.enter_context(closing(open_claims(place))))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml_backend.import_turns._LOOK_EVERY_SECONDS", 0.02)
    monkeypatch.setattr("ml_backend.import_turns._TELL_EVERY_SECONDS", 0.1)


def other_process(place: Settings) -> subprocess.Popen[str]:
    """A worker that wants a turn for long."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TURN, str(place.model_dir), place.database_url],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert said(process) == "waits"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait(until: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Counting:
    """An answer to bulk imports that says how many of at least `large` bytes were under way at once, at most."""

    def __init__(self, *, large: int) -> None:
        self._large, self._guard = large, threading.Lock()
        self._now = self.most = self.all = 0

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        counts = int(handler.headers["content-length"]) >= self._large
        with self._guard:
            self._now += counts
            self.all += counts
            self.most = max(self.most, self._now)
        time.sleep(0.05)
        with self._guard:
            self._now -= counts
        says(201, {"created": 1})(handler)


def test_large_imports_never_overlap_whichever_worker_and_thread_sends_them(
    worker: Callable[[], ImportTurns], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prediction(1, score=0.5)
    monkeypatch.setattr("ml_backend.import_turns._SMALL_BYTES", 10)
    counting = Counting(large=10)
    workers = [worker(), worker()]
    with scripted({IMPORT: [counting]}) as (client, _), ThreadPoolExecutor(6) as pool:

        def publish(number: int) -> int:
            turn = workers[number % 2].turn
            return client.import_predictions(1, [one] * 3, max_request_bytes=len(json.dumps(one)) + 10, turn=turn)

        created = list(pool.map(publish, range(6)))
    assert sum(created) == counting.all == 18
    assert counting.most == 1


def test_without_turns_they_would() -> None:
    counting = Counting(large=10)
    with scripted({IMPORT: [counting]}) as (client, _), ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: client.import_predictions(1, [prediction(1, score=0.5)]), range(6)))
    assert counting.most > 1


def test_small_imports_pass_a_large_one(worker: Callable[[], ImportTurns]) -> None:
    large, small = worker(), worker()
    with large.turn(LARGE):
        for turns in (large, small):
            with turns.turn(8_000_000), turns.turn(1):
                pass
        assert not small._take()


def test_the_halves_of_a_request_that_is_too_large_take_turns_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ml_backend.import_turns._SMALL_BYTES", 0)
    answers: list[Answer] = [says(413), says(201, {"created": 1})]
    turns = ImportTurns()
    with scripted({IMPORT: answers}) as (client, log):
        assert client.import_predictions(1, [prediction(1, score=0.5)] * 2, turn=turns.turn) == 2
    assert len(log) == 3
    assert turns._take()


def test_a_request_that_fails_leaves_the_turn_to_others(
    worker: Callable[[], ImportTurns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.import_turns._SMALL_BYTES", 0)
    ours, theirs = worker(), worker()
    with scripted({IMPORT: [says(400)]}) as (client, _), pytest.raises(LabelStudioError):
        client.import_predictions(1, [prediction(1, score=0.5)], turn=ours.turn)
    with theirs.turn(LARGE):
        assert not ours._take()


def test_the_turn_of_a_killed_worker_is_free(place: Settings, worker: Callable[[], ImportTurns]) -> None:
    with other_process(place) as other:
        assert said(other) == "has it"
        ours = worker()
        assert not ours._take()
        threading.Timer(0.3, other.kill).start()
        with ours.turn(LARGE):
            assert other.wait(timeout=SECONDS) == -signal.SIGKILL


def test_a_worker_that_waits_for_its_turn_can_be_stopped(place: Settings, worker: Callable[[], ImportTurns]) -> None:
    with worker().turn(LARGE), other_process(place) as other:
        time.sleep(0.5)
        os.kill(other.pid, signal.SIGTERM)
        assert other.wait(timeout=10) == 0
        assert said(other) == ""


def test_people_are_told_of_a_long_wait_and_of_its_end(lonely_service: Service) -> None:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    log, turns = begin_cycle(lonely_service, KEY), lonely_service.import_turns
    with ThreadPoolExecutor(1) as pool:

        def publish() -> bool:
            with turns.turn(LARGE, log=log):
                return "waiting" in cycle_row(lonely_service, KEY).facts

        with turns.turn(LARGE):
            publishing = pool.submit(publish)
            wait(lambda: "waiting" in cycle_row(lonely_service, KEY).facts)
            (project,) = overview(lonely_service)
            told = project["cycles"][0]["facts"]["waiting"]
        assert publishing.result(timeout=SECONDS) is False
    assert told["for"].startswith("another large import into Label Studio is under way")


def test_who_waits_for_a_forgotten_project_gives_up(lonely_service: Service) -> None:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    log, turns = begin_cycle(lonely_service, KEY), lonely_service.import_turns
    with turns.turn(LARGE):
        forget(lonely_service, KEY)
        with pytest.raises(TSPError, match="forget this project"), turns.turn(LARGE, log=log):
            pass
    with turns.turn(LARGE):
        pass


class Failing:
    """Claims that cannot be had, or given back, since the disk or the database has trouble."""

    def __init__(self, *, takes: bool) -> None:
        self._takes = takes

    def take(self, key: str) -> bool:
        if self._takes:
            return True
        raise OSError("no locks available")

    def release(self, key: str) -> None:
        raise OSError("no locks available")

    def confirm(self, key: str) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("takes", [False, True])
def test_a_claim_that_fails_keeps_no_turn(takes: bool) -> None:
    turns = ImportTurns(Failing(takes=takes))
    for _ in range(2):
        with pytest.raises(OSError, match="no locks"), turns.turn(LARGE):
            pass
    assert turns._here.acquire(blocking=False)
