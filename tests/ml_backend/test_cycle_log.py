"""What a cycle writes about itself."""

import pytest

from ml_backend import cycle_log
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.overview import overview
from ml_backend.service import Service
from tests.ml_backend.examples import KEY, begin_cycle, cycle_row


@pytest.fixture
def log(lonely_service: Service) -> CycleLog:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    return begin_cycle(lonely_service, KEY)


def test_a_cycle_runs_from_its_beginning_to_its_end(lonely_service: Service, log: CycleLog) -> None:
    assert cycle_row(lonely_service, KEY).status == "running"
    log.name_version("tsp-1-abc")
    log.finish("done")
    row = cycle_row(lonely_service, KEY)
    assert (row.status, row.stage, row.error, row.version) == ("done", "finished", "", "tsp-1-abc")
    assert row.finished_at is not None
    assert row.finished_at > row.planned_at


def test_a_failed_cycle_keeps_its_reason(lonely_service: Service, log: CycleLog) -> None:
    log.finish("failed", error="the loss is NaN")
    row = cycle_row(lonely_service, KEY)
    assert (row.status, row.stage, row.error) == ("failed", "failed", "the loss is NaN")


def test_a_stage_starts_at_nothing_done(lonely_service: Service, log: CycleLog) -> None:
    log.progress(5, 5)
    log.stage("evaluating", total=8)
    row = cycle_row(lonely_service, KEY)
    assert (row.stage, row.done, row.total) == ("evaluating", 0, 8)


def test_progress_is_written_once_a_second_and_at_the_end(
    lonely_service: Service, log: CycleLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(cycle_log.time, "monotonic", lambda: now)
    log.stage("training")
    seen = []
    for done in range(1, 11):
        now += 0.25
        log.progress(done, 10)
        seen.append(cycle_row(lonely_service, KEY).done)
    assert seen == [0, 0, 0, 4, 4, 4, 4, 8, 8, 10]


def test_facts_of_the_stages_add_up(lonely_service: Service, log: CycleLog) -> None:
    log.facts({"annotated": 3, "problems": []})
    log.facts({"annotated": 4})
    assert cycle_row(lonely_service, KEY).facts == {"annotated": 4, "problems": []}


def test_a_cycle_says_what_it_waits_for_and_since_when(lonely_service: Service, log: CycleLog) -> None:
    log.facts({"annotated": 3})
    log.wait("Label Studio answered 500")
    first = cycle_row(lonely_service, KEY).facts["waiting"]
    log.wait("no answer from Label Studio")
    assert cycle_row(lonely_service, KEY).facts["waiting"] == {**first, "for": "no answer from Label Studio"}
    log.go_on()
    assert cycle_row(lonely_service, KEY).facts == {"annotated": 3}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its first element is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(cycle_log.time, "monotonic", lambda: now[0])
    return now


def _do_steps(log: CycleLog, clock: list[float], steps: range, *, seconds: float) -> None:
    for done in steps:
        clock[0] += seconds
        log.progress(done, 100)


def test_the_time_left_is_told_of_the_stage_that_runs(
    lonely_service: Service, log: CycleLog, clock: list[float]
) -> None:
    def told() -> str:
        ((cycle,),) = (project["cycles"] for project in overview(lonely_service))
        return str(cycle["time_left"])

    log.stage("training", total=100)
    assert told() == ""
    _do_steps(log, clock, range(1, 21), seconds=9.0)
    assert told() == "about 12 min"
    log.wait("Label Studio answered 500")
    assert told() == ""
    log.go_on()
    _do_steps(log, clock, range(21, 24), seconds=9.0)
    assert told() == "", "the pace is that of the time before the wait"
    _do_steps(log, clock, range(24, 41), seconds=9.0)
    assert told() == "about 9 min"
    log.stage("evaluating", total=100)
    assert told() == ""
    _do_steps(log, clock, range(1, 21), seconds=9.0)
    log.finish("failed", error="the loss is NaN")
    assert told() == ""
    assert "pace" not in cycle_row(lonely_service, KEY).facts


def test_the_time_left_goes_when_progress_stands_still(
    lonely_service: Service, log: CycleLog, clock: list[float]
) -> None:
    log.stage("training", total=100)
    _do_steps(log, clock, range(1, 21), seconds=2.0)
    with lonely_service.database.session() as session:
        row = session.get_one(CycleRow, (KEY, 1))
        row.facts = {**row.facts, "pace": {**row.facts["pace"], "at": "2025-01-02T03:04:05+00:00"}}
    (project,) = overview(lonely_service)
    assert project["cycles"][0]["time_left"] == ""
