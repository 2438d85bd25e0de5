"""The Label Studio client against a real Label Studio."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_backend import ls_client
from ml_backend.errors import LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, WEBHOOK_ACTIONS, LabelStudioClient, counted_annotations
from ml_backend.ls_types import Project
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, create_annotator, png_bytes, polygon_result, prediction, raw_api
from tests.scripted_server import says, scripted_server


@pytest.fixture(scope="module")
def colleague(label_studio: LabelStudioServer) -> Iterator[LabelStudioClient]:
    """Another annotator of the same organisation."""
    with LabelStudioClient(label_studio.url, create_annotator(label_studio, "colleague@example.com")) as client:
        yield client


# Projects and tasks


@pytest.mark.label_studio
def test_a_project_can_be_made_changed_and_found(client: LabelStudioClient) -> None:
    made = client.create_project(title="made by a test", label_config=POLYGON_CONFIG)
    changed = client.update_project(made.id, sampling=UNCERTAINTY_SAMPLING, maximum_annotations=2)
    assert (changed.sampling, changed.maximum_annotations, changed.model_version) == (UNCERTAINTY_SAMPLING, 2, "")
    assert changed in client.projects()
    assert made.uid == f"{made.id}.{int(made.created_at.timestamp())}"


@pytest.mark.label_studio
def test_a_project_that_is_not_there_is_an_error(client: LabelStudioClient) -> None:
    with pytest.raises(LabelStudioError, match="404"):
        client.project(999_999)
    with pytest.raises(LabelStudioError, match="404"):
        client.next_task(999_999)


@pytest.mark.label_studio
def test_tasks_come_in_pages_by_id(client: LabelStudioClient, project: Project) -> None:
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(2100)])
    tasks = list(client.tasks(project.id))
    assert [task.id for task in tasks] == sorted(ids)
    assert [task.data for task in tasks][:2] == [{"image": "/0.png"}, {"image": "/1.png"}]
    assert not any(task.is_annotated for task in tasks)
    assert [task.id for task in client.tasks(project.id, after_id=ids[2097])] == ids[2098:]
    assert client.count_tasks(project.id) == 2100


@pytest.mark.label_studio
def test_a_project_without_tasks_has_none(client: LabelStudioClient, project: Project) -> None:
    assert list(client.tasks(project.id)) == []
    assert client.annotated_task_ids(project.id) == frozenset()
    assert client.next_task(project.id) is None


@pytest.mark.label_studio
def test_tasks_that_come_and_go_during_the_listing_shift_nothing(
    client: LabelStudioClient, project: Project, label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ls_client, "_TASKS_A_PAGE", 4)
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(12)])
    listing = client.tasks(project.id)
    seen = [next(listing).id for _ in range(4)]
    with raw_api(label_studio) as api:
        for gone in (ids[0], ids[1], ids[5]):
            api.delete(f"/api/tasks/{gone}/").raise_for_status()
    late = client.import_tasks(project.id, [{"data": {"image": "/late.png"}}])
    assert seen + [task.id for task in listing] == [*ids[:5], *ids[6:], *late]


@pytest.mark.label_studio
def test_data_is_listed_as_it_was_imported(client: LabelStudioClient, project: Project) -> None:
    data = {"image": "s3://bucket/a b%20c.png", "note": "50 % ü"}
    client.import_tasks(project.id, [{"data": data}])
    assert [task.data for task in client.tasks(project.id)] == [data]


# What counts as annotated


def _annotated(client: LabelStudioClient, task_id: int) -> int:
    return client.submit_annotation(task_id, result=[polygon_result()], lead_time_seconds=1.0)


@pytest.mark.label_studio
def test_an_annotated_task_has_an_annotation_that_is_neither_skipped_nor_a_draft(
    client: LabelStudioClient, colleague: LabelStudioClient, project: Project, label_studio: LabelStudioServer
) -> None:
    names = ["nothing", "annotated", "empty", "skipped", "draft", "imported truth", "twice", "deleted",
             "skip and annotation", "back to draft", "skip taken back"]  # fmt: skip
    truth = [{"result": [polygon_result()]}]
    ids = client.import_tasks(
        project.id,
        [{"data": {"image": name}, "annotations": truth if name == "imported truth" else []} for name in names],
    )
    task = dict(zip(names, ids, strict=True))
    _annotated(client, task["annotated"])
    client.submit_annotation(task["empty"], result=[], lead_time_seconds=1.0)
    client.skip(task["skipped"])
    _annotated(client, task["twice"])
    _annotated(colleague, task["twice"])
    client.skip(task["skip and annotation"])
    _annotated(colleague, task["skip and annotation"])
    deleted, converted = _annotated(client, task["deleted"]), _annotated(client, task["back to draft"])
    taken_back = client.skip(task["skip taken back"])
    with raw_api(label_studio) as api:
        draft = {"result": [polygon_result()], "lead_time": 1}
        api.post(f"/api/tasks/{task['draft']}/drafts", json=draft).raise_for_status()
        api.delete(f"/api/annotations/{deleted}/").raise_for_status()
        api.post(f"/api/annotations/{converted}/convert-to-draft", json={}).raise_for_status()
        api.patch(f"/api/annotations/{taken_back}/", json={"was_cancelled": False}).raise_for_status()

    counted = {"annotated", "empty", "imported truth", "twice", "skip and annotation", "skip taken back"}
    expected = {task[name] for name in counted}
    assert {listed.data["image"] for listed in client.tasks(project.id) if listed.is_annotated} == counted
    assert client.annotated_task_ids(project.id) == expected
    assert client.count_annotated_tasks(project.id) == len(expected)
    exported = list(client.annotated_tasks(project.id, ids))
    assert [found["id"] for found in exported] == sorted(expected)
    counts = {found["data"]["image"]: len(counted_annotations(found)) for found in exported}
    assert counts == {name: 2 if name == "twice" else 1 for name in counted}


@pytest.mark.label_studio
def test_annotated_tasks_are_exported_in_chunks_and_whole(
    client: LabelStudioClient, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ls_client, "_IDS_AN_EXPORT", 2)
    truth = [{"result": [polygon_result()]}]
    tasks = [{"data": {"image": f"/{number}.png"}, "annotations": truth} for number in range(5)]
    ids = client.import_tasks(project.id, tasks)
    exported = list(client.annotated_tasks(project.id, [*ids, 999_999_999, ids[0]]))
    assert [task["id"] for task in exported] == ids
    assert exported[0]["data"] == {"image": "/0.png"}
    assert exported[0]["annotations"][0]["result"][0]["value"] == polygon_result()["value"]


@pytest.mark.label_studio
def test_an_edit_moves_the_time_of_the_task(
    client: LabelStudioClient, project: Project, label_studio: LabelStudioServer
) -> None:
    (task_id,) = client.import_tasks(project.id, [{"data": {"image": "/a.png"}}])

    def updated_at() -> Any:
        return next(client.tasks(project.id)).updated_at

    times = [updated_at()]
    annotation = _annotated(client, task_id)
    times.append(updated_at())
    with raw_api(label_studio) as api:
        api.patch(f"/api/annotations/{annotation}/", json={"result": []}).raise_for_status()
        times.append(updated_at())
        api.delete(f"/api/annotations/{annotation}/").raise_for_status()
        times.append(updated_at())
    assert times == sorted(set(times))


# Predictions and the queue


@pytest.mark.label_studio
def test_two_annotators_in_turn_get_the_lowest_scores_first_and_no_task_twice(
    client: LabelStudioClient, colleague: LabelStudioClient, project: Project
) -> None:
    client.update_project(project.id, sampling=UNCERTAINTY_SAMPLING)
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(10)])
    scores = [0.62, 0.11, 0.95, 0.34, 0.05, 0.71, 0.48, 0.23, 0.87, 0.59]
    predictions = [prediction(task, score=score) for task, score in zip(ids, scores, strict=True)]
    assert client.import_predictions(project.id, predictions) == 10
    client.set_model_version(project.id, "v1")

    served = []
    for annotators in [(client, colleague)] * 5:
        opened = [annotator.next_task(project.id) for annotator in annotators]  # both at the same time
        for annotator, task in zip(annotators, opened, strict=True):
            assert task is not None
            assert task["predictions"][0]["model_version"] == "v1"
            served.append(task["id"])
            _annotated(annotator, task["id"])
    by_score = [task for _, task in sorted(zip(scores, ids, strict=True))]
    assert served == by_score
    assert client.next_task(project.id) is None


@pytest.mark.label_studio
def test_label_studio_counts_invalid_predictions_out(client: LabelStudioClient, project: Project) -> None:
    ids = client.import_tasks(project.id, [{"data": {"image": "/a.png"}}, {"data": {"image": "/b.png"}}])
    sent = [prediction(ids[0], score=1.5), prediction(ids[1], score=0.5)]
    assert client.import_predictions(project.id, sent) == 1
    assert client.predicted_task_ids(project.id, "v1") == {ids[1]}


@pytest.mark.label_studio
def test_a_prediction_of_a_foreign_task_is_refused_with_its_request(
    client: LabelStudioClient, project: Project
) -> None:
    (task_id,) = client.import_tasks(project.id, [{"data": {"image": "/a.png"}}])
    with pytest.raises(LabelStudioError, match=r"400.*invalid"):
        client.import_predictions(project.id, [prediction(task_id, score=0.5), prediction(999_999_999, score=0.5)])
    assert client.model_versions(project.id) == {}


@pytest.mark.label_studio
def test_a_large_import_is_split_by_bytes(client: LabelStudioClient, project: Project) -> None:
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(7)])
    sent = [prediction(task, score=0.5) for task in ids]
    assert client.import_predictions(project.id, sent, max_request_bytes=2 * len(json.dumps(sent[0]))) == 7
    assert client.predicted_task_ids(project.id, "v1") == set(ids)


@pytest.mark.label_studio
def test_halves_are_sent_where_a_proxy_takes_no_large_request(
    client: LabelStudioClient, project: Project, label_studio: LabelStudioServer
) -> None:
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(7)])
    sent = [prediction(task, score=0.5) for task in ids]
    largest = 2 * len(json.dumps(sent[0]))
    sizes: list[int] = []

    def refuse_large(call: Call) -> Fault | None:
        sizes.append(len(call.body))
        return Fault(kind="status", status=413) if len(call.body) > largest else None

    with (
        FaultProxy(label_studio.url, refuse_large) as proxy,
        LabelStudioClient(proxy.url, label_studio.token) as behind,
    ):
        assert behind.import_predictions(project.id, sent) == 7
        largest = 10
        with pytest.raises(LabelStudioError, match=r"413 to \d+ bytes: let the proxy"):
            behind.import_predictions(project.id, sent[:1])
    assert max(sizes) > 4 * len(json.dumps(sent[0]))
    assert client.model_versions(project.id) == {"v1": 7}
    assert client.predicted_task_ids(project.id, "v1") == set(ids)


@pytest.mark.label_studio
def test_after_a_request_that_broke_off_the_next_are_shorter(
    client: LabelStudioClient, project: Project, label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(8)])
    sent = [prediction(task, score=0.5) for task in ids]
    one = len(json.dumps(sent[0]))
    monkeypatch.setattr(ls_client, "_BYTES_AN_IMPORT", 20 * one)
    monkeypatch.setattr(ls_client, "_LEAST_BYTES_AN_IMPORT", one)
    monkeypatch.setattr(ls_client, "_QUICKLY_SECONDS", 0.0)

    def give_up_on_large(call: Call) -> Fault | None:
        return Fault(kind="status", status=504) if len(call.body) > 3 * one else None

    with (
        FaultProxy(label_studio.url, give_up_on_large) as proxy,
        LabelStudioClient(proxy.url, label_studio.token) as behind,
    ):
        with pytest.raises(LabelStudioUnavailableError):
            behind.import_predictions(project.id, sent)
        assert behind.import_predictions(project.id, sent) == 8
    assert client.predicted_task_ids(project.id, "v1") == set(ids)


def test_the_size_of_imports_follows_what_became_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls_client, "_BYTES_AN_IMPORT", 160)
    monkeypatch.setattr(ls_client, "_LEAST_BYTES_AN_IMPORT", 10)
    size = ls_client._ImportSize()
    size.went_well(160)
    assert size.bytes == 160
    size.broke_off(160, 300.0)
    sizes = [size.bytes]
    for sent in (40, 10, 70, 80):
        size.went_well(sent)
        sizes.append(size.bytes)
    assert sizes == [40, 80, 80, 80, 80]  # not what has broken off
    size.refused(80)
    size.went_well(40)
    assert size.bytes == 40
    for _ in range(5):
        size.broke_off(size.bytes, 300.0)
    assert size.bytes == 10


def test_imports_that_fail_at_once_get_shorter_only_when_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls_client, "_BYTES_AN_IMPORT", 160)
    monkeypatch.setattr(ls_client, "_LEAST_BYTES_AN_IMPORT", 10)
    size = ls_client._ImportSize()
    for _ in range(3):
        size.broke_off(160, 0.1)
        size.went_well(160)
        assert size.bytes == 160
    size.broke_off(160, 0.1)
    size.broke_off(160, 0.1)
    assert size.bytes == 40
    size.went_well(40)
    size.went_well(80)
    assert size.bytes == 160  # nothing took long


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_is_no_prediction(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(ls_client._json_parts([prediction(7, score=value)], max_bytes=lambda: 1000))


def test_words_that_look_like_numbers_are_sent_as_they_are() -> None:
    item = {"task": 1, "result": ["NaN", "-Infinity", "ä", 1e-7, 12.125, None, True]}
    ((part,),) = ls_client._json_parts([item], max_bytes=lambda: 1000)
    assert json.loads(part) == item


@pytest.mark.parametrize("max_bytes", [20, 21, 22, 50, 1000])
def test_no_request_is_longer_than_allowed_and_nothing_is_lost(max_bytes: int) -> None:
    items = [{"a": number} for number in range(20)]
    bodies = [ls_client._json_array(parts) for parts in ls_client._json_parts(items, max_bytes=lambda: max_bytes)]
    assert max(map(len, bodies)) <= max_bytes
    assert [item for body in bodies for item in json.loads(body)] == items


def test_a_prediction_that_is_too_long_for_any_request_is_named() -> None:
    with pytest.raises(LabelStudioError, match=r"prediction of task 7 is .* bytes long"):
        list(ls_client._json_parts([prediction(7, score=0.5)], max_bytes=lambda: 100))


@pytest.mark.label_studio
def test_predicted_tasks_are_those_of_exactly_that_version(client: LabelStudioClient, project: Project) -> None:
    ids = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(4)])
    versions = [(0, "v1"), (0, "v10"), (1, "v10"), (2, "v1"), (2, "v2, v3")]
    client.import_predictions(project.id, [prediction(ids[task], score=0.5, version=v) for task, v in versions])
    assert client.predicted_task_ids(project.id, "v1") == {ids[0], ids[2]}
    assert client.predicted_task_ids(project.id, "v10") == {ids[0], ids[1]}
    assert client.predicted_task_ids(project.id, "v") == frozenset()
    assert client.model_versions(project.id) == {"v1": 2, "v10": 2, "v2, v3": 1}


@pytest.mark.label_studio
def test_a_task_with_very_many_versions_is_still_found(client: LabelStudioClient, project: Project) -> None:
    (task_id,) = client.import_tasks(project.id, [{"data": {"image": "/a.png"}}])
    versions = [f"version-{number:03d}-with-a-long-name" for number in range(40)]
    client.import_predictions(project.id, [prediction(task_id, score=0.5, version=version) for version in versions])
    assert all(client.predicted_task_ids(project.id, version) == {task_id} for version in versions[::13])
    assert client.predicted_task_ids(project.id, "version-001") == frozenset()


@pytest.mark.label_studio
def test_a_version_without_predictions_cannot_be_shown(client: LabelStudioClient, project: Project) -> None:
    with pytest.raises(LabelStudioError, match=r"400.*Model version doesn't exist"):
        client.set_model_version(project.id, "v1")


@pytest.mark.label_studio
def test_deleting_an_old_version_leaves_the_shown_one(
    client: LabelStudioClient, project: Project, stub_backend: str
) -> None:
    (task_id,) = client.import_tasks(project.id, [{"data": {"image": "/a.png"}}])
    client.import_predictions(project.id, [prediction(task_id, score=0.5, version=v) for v in ("v1", "v2")])
    client.set_model_version(project.id, "v2")
    # Label Studio clears the project's version when a backend's title equals it, whichever version goes.
    client.connect_backend(project.id, url=stub_backend, title="v2")
    client.delete_model_version(project.id, "v1")
    assert client.model_versions(project.id) == {"v2": 1}
    assert client.project(project.id).model_version == "v2"


# Backend and webhook


@pytest.fixture
def stub_backend() -> Iterator[str]:
    answers = {"/health": [says(200, {"status": "UP"})], "/setup": [says(200, {"model_version": "v1"})]}
    with scripted_server({**answers, "/webhook": [says(200)]}) as (url, _):
        yield url


@pytest.mark.label_studio
def test_connecting_twice_leaves_one_backend_and_one_webhook(
    client: LabelStudioClient, project: Project, stub_backend: str, label_studio: LabelStudioServer
) -> None:
    hook_url = f"{stub_backend}/webhook"
    for secret in ("first", "second"):
        backend = client.connect_backend(project.id, url=stub_backend, title="TSP", basic_auth=("me", "secret"))
        hook = client.create_webhook(project.id, url=hook_url, headers={"Authorization": secret})
        assert (backend.state, backend.title, backend.url) == ("CO", "TSP", stub_backend)
        assert (hook.url, hook.is_active, hook.sends_all_actions) == (hook_url, True, True)
        assert set(hook.actions) == set(WEBHOOK_ACTIONS)
    assert len(client.ml_backends(project.id)) == 1
    assert len(client.webhooks(project.id)) == 1
    with raw_api(label_studio) as api:
        assert api.get(f"/api/webhooks/{hook.id}/").json()["headers"] == {"Authorization": "second"}


@pytest.mark.label_studio
def test_surplus_webhooks_to_the_same_address_are_removed(
    client: LabelStudioClient, project: Project, label_studio: LabelStudioServer
) -> None:
    url = "http://127.0.0.1:9/webhook"
    with raw_api(label_studio) as api:
        for _ in range(3):
            api.post("/api/webhooks/", json={"project": project.id, "url": url}).raise_for_status()
        api.post("/api/webhooks/", json={"project": project.id, "url": f"{url}/other"}).raise_for_status()
    client.create_webhook(project.id, url=url, headers={})
    assert sorted(hook.url for hook in client.webhooks(project.id)) == [url, f"{url}/other"]


@pytest.mark.label_studio
def test_a_backend_that_is_down_or_refuses_the_project_is_an_error_with_the_reason(
    client: LabelStudioClient, project: Project
) -> None:
    answers = {"/health": [says(200)], "/setup": [says(303, location="/refused/no-PolygonLabels-tag")]}
    with (
        scripted_server({**answers, "/refused/no-PolygonLabels-tag": [says(400)]}) as (url, _),
        pytest.raises(LabelStudioError, match=r"400.*refused/no-PolygonLabels-tag"),
    ):
        client.connect_backend(project.id, url=url, title="TSP")
    with pytest.raises(LabelStudioError, match="Can't connect to ML backend"):
        client.connect_backend(project.id, url=url, title="TSP")
    assert client.ml_backends(project.id) == []


# Files


@pytest.mark.label_studio
def test_uploaded_images_become_tasks_and_can_be_downloaded(
    client: LabelStudioClient, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ls_client, "_FILES_AN_UPLOAD", 2)
    paths = [tmp_path / f"image {number}.png" for number in range(5)]
    for shade, path in enumerate(paths):
        path.write_bytes(png_bytes(shade=shade))
    ids = client.import_files(project.id, paths)
    tasks = list(client.tasks(project.id))
    assert [task.id for task in tasks] == ids
    for task, path in zip(tasks, paths, strict=True):
        assert task.data["image"].startswith("/data/upload/")
        with client.download(task.data["image"]) as response:
            assert b"".join(response.iter_bytes()) == path.read_bytes()


@pytest.mark.label_studio
@pytest.mark.usefixtures("impatient")
def test_an_upload_that_is_gone_is_no_outage(client: LabelStudioClient) -> None:
    with pytest.raises(LabelStudioError) as missing, client.download("/data/upload/1/gone.png"):
        pass
    assert not isinstance(missing.value, LabelStudioUnavailableError)


def test_nothing_is_downloaded_from_elsewhere() -> None:
    with (
        LabelStudioClient("http://ls:8080", "t" * 40) as client,
        pytest.raises(LabelStudioError, match="expected an address on http://ls:8080"),
        client.download("http://elsewhere/x.png?signature=1"),
    ):
        pass
