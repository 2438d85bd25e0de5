"""Comparing what we know with a real Label Studio."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select

from ml_backend import inbox
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, ProjectRow, UsedTaskRow, unfinished_work
from ml_backend.errors import LabelStudioError
from ml_backend.inbox import START_TRAINING
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.reconcile import _plan_cycle, reconcile
from ml_backend.service import Service
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result, raw_api
from tests.ml_backend.examples import grey_images, import_images, key_of, settings

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


def finish(service: Service, key: str, number: int, used: list[int]) -> None:
    """A cycle that took a snapshot of these tasks is over."""
    with service.database.session() as session:
        session.add_all(UsedTaskRow(project_key=key, task_id=task, first_cycle=number) for task in used)
    CycleLog(service.database, key, number).finish("done")


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


def test_start_training_without_an_annotation_starts_nothing(service: Service, key: str, tasks: list[int]) -> None:
    inbox.record(service.database, key, START_TRAINING)
    assert reconcile(service, key).reason == "training was asked for, but no image is annotated yet"
    assert inbox.unhandled(service.database, key) == []
    assert cycles(service, key) == []


def test_a_look_that_succeeds_clears_the_problem(service: Service, key: str) -> None:
    with service.database.session() as session:
        session.get_one(ProjectRow, key).problem = "Label Studio is away"
    reconcile(service, key)
    with service.database.session() as session:
        assert session.get_one(ProjectRow, key).problem == ""


def test_a_project_that_was_deleted_in_label_studio_is_named(
    service: Service, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    with raw_api(label_studio) as api:
        assert api.delete(f"/api/projects/{project.id}/").is_success
    with pytest.raises(LabelStudioError, match=rf"/api/projects/{project.id}.* answered 404: .*No Project matches"):
        reconcile(service, key)
