"""Comparing what we know with a real Label Studio."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from ml_backend import inbox
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, ProjectRow, UsedTaskRow, unfinished_work
from ml_backend.errors import LabelConfigError, ProjectGoneError
from ml_backend.inbox import START_TRAINING
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_http import NotFoundError
from ml_backend.ls_types import Project
from ml_backend.reconcile import _plan_cycle, reconcile
from ml_backend.service import Service
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, polygon_result, raw_api
from tests.ml_backend.examples import grey_images, import_images, key_of, settings
from tests.scripted_server import says, scripted

pytestmark = pytest.mark.label_studio

BATCH = 2


@pytest.fixture
def service(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(settings(tmp_path, TSP_BATCH_SIZE=BATCH, **place))
    yield service
    service.close()


@pytest.fixture
def key(service: Service, project: Project) -> str:
    return key_of(service, project)


@pytest.fixture
def tasks(client: LabelStudioClient, project: Project) -> list[int]:
    return import_images(client, project, grey_images(5))


def annotate(client: LabelStudioClient, *tasks: int) -> None:
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)


def cycles(service: Service, key: str) -> list[CycleRow]:
    with service.database.session() as session:
        query = select(CycleRow).where(CycleRow.project_key == key).order_by(CycleRow.number)
        return list(session.scalars(query))


def problem(service: Service, key: str) -> str:
    with service.database.session() as session:
        return session.get_one(ProjectRow, key).problem


def set_finished(service: Service, key: str, number: int, *, minutes_ago: float) -> None:
    """As if the cycle had ended then."""
    with service.database.session() as session:
        ended = datetime.now(UTC) - timedelta(minutes=minutes_ago)
        session.get_one(CycleRow, (key, number)).finished_at = ended.isoformat(timespec="microseconds")


def finish(service: Service, key: str, number: int, used: list[int], *, status: str = "done") -> None:
    """A cycle that took a snapshot of these tasks is over."""
    with service.database.session() as session:
        session.add_all(UsedTaskRow(project_key=key, task_id=task, first_cycle=number) for task in used)
    CycleLog(service.database, key, number).finish(status)


def test_a_cycle_is_planned_once_for_each_batch_of_new_images(
    service: Service, client: LabelStudioClient, project: Project, key: str, tasks: list[int]
) -> None:
    annotate(client, tasks[0])
    client.skip(tasks[4])
    assert not reconcile(service, key).start
    annotate(client, tasks[0], tasks[1])  # a second annotation of the first image, and a second image
    assert reconcile(service, key).start
    assert reconcile(service, key).reason == "a cycle is running"
    (cycle,) = cycles(service, key)
    assert (cycle.number, cycle.status) == (1, "planned")
    assert cycle.reason == "2 newly annotated images (a batch is 2)"
    assert unfinished_work(service.database, key) == ("cycle", 1, None)

    finish(service, key, 1, tasks[:2])
    annotate(client, tasks[2])
    assert reconcile(service, key).reason == "1 of 2 images of the next batch are annotated"
    annotate(client, tasks[3])
    assert reconcile(service, key).start
    assert [cycle.number for cycle in cycles(service, key)] == [1, 2]
    with service.database.session() as session:
        row = session.get_one(ProjectRow, key)
    assert (row.title, row.annotated, row.new_annotated) == (project.title, 4, 2)
    assert row.checked_at > cycle.planned_at


def test_an_image_that_lost_its_annotation_does_not_count(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int], label_studio: LabelStudioServer
) -> None:
    annotate(client, tasks[0])
    gone = client.submit_annotation(tasks[1], result=[polygon_result()], lead_time_seconds=1)
    with raw_api(label_studio) as api:
        assert api.delete(f"/api/annotations/{gone}/").is_success
    assert not reconcile(service, key).start


def test_those_who_look_at_the_same_time_plan_one_cycle(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int]
) -> None:
    annotate(client, *tasks[:2])
    together = threading.Barrier(4)

    def look() -> None:
        together.wait()
        reconcile(service, key)

    with ThreadPoolExecutor(4) as pool:
        for looked in [pool.submit(look) for _ in range(4)]:
            looked.result()
    assert [cycle.number for cycle in cycles(service, key)] == [1]


def test_two_who_decided_on_the_same_facts_plan_one_cycle(service: Service, key: str) -> None:
    for reason in ("the first", "the second"):  # the threads above meet here only now and then
        _plan_cycle(service.database, key, 1, reason)
    assert [(cycle.number, cycle.reason) for cycle in cycles(service, key)] == [(1, "the first")]


def test_start_training_plans_a_cycle_at_once_and_waits_for_one_that_runs(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int]
) -> None:
    annotate(client, tasks[0])
    for action in ("ANNOTATION_CREATED", START_TRAINING, START_TRAINING):
        inbox.record(service.database, key, action)
    assert reconcile(service, key).reason == "asked for, with 1 newly annotated images"
    assert inbox.unhandled(service.database, key) == []

    for action in (START_TRAINING, "ANNOTATION_UPDATED"):
        inbox.record(service.database, key, action)
    assert not reconcile(service, key).start
    assert [action for _, action in inbox.unhandled(service.database, key)] == [START_TRAINING]
    finish(service, key, 1, tasks[:1])
    assert reconcile(service, key).start
    assert [cycle.reason for cycle in cycles(service, key)][1] == "asked for, with 0 newly annotated images"


def test_start_training_without_an_annotation_starts_nothing_and_that_is_told_until_there_is_one(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int]
) -> None:
    told = "training was asked for, but no image is annotated yet"
    inbox.record(service.database, key, START_TRAINING)
    assert reconcile(service, key).reason == told
    assert inbox.unhandled(service.database, key) == []
    assert not reconcile(service, key).start  # a later look
    assert problem(service, key) == told
    annotate(client, tasks[0])
    assert not reconcile(service, key).start
    assert problem(service, key) == ""
    assert cycles(service, key) == []


def test_a_batch_whose_cycle_failed_before_it_was_read_is_tried_again_with_growing_pauses(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int]
) -> None:
    annotate(client, *tasks[:2])
    for number, minutes in enumerate((5, 10, 20, 40, 60, 60), start=1):
        assert reconcile(service, key).start
        CycleLog(service.database, key, number).finish("failed", error="The disk answered with an error.")
        set_finished(service, key, number, minutes_ago=minutes - 1)
        assert not reconcile(service, key).start
        assert "the last cycle failed before it had read the annotations. The next one" in problem(service, key)
        set_finished(service, key, number, minutes_ago=minutes + 1)
    assert reconcile(service, key).start
    assert problem(service, key) == ""


def test_after_a_cycle_that_failed_at_once_start_training_is_heeded_at_once(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int]
) -> None:
    annotate(client, *tasks[:2])
    assert reconcile(service, key).start
    CycleLog(service.database, key, 1).finish("failed", error="The disk answered with an error.")
    assert not reconcile(service, key).start
    inbox.record(service.database, key, START_TRAINING)
    assert reconcile(service, key).start


def test_a_cycle_that_failed_with_its_snapshot_taken_does_not_hold_the_next_batch_up(
    service: Service, client: LabelStudioClient, key: str, tasks: list[int]
) -> None:
    annotate(client, *tasks[:2])
    assert reconcile(service, key).start
    CycleLog(service.database, key, 1).facts({"annotated": 2})
    finish(service, key, 1, tasks[:2], status="failed")
    annotate(client, *tasks[2:4])
    assert reconcile(service, key).start


@pytest.mark.parametrize(
    ("environment", "label_config", "told"),
    [
        pytest.param(
            {}, POLYGON_CONFIG.replace('value="$image"', 'valueList="$images"'), "shows a list of images", id="images"
        ),
        pytest.param(
            {"TSP_FROM_NAME": "lable"}, POLYGON_CONFIG, "found only: label; mend TSP_FROM_NAME", id="mistyped"
        ),
    ],
)
def test_a_configuration_that_no_cycle_can_work_with_is_told_before_one_is_planned(
    label_studio: LabelStudioServer, client: LabelStudioClient, tmp_path: Path,
    environment: dict[str, str], label_config: str, told: str,
) -> None:  # fmt: skip
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    project = client.create_project(title="refused", label_config=label_config)
    annotate(client, *client.import_tasks(project.id, [{"data": {"image": "a", "images": ["a"]}}] * BATCH))
    with closing(Service.connect(settings(tmp_path, TSP_BATCH_SIZE=BATCH, **place, **environment))) as service:
        key = key_of(service, project)
        inbox.record(service.database, key, START_TRAINING)
        with pytest.raises(LabelConfigError, match=told):
            reconcile(service, key)
        assert cycles(service, key) == []
        assert inbox.has_new(service.database, key)  # the wish is kept


def test_a_look_that_succeeds_clears_the_problem(service: Service, key: str) -> None:
    with service.database.session() as session:
        session.get_one(ProjectRow, key).problem = "Label Studio is away"
    reconcile(service, key)
    assert problem(service, key) == ""


def test_a_project_that_was_deleted_in_label_studio_is_named(
    service: Service, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    with raw_api(label_studio) as api:
        assert api.delete(f"/api/projects/{project.id}/").is_success
    with pytest.raises(ProjectGoneError, match=rf"project {project.id} is not in Label Studio any more"):
        reconcile(service, key)


def test_a_page_that_is_not_there_is_no_project_that_is_gone(service: Service, project: Project, key: str) -> None:
    page = says(404, b"<html>", content_type="text/html")
    with (
        scripted({f"/api/projects/{project.id}/": [page]}) as (proxy, _),
        pytest.raises(NotFoundError, match="answered 404: a page of HTML"),
    ):
        reconcile(replace(service, label_studio=proxy), key)
