"""Predictions and queue of a real Label Studio."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient, Project
from ml_backend.order import queue_score
from ml_backend.pool import read_scores, score_pool
from ml_backend.publish import import_missing, publish
from ml_backend.service import Service
from model.tsp import EmptyImagePolicy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result, prediction, raw_api
from tests.ml_backend.examples import (
    UNREADABLE,
    VALIDATION_FRACTION,
    VERSION,
    add_version,
    begin_cycle,
    grey_images,
    import_images,
    key_of,
    sha256,
)

SECOND = "tsp-2-00000000"
NEVER_VALIDATION = sha256(grey_images(1)[0])
ALWAYS_VALIDATION = sha256(grey_images(1, validation=True)[0])


@pytest.fixture
def key(service: Service, project: Project) -> str:
    key = key_of(service, project)
    for version in (VERSION, SECOND):
        add_version(service, key, version)
    return key


def write_scores(service: Service, key: str, lines: Sequence[dict[str, Any]], version: str = VERSION) -> None:
    """What scoring would have found."""
    path = service.scores_file(key, version)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def scored(task: int, score: float | None, *, image: str = NEVER_VALIDATION, **more: Any) -> dict[str, Any]:
    result = [] if score is None else [polygon_result(score=0.5)]
    return {"task": task, "image": image, "score": score, "result": result, "pseudo": None, **more}


def stored(server: LabelStudioServer, task: int) -> list[dict[str, Any]]:
    """The predictions that Label Studio holds of a task."""
    with raw_api(server) as api:
        return list(api.get("/api/predictions/", params={"task": task}).json())


def served_order(client: LabelStudioClient, project: Project) -> list[int]:
    """The tasks in the order in which an annotator gets them."""
    order = []
    while (task := client.next_task(project.id)) is not None:
        order.append(task["id"])
        client.submit_annotation(task["id"], result=[], lead_time_seconds=1)
    return order


@pytest.mark.parametrize(
    ("line", "score"),
    [
        pytest.param(scored(1, 0.25), 0.25, id="its S"),
        pytest.param(scored(1, 0.0), 0.0, id="the most uncertain"),
        pytest.param(scored(1, None), 0.6, id="nothing found"),
        pytest.param(scored(1, 0.25, image=ALWAYS_VALIDATION), 1.0, id="validation"),
        pytest.param(scored(1, None, image=ALWAYS_VALIDATION), 1.0, id="validation with nothing found"),
        pytest.param({"task": 1, "problem": "broken"}, 1.0, id="unreadable"),
    ],
)
def test_the_queue_is_in_order_of_s_and_what_cannot_teach_comes_last(line: dict[str, Any], score: float) -> None:
    assert queue_score(line, validation_fraction=VALIDATION_FRACTION, when_empty=0.6) == score


@pytest.mark.label_studio
def test_publishing_gives_each_task_one_prediction_and_an_order(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, [*grey_images(4), *grey_images(1, validation=True), UNREADABLE])
    score_pool(service, key, VERSION)
    publish(service, key, VERSION, begin_cycle(service, key))
    by_task = {task: stored(label_studio, task) for task in tasks}
    assert {task: [p["model_version"] for p in found] for task, found in by_task.items()} == {
        task: [VERSION] for task in tasks
    }
    lines = {line["task"]: line for line in read_scores(service.scores_file(key, VERSION))}
    for task in tasks[:4]:
        assert by_task[task][0]["score"] == pytest.approx(lines[task]["score"])
        assert len(by_task[task][0]["result"]) == len(lines[task]["result"])
    assert [by_task[task][0]["score"] for task in tasks[4:]] == [1.0, 1.0]
    shown = client.project(project.id)
    assert (shown.model_version, shown.sampling, shown.shows_predictions) == (VERSION, UNCERTAINTY_SAMPLING, True)
    assert service.registry.active(key) == VERSION

    order = served_order(client, project)
    assert order[:4] == sorted(tasks[:4], key=lambda task: lines[task]["score"])
    assert set(order[4:]) == set(tasks[4:])


@pytest.mark.label_studio
def test_images_without_detections_stand_where_the_policy_says(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    assert service.settings.empty_policy is EmptyImagePolicy.MEDIAN
    tasks = import_images(client, project, grey_images(5))
    values = [0.9, 0.1, None, 0.55, 0.4]  # the median of those with detections is 0.475
    write_scores(service, key, [scored(task, score) for task, score in zip(tasks, values, strict=True)])
    publish(service, key, VERSION, begin_cycle(service, key))
    assert served_order(client, project) == [tasks[i] for i in (1, 4, 2, 3, 0)]


@pytest.mark.label_studio
def test_the_next_version_replaces_its_predecessors_and_leaves_those_of_others(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    tasks = import_images(client, project, grey_images(2))
    client.import_predictions(project.id, [prediction(task, score=0.5, version="theirs") for task in tasks])
    for version in (VERSION, SECOND):
        write_scores(service, key, [scored(task, 0.5) for task in tasks], version)
    publish(service, key, VERSION, begin_cycle(service, key))
    assert client.model_versions(project.id) == {"theirs": 2, VERSION: 2}
    log = begin_cycle(service, key, 2)
    for _ in ("once", "a repetition changes nothing"):
        publish(service, key, SECOND, log)
        assert client.model_versions(project.id) == {"theirs": 2, SECOND: 2}
        assert client.project(project.id).model_version == SECOND
        assert service.registry.active(key) == SECOND


@pytest.mark.label_studio
def test_importing_twice_imports_once(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, grey_images(3))
    write_scores(service, key, [scored(task, 0.5) for task in tasks[:2]])
    assert import_missing(service, key, VERSION) == 2
    assert import_missing(service, key, VERSION) == 0
    write_scores(service, key, [scored(task, 0.5) for task in tasks])
    assert import_missing(service, key, VERSION) == 1  # as after an import that broke off
    assert [len(stored(label_studio, task)) for task in tasks] == [1, 1, 1]


@pytest.mark.label_studio
def test_tasks_that_were_deleted_after_scoring_are_left_out(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, grey_images(3))
    write_scores(service, key, [scored(task, 0.5) for task in tasks])
    with raw_api(label_studio) as api:
        assert api.delete(f"/api/tasks/{tasks[1]}/").is_success
    assert import_missing(service, key, VERSION) == 2
    assert client.model_versions(project.id) == {VERSION: 2}


@pytest.mark.label_studio
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param({"polygonlabels": ["unknown"]}, id="an unknown label"),
        pytest.param({"points": [[10, 10], [60, 15], [40, 170]]}, id="a point outside"),
    ],
)
def test_a_prediction_that_label_studio_refuses_is_replaced_by_an_empty_one(
    service: Service,
    client: LabelStudioClient,
    project: Project,
    key: str,
    label_studio: LabelStudioServer,
    damage: dict[str, Any],
) -> None:
    tasks = import_images(client, project, grey_images(3))
    region = polygon_result(score=0.5)
    refused = scored(tasks[1], 0.2, result=[{**region, "value": {**region["value"], **damage}}])
    write_scores(service, key, [scored(tasks[0], 0.5), refused, scored(tasks[2], 0.6)])
    publish(service, key, VERSION, begin_cycle(service, key))
    found = [stored(label_studio, task) for task in tasks]
    assert [len(predictions) for predictions in found] == [1, 1, 1]
    assert [len(predictions[0]["result"]) for predictions in found] == [1, 0, 1]
    assert served_order(client, project) == [tasks[1], tasks[0], tasks[2]]  # by its own score all the same


@pytest.mark.label_studio
@pytest.mark.parametrize("old", [(), (VERSION,)], ids=["the first version", "a later version"])
def test_publishing_with_nothing_left_to_label_makes_the_version_active(
    service: Service, client: LabelStudioClient, project: Project, key: str, old: tuple[str, ...]
) -> None:
    (task,) = import_images(client, project, grey_images(1))
    for version in old:
        write_scores(service, key, [scored(task, 0.5)], version)
        publish(service, key, version, begin_cycle(service, key))
    client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    assert score_pool(service, key, SECOND) == 0
    publish(service, key, SECOND, begin_cycle(service, key, 2))
    assert service.registry.active(key) == SECOND
    assert client.project(project.id).sampling == UNCERTAINTY_SAMPLING
    assert Counter(client.model_versions(project.id)) == Counter(old)  # nothing replaces them
