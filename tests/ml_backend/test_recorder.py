"""Events are on the disk when `record` returns, however many come at once; one that cannot be kept hurts no other."""

import asyncio
import sqlite3
from collections import Counter
from contextlib import closing, contextmanager

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError

from ml_backend.db import Database, EventRow, ProjectRow
from ml_backend.errors import DatabaseAwayError
from ml_backend.inbox import ProjectName, remember_project, unhandled
from ml_backend.recorder import EventRecorder
from model.errors import InvalidInputError
from tests.ml_backend.examples import locked, settings
from tests.postgres import running_postgres

FIRST, SECOND = ProjectName("1-10", 1), ProjectName("2-20", 2)


@pytest.fixture
def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'state.sqlite3'}")
    yield database
    database.close()


@pytest.fixture
def recorder(database):
    recorder = EventRecorder(database)
    yield recorder
    recorder.close()


def commits(database: Database) -> Counter[str]:
    counts: Counter[str] = Counter()
    event.listen(database.engine, "commit", lambda _: counts.update(["commit"]))
    return counts


def test_many_at_once_share_commits(database, recorder):
    counts = commits(database)

    async def all_at_once() -> None:
        await asyncio.gather(*(recorder.record((FIRST, SECOND)[n % 2], f"ACTION_{n}") for n in range(200)))

    asyncio.run(all_at_once())
    stored = [action for key in ("1-10", "2-20") for _, action in unhandled(database, key)]
    assert sorted(stored) == sorted(f"ACTION_{n}" for n in range(200))
    assert counts["commit"] < 100
    with database.session() as session:
        assert set(session.scalars(select(ProjectRow.key))) == {"1-10", "2-20"}


def test_it_is_on_the_disk_when_record_returns(database, recorder):
    async def one_by_one() -> None:
        for number in range(5):
            await recorder.record(FIRST, "ANNOTATION_CREATED")
            assert len(unhandled(database, "1-10")) == number + 1

    asyncio.run(one_by_one())


def test_an_event_that_cannot_be_kept_gets_its_error_and_the_others_are_kept(database, recorder):
    async def all_at_once() -> list[object]:
        actions = ["GOOD", None, "GOOD"]
        return list(await asyncio.gather(*(recorder.record(FIRST, a) for a in actions), return_exceptions=True))

    first, bad, last = asyncio.run(all_at_once())
    assert first is last is None
    assert isinstance(bad, DBAPIError)
    assert [action for _, action in unhandled(database, "1-10")] == ["GOOD", "GOOD"]


def test_what_waits_is_written_before_it_ends(database):
    recorder = EventRecorder(database)

    async def hurry() -> None:
        waiting = [asyncio.ensure_future(recorder.record(FIRST, "A")) for _ in range(20)]
        await asyncio.sleep(0)
        await asyncio.to_thread(recorder.close)
        await asyncio.gather(*waiting)

    asyncio.run(hurry())
    with database.session() as session:
        assert len(session.scalars(select(EventRow.id)).all()) == 20


def test_somebody_who_hangs_up_disturbs_nobody(database, recorder):
    async def one_hangs_up() -> None:
        waiting = [asyncio.ensure_future(recorder.record(FIRST, "A")) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[7].cancel()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [n for n, answer in enumerate(answers) if answer is not None] == [7]
        await recorder.record(FIRST, "A")

    asyncio.run(one_hangs_up())
    assert len(unhandled(database, "1-10")) == 21


def test_what_comes_while_another_program_holds_the_lock_is_kept_when_it_lets_go(tmp_path):
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}?timeout=0.1")  # seconds
    recorder = EventRecorder(database)

    async def come_meanwhile() -> None:
        with locked(path):
            waiting = [asyncio.ensure_future(recorder.record((FIRST, SECOND)[n % 2], f"ACTION_{n}")) for n in range(20)]
            while not recorder.problem:
                await asyncio.sleep(0.05)
            assert "the database does not take them: database is locked" in recorder.problem
            await asyncio.sleep(1.5)  # longer than a pause and a try
            assert not any(answer.done() for answer in waiting)
            assert unhandled(database, "1-10") == unhandled(database, "2-20") == []
        await asyncio.gather(*waiting)

    asyncio.run(come_meanwhile())
    assert recorder.problem == ""
    stored = [action for key in ("1-10", "2-20") for _, action in unhandled(database, key)]
    assert sorted(stored) == sorted(f"ACTION_{n}" for n in range(20))
    recorder.close()
    database.close()


def test_whoever_waits_for_a_locked_database_gets_an_answer_when_the_process_ends(tmp_path):
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}?timeout=0.1")
    recorder = EventRecorder(database)

    async def end() -> None:
        waiting = asyncio.ensure_future(recorder.record(FIRST, "A"))
        while not recorder.problem:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(recorder.close)
        with pytest.raises(DatabaseAwayError, match=r"the event is lost: .* database is locked"):
            await waiting

    with locked(path):
        asyncio.run(end())
    database.close()


def test_nobody_waits_for_a_lock_when_the_process_ends(tmp_path, monkeypatch):
    """The try that goes on is not waited for either."""
    monkeypatch.setattr("ml_backend.recorder._LAST_SECONDS", 0.1)
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}?timeout=3600")
    recorder = EventRecorder(database)

    async def end() -> None:
        waiting = [asyncio.ensure_future(recorder.record(FIRST, f"ACTION_{n}")) for n in range(600)]
        await asyncio.sleep(0)
        await asyncio.to_thread(recorder.close)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(answer) for answer in answers} == {DatabaseAwayError}
        with pytest.raises(DatabaseAwayError, match="this process ends"):
            await recorder.record(FIRST, "LATE")

    with locked(path):
        asyncio.run(end())
    database.close()


def test_events_that_say_the_same_become_one_row_while_the_database_is_away(tmp_path):
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}?timeout=0.1")
    recorder = EventRecorder(database)

    async def come_meanwhile() -> None:
        with locked(path):
            waiting = [asyncio.ensure_future(recorder.record((FIRST, SECOND)[n % 2], "ABC"[n % 3])) for n in range(600)]
            while len(recorder._waiting) != 6:
                await asyncio.sleep(0.05)
            assert not any(answer.done() for answer in waiting)
        await asyncio.gather(*waiting)

    asyncio.run(come_meanwhile())
    assert sorted(action for _, action in unhandled(database, "1-10")) == ["A", "B", "C"]
    assert sorted(action for _, action in unhandled(database, "2-20")) == ["A", "B", "C"]
    recorder.close()
    database.close()


def test_a_project_without_its_time_is_looked_up_when_the_database_is_back(tmp_path):
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}?timeout=0.1")
    remember_project(database, FIRST)
    database.close()  # the journal cannot be changed while somebody is connected
    recorder = EventRecorder(database)

    async def come_meanwhile() -> None:
        with exclusively_locked(path):
            known = asyncio.ensure_future(recorder.record(1, "A"))
            unknown = asyncio.ensure_future(recorder.record(2, "A"))
            while not recorder.problem:
                await asyncio.sleep(0.05)
        await known
        with pytest.raises(InvalidInputError, match=r"no created_at, and there is not just one known project .* id 2"):
            await unknown

    asyncio.run(come_meanwhile())
    assert [action for _, action in unhandled(database, "1-10")] == ["A"]
    recorder.close()
    database.close()


@contextmanager
def exclusively_locked(path):
    """Nobody may read either, as with the journal that SQLite has unless told otherwise."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("BEGIN EXCLUSIVE")
        yield


def test_what_does_not_pass_is_told_with_how_to_mend_it(database, recorder):
    async def come_meanwhile() -> None:
        with database.engine.begin() as connection:
            connection.execute(text("ALTER TABLE events RENAME TO moved"))
        waiting = asyncio.ensure_future(recorder.record(FIRST, "A"))
        while not recorder.problem:
            await asyncio.sleep(0.05)
        assert "no such table: events. This does not pass by itself: see that DATABASE_URL" in recorder.problem
        assert "do not restart" not in recorder.problem
        with database.engine.begin() as connection:
            connection.execute(text("ALTER TABLE moved RENAME TO events"))
        await waiting

    asyncio.run(come_meanwhile())
    assert recorder.problem == ""


def test_there_is_an_end_to_how_much_may_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("ml_backend.recorder._MOST_WAITING_BYTES", 3_000_000)
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}?timeout=0.1")
    recorder = EventRecorder(database)

    async def too_many() -> None:
        first = asyncio.ensure_future(recorder.record(FIRST, "A"))
        while not recorder.problem:
            await asyncio.sleep(0.05)
        waiting = [asyncio.ensure_future(recorder.record(FIRST, f"B_{n}", size=900_000)) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(DatabaseAwayError, match=r"3 MB are the most; this one is not kept.*database is locked"):
            await recorder.record(FIRST, "C", size=900_000)
        await asyncio.to_thread(lock.__exit__, None, None, None)
        await asyncio.gather(first, *waiting)

    lock = locked(path)
    lock.__enter__()
    asyncio.run(too_many())
    assert [action for _, action in unhandled(database, "1-10")] == ["A", "B_0", "B_1", "B_2"]
    asyncio.run(recorder.record(FIRST, "C", size=100_000_000))  # alone, anything may wait
    recorder.close()
    database.close()


def test_what_comes_while_postgresql_is_restarted_is_kept_afterwards(tmp_path):
    with running_postgres() as server:
        database = Database(settings(tmp_path, DATABASE_URL=server.new_database()).database)
        recorder = EventRecorder(database)

        async def come_meanwhile() -> None:
            await recorder.record(FIRST, "BEFORE")
            await asyncio.to_thread(server.stop)
            waiting = [asyncio.ensure_future(recorder.record(FIRST, f"ACTION_{n}")) for n in range(5)]
            while not recorder.problem:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(server.start)
            await asyncio.gather(*waiting)

        asyncio.run(come_meanwhile())
        assert recorder.problem == ""
        assert [action for _, action in unhandled(database, "1-10")] == ["BEFORE", *(f"ACTION_{n}" for n in range(5))]
        recorder.close()
        database.close()
