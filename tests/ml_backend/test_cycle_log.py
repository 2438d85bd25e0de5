"""What a cycle writes about itself."""

import pytest

from ml_backend import cycle_log
from ml_backend.cycle_log import CycleLog
from ml_backend.inbox import ProjectName, remember_project
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
