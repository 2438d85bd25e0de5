"""Predictions and queue of a real Label Studio."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ml_backend.app import create_app
from ml_backend.cycle_log import CycleLog
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.pool import read_scores, score_pool
from ml_backend.publish import import_missing, publish
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from model.empty_images import EmptyImagePolicy
from scripts.fault_proxy import Call, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from scripts.served_app import served
from tests.label_studio import polygon_result, prediction, raw_api
from tests.ml_backend.examples import (
    UNREADABLE,
    VERSION,
    add_version,
    begin_cycle,
    grey_images,
    import_images,
    key_of,
    served_order,
    settings,
    sha256,
)

SECOND = "tsp-2-00000000"
POOL = f"{VERSION}.pool"
NEVER_VALIDATION = sha256(grey_images(1)[0])


@pytest.fixture
def key(service: Service, project: Project) -> str:
    key = key_of(service, project)
    for version in (VERSION, SECOND):
        add_version(service, key, version)
    return key


def write_batch(service: Service, key: str, tasks: Sequence[int], version: str = VERSION) -> None:
    """What a strategy that chooses a set would have frozen."""
    service.batch_file(key, version).write_text(json.dumps({"tasks": list(tasks)}))


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
def test_tasks_are_only_listed_when_the_counts_do_not_add_up(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = import_images(client, project, grey_images(3))
    paths: list[str] = []

    def look(call: Call) -> None:
        paths.append(call.path.partition("?")[0])

    with FaultProxy(label_studio.url, look) as proxy:
        environment = {"LABEL_STUDIO_URL": proxy.url, "LABEL_STUDIO_API_KEY": label_studio.token}
        service = Service.connect(settings(tmp_path, **environment))
        key = key_of(service, project)
        add_version(service, key)
        write_scores(service, key, [scored(task, 0.5) for task in tasks])
        publish(service, key, VERSION, begin_cycle(service, key))
        assert "/api/tasks/" not in paths
        client.import_predictions(project.id, [prediction(tasks[0], score=0.5, version=VERSION)])
        assert import_missing(service, key, VERSION) == 3
        assert "/api/tasks/" in paths
        service.close()
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


@pytest.mark.label_studio
def test_what_comes_after_nothing_was_left_is_shown(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    (first,) = import_images(client, project, grey_images(1))
    write_scores(service, key, [scored(first, 0.5)])
    publish(service, key, VERSION, begin_cycle(service, key))
    client.submit_annotation(first, result=[polygon_result()], lead_time_seconds=1)
    write_scores(service, key, [], SECOND)
    publish(service, key, SECOND, begin_cycle(service, key, 2))
    (later,) = import_images(client, project, grey_images(2)[1:])
    write_scores(service, key, [scored(later, 0.5)], SECOND)
    import_missing(service, key, SECOND)
    for number in (1, 2):
        CycleLog(service.database, key, number).finish("done")
    reconcile(service, key)
    assert client.project(project.id).model_version == SECOND


@pytest.mark.label_studio
def test_a_batch_is_served_in_its_order_before_the_rest_of_the_pool(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, grey_images(12))
    values = [0.9, 0.1, None, 0.55, 0.4, 0.8, 0.0, 0.3, 0.2, 0.6, 0.7, 0.5]
    write_scores(service, key, [scored(task, score) for task, score in zip(tasks, values, strict=True)])
    batch = [tasks[i] for i in (5, 0, 2, 9)]
    write_batch(service, key, batch)
    publish(service, key, VERSION, begin_cycle(service, key))
    assert client.model_versions(project.id) == {VERSION: 4, POOL: 8}
    assert client.project(project.id).model_version == VERSION
    found = {task: stored(label_studio, task) for task in tasks}
    assert all(len(predictions) == 1 for predictions in found.values())
    assert [found[task][0]["score"] for task in batch] == [0.0, 0.25, 0.5, 0.75]
    for task, score in zip(tasks, values, strict=True):
        (stored_prediction,) = found[task]
        assert len(stored_prediction["result"]) == (score is not None)
        if task not in batch:  # people can still sort the pool
            assert (stored_prediction["model_version"], stored_prediction["score"]) == (POOL, score)
    order = served_order(client, project)
    assert order[:4] == batch
    assert set(order[4:]) == set(tasks) - set(batch)


@pytest.mark.label_studio
@pytest.mark.parametrize("lost", [VERSION, POOL, None], ids=["half of the batch", "half of the rest", "the switch"])
def test_publishing_a_batch_goes_on_wherever_it_broke_off(
    service: Service,
    client: LabelStudioClient,
    project: Project,
    key: str,
    label_studio: LabelStudioServer,
    lost: str | None,
) -> None:
    tasks = import_images(client, project, grey_images(6))
    batch, rest = tasks[3:1:-1], [*tasks[:2], *tasks[4:]]
    write_scores(service, key, [scored(task, 0.5) for task in tasks])
    write_batch(service, key, batch)
    arrived = {VERSION: [*batch[:1], *rest], POOL: [*batch, *rest[:2]], None: tasks}[lost]
    sent = [prediction(t, score=0.5 * batch.index(t) if t in batch else 0.5,
                       version=VERSION if t in batch else POOL) for t in arrived]  # fmt: skip
    client.import_predictions(project.id, sent)
    log = begin_cycle(service, key)
    for _ in ("goes on", "a repetition changes nothing"):
        publish(service, key, VERSION, log)
        assert [len(stored(label_studio, task)) for task in tasks] == [1] * 6
        assert client.model_versions(project.id) == {VERSION: 2, POOL: 4}
    assert served_order(client, project)[:2] == batch


@pytest.mark.label_studio
def test_a_prediction_that_somebody_retrieves_by_hand_changes_neither_the_order_nor_what_is_shown(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, grey_images(6))
    batch, pool = tasks[3:1:-1], [*tasks[:2], *tasks[4:]]
    write_scores(service, key, [scored(task, 0.5) for task in tasks])
    write_batch(service, key, batch)
    publish(service, key, VERSION, begin_cycle(service, key))
    before = {task: [p["id"] for p in stored(label_studio, task)] for task in pool}
    chosen = {"selectedItems": {"all": False, "included": [pool[0]]}}
    with served(create_app(service.settings)) as url, raw_api(label_studio) as api:
        client.connect_backend(project.id, url=url, title="TSP")
        action = {"id": "retrieve_tasks_predictions", "project": project.id}
        assert api.post("/api/dm/actions", params=action, json=chosen).is_success
    assert [p["model_version"] for p in stored(label_studio, pool[0])].count(VERSION) == 1
    assert client.model_versions(project.id) == {VERSION: 3, POOL: 4}
    assert import_missing(service, key, VERSION) == 2  # the batch alone
    assert client.model_versions(project.id) == {VERSION: 2, POOL: 4}
    assert {task: [p["id"] for p in stored(label_studio, task)] for task in pool} == before
    assert client.project(project.id).model_version == VERSION
    assert served_order(client, project)[:2] == batch


@pytest.mark.label_studio
@pytest.mark.parametrize("twice", [VERSION, POOL], ids=["the batch", "the rest"])
def test_what_was_imported_twice_is_imported_anew_and_stays_what_is_shown(
    service: Service,
    client: LabelStudioClient,
    project: Project,
    key: str,
    label_studio: LabelStudioServer,
    twice: str,
) -> None:
    tasks = import_images(client, project, grey_images(5))
    write_scores(service, key, [scored(task, 0.5) for task in tasks])
    write_batch(service, key, tasks[1::-1])
    publish(service, key, VERSION, begin_cycle(service, key))
    again = {VERSION: tasks[0], POOL: tasks[2]}[twice]
    client.import_predictions(project.id, [prediction(again, score=0.1, version=twice)])
    assert import_missing(service, key, VERSION) == {VERSION: 2, POOL: 3}[twice]
    assert [[p["model_version"] for p in stored(label_studio, task)] for task in tasks] == [
        [VERSION], [VERSION], [POOL], [POOL], [POOL]
    ]  # fmt: skip
    assert client.project(project.id).model_version == VERSION
    assert served_order(client, project)[:2] == tasks[1::-1]


@pytest.mark.label_studio
def test_predictions_of_tasks_that_were_never_scored_are_no_reason_to_import_anew(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    scored_task, other = import_images(client, project, grey_images(2))
    write_scores(service, key, [scored(scored_task, 0.5)])
    publish(service, key, VERSION, begin_cycle(service, key))
    client.import_predictions(project.id, [prediction(other, score=0.1, version=VERSION)])
    before = stored(label_studio, scored_task)
    assert import_missing(service, key, VERSION) == 0
    assert stored(label_studio, scored_task) == before
    assert client.model_versions(project.id) == {VERSION: 2}


@pytest.mark.label_studio
def test_when_all_tasks_of_a_batch_were_deleted_the_scores_order_the_others(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, grey_images(5))
    write_scores(service, key, [scored(task, 0.5) for task in tasks])
    publish(service, key, VERSION, begin_cycle(service, key))
    others = {tasks[2]: 0.7, tasks[3]: 0.3, tasks[4]: 0.5}
    write_scores(service, key, [scored(task, others.get(task, 0.1)) for task in tasks], SECOND)
    write_batch(service, key, tasks[:2], SECOND)
    with raw_api(label_studio) as api:
        for task in tasks[:2]:
            assert api.delete(f"/api/tasks/{task}/").is_success
    log = begin_cycle(service, key, 2)
    for _ in ("once", "a repetition changes nothing"):
        publish(service, key, SECOND, log)
        assert client.model_versions(project.id) == {f"{SECOND}.1": 3}
        assert client.project(project.id).model_version == f"{SECOND}.1"
        assert service.registry.active(key) == SECOND
    assert served_order(client, project) == sorted(others, key=lambda task: others[task])


@pytest.mark.label_studio
def test_tasks_that_come_after_a_batch_was_chosen_stand_behind_it(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    images = grey_images(5)
    first = import_images(client, project, images[:3])
    write_scores(service, key, [scored(task, 0.5) for task in first])
    write_batch(service, key, first[:2])
    publish(service, key, VERSION, begin_cycle(service, key))
    late = import_images(client, project, images[3:])
    assert score_pool(service, key, VERSION) == 2
    assert import_missing(service, key, VERSION) == 2
    assert client.predicted_task_ids(project.id, POOL) == {first[2], *late}
    assert served_order(client, project)[:2] == first[:2]


@pytest.mark.label_studio
def test_the_next_version_removes_the_pool_of_its_predecessor_too(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    tasks = import_images(client, project, grey_images(4))
    client.import_predictions(project.id, [prediction(tasks[0], score=0.5, version="theirs.pool")])
    for version in (VERSION, SECOND):
        write_scores(service, key, [scored(task, 0.5) for task in tasks], version)
        write_batch(service, key, tasks[:1], version)
    publish(service, key, VERSION, begin_cycle(service, key))
    publish(service, key, SECOND, begin_cycle(service, key, 2))
    assert client.model_versions(project.id) == {"theirs.pool": 1, SECOND: 1, f"{SECOND}.pool": 3}
    assert client.project(project.id).model_version == SECOND


@pytest.mark.label_studio
def test_a_refused_prediction_outside_of_the_batch_is_replaced_under_the_name_of_the_pool(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    tasks = import_images(client, project, grey_images(2))
    region = polygon_result(label="unknown", score=0.5)
    write_scores(service, key, [scored(tasks[0], 0.5), scored(tasks[1], 0.2, result=[region])])
    write_batch(service, key, tasks[:1])
    publish(service, key, VERSION, begin_cycle(service, key))
    (replaced,) = stored(label_studio, tasks[1])
    assert (replaced["model_version"], replaced["score"], replaced["result"]) == (POOL, 0.2, [])
