"""Events and project names, in real SQLite files and a real PostgreSQL."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from sqlalchemy import select

from ml_backend import inbox
from ml_backend.db import CycleRow, Database, EventRow, ProjectRow
from ml_backend.inbox import START_TRAINING, ProjectName
from tests.ml_backend.examples import KEY

NAME = ProjectName(KEY, 7)
CREATED = "2023-11-14T22:13:20.654321Z"  # 1700000000


@pytest.mark.parametrize(
    ("uid", "key"),
    [
        pytest.param("7.1700000000", KEY, id="as Label Studio sends it"),
        pytest.param("12.5", "12-5", id="short"),
        pytest.param("007.1700000000", KEY, id="leading zeros"),
    ],
)
def test_a_uid_gives_key_and_id(uid: str, key: str) -> None:
    name = ProjectName.from_uid(uid)
    assert name is not None
    assert name.key == key
    assert inbox.label_studio_id(key) == name.label_studio_id == int(uid.partition(".")[0])


@pytest.mark.parametrize(
    "uid",
    [
        pytest.param("", id="empty"),
        pytest.param("7", id="no time"),
        pytest.param("7.", id="empty time"),
        pytest.param(".1700000000", id="no id"),
        pytest.param("7.17.3", id="two dots"),
        pytest.param("-7.1700000000", id="negative"),
        pytest.param("../../etc.1700000000", id="a path"),
        pytest.param("7.1700000000\n", id="a line break"),
        pytest.param("\N{ARABIC-INDIC DIGIT SEVEN}.1700000000", id="a digit of another script"),
        pytest.param("9" * 5000 + ".1", id="more digits than Python converts"),
        pytest.param("99999999999.1700000000", id="an id beyond 32 bits"),
        pytest.param(None, id="null"),
        pytest.param(7, id="a number"),
        pytest.param({"id": 7}, id="an object"),
    ],
)
def test_what_is_no_uid_gives_nothing(uid: object) -> None:
    assert ProjectName.from_uid(uid) is None


@pytest.mark.parametrize(
    "created",
    [
        pytest.param(CREATED, id="as Label Studio sends it"),
        pytest.param("2023-11-14T23:13:20+01:00", id="another time zone"),
        pytest.param(datetime.fromisoformat(CREATED), id="a datetime"),
    ],
)
def test_a_webhook_names_the_project_as_a_uid_does(created: object) -> None:
    name = ProjectName.from_webhook({"id": 7, "created_at": created, "title": "cells"})
    assert name == ProjectName.from_uid("7.1700000000") == NAME


NAMELESS = {
    "null": None,
    "a list": [7],
    "empty": {},
    "no time": {"id": 7},
    "null time": {"id": 7, "created_at": None},
    "a time in words": {"id": 7, "created_at": "yesterday"},
    "a time before time began": {"id": 7, "created_at": "0001-01-01T00:00:00"},
    "a negative time": {"id": 7, "created_at": "1901-01-01T00:00:00Z"},
    "no id": {"created_at": CREATED},
    "a path as id": {"id": "../7", "created_at": CREATED},
    "a truth value as id": {"id": True, "created_at": CREATED},
    "a negative id": {"id": -7, "created_at": CREATED},
    "a huge id": {"id": 10**30, "created_at": CREATED},
    "an object as id": {"id": {"a": 1}, "created_at": CREATED},
}


@pytest.mark.parametrize("project", NAMELESS.values(), ids=NAMELESS)
def test_a_webhook_without_id_or_time_names_no_project(project: object) -> None:
    assert ProjectName.from_webhook(project) is None


def test_nothing_that_a_payload_holds_troubles_the_database(database: Database) -> None:
    for project in NAMELESS.values():
        assert inbox.known_project(database, project) is None


def test_a_project_is_remembered_once(database: Database) -> None:
    inbox.remember_project(database, NAME)
    with database.session() as session:
        session.get_one(ProjectRow, KEY).title = "cells"
    inbox.remember_project(database, NAME)
    with database.session() as session:
        rows = session.scalars(select(ProjectRow)).all()
    assert [(row.key, row.label_studio_id, row.title) for row in rows] == [(KEY, 7, "cells")]


def test_threads_that_remember_a_project_at_the_same_time_do_not_disturb_each_other(database: Database) -> None:
    together = threading.Barrier(8)

    def remember(number: int) -> None:
        together.wait()
        inbox.remember_project(database, ProjectName(f"{number}-5", number))

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for remembered in [pool.submit(remember, 1 + thread // 4) for thread in range(8)]:
                remembered.result()
            with database.session() as session:
                assert sorted(session.scalars(select(ProjectRow.key))) == ["1-5", "2-5"]
                for row in session.scalars(select(ProjectRow)):
                    session.delete(row)


def test_a_payload_without_a_time_is_the_one_known_project_with_its_id(database: Database) -> None:
    assert inbox.known_project(database, {"id": 7}) is None
    inbox.remember_project(database, NAME)
    inbox.remember_project(database, ProjectName("8-1700000000", 8))
    assert inbox.known_project(database, {"id": 7}) == inbox.known_project(database, 7) == NAME
    inbox.remember_project(database, ProjectName("7-1800000000", 7))  # the same id in a new Label Studio
    assert inbox.known_project(database, {"id": 7}) is None


def test_events_are_kept_in_order_for_each_project_until_they_are_handled(database: Database) -> None:
    for key, action in ((KEY, "ANNOTATION_CREATED"), ("8-1", "TASKS_CREATED"), (KEY, START_TRAINING)):
        inbox.record(database, key, action)
    waiting = inbox.unhandled(database, KEY)
    assert [action for _, action in waiting] == ["ANNOTATION_CREATED", START_TRAINING]
    inbox.record(database, KEY, "ANNOTATION_UPDATED")  # while somebody looks at the first two
    inbox.mark_handled(database, [number for number, _ in waiting])
    assert [action for _, action in inbox.unhandled(database, KEY)] == ["ANNOTATION_UPDATED"]
    assert [action for _, action in inbox.unhandled(database, "8-1")] == ["TASKS_CREATED"]
    assert inbox.event_counts(database, KEY) == {"received": 3, "waiting": 1}


def test_marking_nothing_marks_nothing(database: Database) -> None:
    inbox.record(database, KEY, "ANNOTATION_CREATED")
    inbox.mark_handled(database, [])
    assert len(inbox.unhandled(database, KEY)) == 1


def test_an_event_that_was_handled_keeps_its_time(database: Database) -> None:
    inbox.record(database, KEY, "ANNOTATION_CREATED")
    with database.session() as session:
        event = session.scalars(select(EventRow)).one()
    assert event.handled_at is None
    assert datetime.fromisoformat(event.received_at).utcoffset() is not None


@pytest.mark.parametrize(
    ("status", "action", "is_new"),
    [
        pytest.param(None, "ANNOTATION_CREATED", True, id="an event"),
        pytest.param(None, START_TRAINING, True, id="a wish to train"),
        pytest.param("planned", START_TRAINING, False, id="a wish to train before a cycle"),
        pytest.param("running", START_TRAINING, False, id="a wish to train during a cycle"),
        pytest.param("running", "ANNOTATION_CREATED", True, id="an event during a cycle"),
        pytest.param("done", START_TRAINING, True, id="a wish to train after a cycle"),
        pytest.param("failed", START_TRAINING, True, id="a wish to train after a failed cycle"),
    ],
)
def test_an_event_is_new_unless_it_has_to_wait_for_a_cycle(
    database: Database, status: str | None, action: str, is_new: bool
) -> None:
    inbox.remember_project(database, NAME)
    if status is not None:
        with database.session() as session:
            session.add(CycleRow(project_key=KEY, number=1, status=status))
    assert not inbox.has_new(database, KEY)
    inbox.record(database, "8-1", "ANNOTATION_CREATED")
    assert not inbox.has_new(database, KEY)
    inbox.record(database, KEY, action)
    assert inbox.has_new(database, KEY) is is_new
