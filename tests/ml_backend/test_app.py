"""The web process: in this process with Label Studio away, and asked by a real Label Studio."""

import base64
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient

from ml_backend import inbox, ls_http
from ml_backend.app import create_app
from ml_backend.db import CycleRow, ProjectRow
from ml_backend.errors import LabelStudioError
from ml_backend.inbox import START_TRAINING, ProjectName
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.service import Service
from model.evaluate import Evaluation
from model.geometry import is_simple_polygon
from scripts.label_studio_server import LabelStudioServer
from scripts.served_app import served
from tests.label_studio import POLYGON_CONFIG, polygon_result, raw_api
from tests.ml_backend.examples import (
    KEY,
    UID,
    UNREADABLE,
    VERSION,
    add_version,
    data_uri,
    grey_images,
    import_images,
    locked,
    phantom_images,
    settings,
)

RECTANGLES = """
<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="label" toName="image"><Label value="cell"/></RectangleLabels>
</View>
"""
PROJECT = {"id": 7, "created_at": "2023-11-14T22:13:20.654321Z", "title": "cells"}
NOT_A_PROJECT = ["", "7", "7.", "x.y", "../../7.1700000000", "7.1700000000.1", "9" * 400]


@contextmanager
def application(folder: Path, **environment: Any) -> Iterator[TestClient]:
    with TestClient(create_app(settings(folder, **environment))) as web:
        yield web


@pytest.fixture
def web(tmp_path: Path) -> Iterator[TestClient]:
    with application(tmp_path) as web:
        yield web


def predict(web: TestClient, *images: str, label_config: str = POLYGON_CONFIG) -> list[dict[str, Any]]:
    tasks = [{"id": number, "data": {"image": image}} for number, image in enumerate(images, start=1)]
    answer = web.post("/predict", json={"tasks": tasks, "project": UID, "label_config": label_config, "params": {}})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["results"])


# What Label Studio asks


def test_health_answers_quickly_without_label_studio(web: TestClient) -> None:
    started = time.monotonic()
    answer = web.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "UP")
    assert time.monotonic() - started < 0.5


def test_setup_remembers_the_project_and_tells_the_version(web: TestClient) -> None:
    request = {
        "project": UID,
        "schema": POLYGON_CONFIG,
        "hostname": "http://localhost:8080",
        "access_token": "0" * 40,
        "extra_params": None,
    }
    for _ in range(2):  # Label Studio asks again and again
        assert web.post("/setup", json=request).json() == {"model_version": "untrained"}
    assert [project["key"] for project in web.get("/status").json()["projects"]] == [KEY]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        pytest.param(RECTANGLES, "expected a PolygonLabels tag with a name", id="no polygons"),
        pytest.param("<View>", "not well-formed XML", id="no XML"),
        pytest.param("", "not well-formed XML", id="empty"),
    ],
)
def test_setup_refuses_a_configuration_that_nothing_can_be_drawn_with(
    web: TestClient, schema: str, reason: str
) -> None:
    request = {"project": UID, "schema": schema}
    refused = web.post("/setup", json=request)
    assert refused.status_code == 422
    assert reason in refused.json()["detail"]
    assert "A configuration that works" in refused.json()["detail"]
    assert web.get("/status").json()["projects"] == []

    shown = web.post("/setup", json=request, headers={"User-Agent": "heartex/1.23.2"})
    assert shown.status_code == 422
    assert reason.replace(" ", "-") in str(shown.url)  # all that Label Studio shows of an error
    assert str(shown.url).count("/") == 4


def test_predict_answers_empty_predictions_quickly_before_there_is_a_model(web: TestClient) -> None:
    version = web.post("/setup", json={"project": UID, "schema": POLYGON_CONFIG}).json()["model_version"]
    started = time.monotonic()
    predictions = predict(web, *["/data/upload/1/not-even-asked-for.png"] * 100)
    assert time.monotonic() - started < 1
    assert predictions == [{"model_version": version, "score": 0.0, "result": []}] * 100


@pytest.mark.parametrize(
    ("context", "results"),
    [({}, [[], []]), ({"result": []}, [{"model_version": "untrained", "score": 0.0, "result": []}] * 2)],
    ids=["to keep", "while somebody draws"],
)
def test_label_studio_is_given_nothing_to_keep_before_there_is_a_model(
    web: TestClient, context: dict[str, Any], results: list[Any]
) -> None:
    tasks = [{"id": number, "data": {"image": "/data/upload/1/a.png"}} for number in (1, 2)]
    params = {"login": None, "password": None, "context": context}
    request = {"tasks": tasks, "project": UID, "label_config": POLYGON_CONFIG, "params": params}
    answer = web.post("/predict", json=request, headers={"User-Agent": "heartex/1.23.2"})
    assert answer.json() == {"results": results}


def test_predict_gives_polygons_with_the_triplet_of_the_active_version(tmp_path: Path, lonely_service: Service) -> None:
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    with application(tmp_path, TSP_SHOWN_THRESHOLD=0) as web:
        assert web.post("/setup", json={"project": UID, "schema": POLYGON_CONFIG}).json() == {"model_version": VERSION}
        predictions = predict(web, *map(data_uri, phantom_images(2)))
    assert [p["model_version"] for p in predictions] == [VERSION, VERSION]
    assert all(0 <= p["score"] <= 1 for p in predictions)
    regions = [region for p in predictions for region in p["result"]]
    assert regions
    assert len({region["id"] for region in regions}) == len(regions)
    for region in regions:
        assert (region["from_name"], region["to_name"], region["type"]) == ("label", "image", "polygonlabels")
        assert (region["original_width"], region["original_height"]) == (64, 64)
        assert 0 <= region["score"] <= 1
        assert region["meta"]["text"][0].startswith("class ")
        points = region["value"]["points"]
        assert len(points) >= 3
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in points)
        assert is_simple_polygon(np.array(points))
        assert region["value"]["polygonlabels"][0] in ("cell", "lesion")


def test_predict_follows_the_active_version(tmp_path: Path, lonely_service: Service) -> None:
    add_version(lonely_service, KEY)
    add_version(lonely_service, KEY, "tsp-2-00000000")
    image = data_uri(grey_images(1)[0])
    with application(tmp_path) as web:
        assert predict(web, image)[0]["model_version"] == "untrained"
        for version in (VERSION, "tsp-2-00000000"):
            lonely_service.registry.activate(KEY, version)  # as the worker does, in another process
            assert predict(web, image)[0]["model_version"] == version


def test_predict_answers_for_the_other_tasks_when_an_image_cannot_be_had(
    tmp_path: Path, lonely_service: Service
) -> None:
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    with application(tmp_path) as web:
        predictions = predict(web, UNREADABLE, data_uri(grey_images(1)[0]))
        no_image = web.post(
            "/predict", json={"tasks": [{"id": 1, "data": {}}, {}], "project": UID, "label_config": POLYGON_CONFIG}
        )
    assert predictions[0] == {"model_version": VERSION, "score": 1.0, "result": []}
    assert predictions[1]["score"] < 1
    assert no_image.json() == {"results": [{"model_version": VERSION, "score": 1.0, "result": []}] * 2}


def test_predict_says_when_label_studio_is_away(
    tmp_path: Path, lonely_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ls_http, "_PAUSES_SECONDS", (0.01,))
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    with application(tmp_path) as web:
        tasks = [{"id": 1, "data": {"image": "/data/upload/1/a.png"}}]
        answer = web.post("/predict", json={"tasks": tasks, "project": UID, "label_config": POLYGON_CONFIG})
    assert answer.status_code == 503
    assert "no answer from Label Studio" in answer.json()["detail"]


def test_predict_says_that_there_are_too_many_tasks(
    tmp_path: Path, lonely_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.predictor._MOST_SECONDS", 0.0)
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    with application(tmp_path) as web:
        tasks = [{"id": 1, "data": {"image": data_uri(grey_images(1)[0])}}]
        answer = web.post("/predict", json={"tasks": tasks, "project": UID, "label_config": POLYGON_CONFIG})
    assert answer.status_code == 503
    assert "Send fewer tasks at once" in answer.json()["detail"]


@pytest.mark.parametrize("number", [None, [], {}, True, "1/../..", 1.5, 10**30], ids=repr)
def test_predict_takes_tasks_whatever_their_ids_are(tmp_path: Path, lonely_service: Service, number: Any) -> None:
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    tasks = [{"id": number, "data": {"image": data_uri(grey_images(1)[0])}}]
    with application(tmp_path) as web:
        answer = web.post("/predict", json={"tasks": tasks, "project": UID, "label_config": POLYGON_CONFIG})
    assert answer.status_code == 200
    assert answer.json()["results"][0]["score"] < 1


@pytest.mark.parametrize("label_config", ["", "<View", RECTANGLES], ids=["empty", "broken", "no polygons"])
def test_predict_refuses_a_configuration_that_nothing_can_be_drawn_with(web: TestClient, label_config: str) -> None:
    answer = web.post("/predict", json={"tasks": [], "project": UID, "label_config": label_config})
    assert answer.status_code == 422
    assert "Labelling configuration: " in answer.json()["detail"]


@pytest.mark.parametrize("project", NOT_A_PROJECT, ids=[name[:20] or "empty" for name in NOT_A_PROJECT])
def test_a_project_that_is_not_named_as_label_studio_names_it_is_refused(web: TestClient, project: str) -> None:
    answers = [
        web.post("/predict", json={"tasks": [], "project": project, "label_config": POLYGON_CONFIG}),
        web.post("/setup", json={"project": project, "schema": POLYGON_CONFIG}),
        web.get("/versions", params={"project": project or " "}),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert "expected '<id>.<unix time of its creation>'" in answer.json()["detail"]


def test_versions_lists_those_of_the_project(web: TestClient, lonely_service: Service) -> None:
    for version in (VERSION, "tsp-2-00000000"):
        add_version(lonely_service, KEY, version)
    assert web.get("/versions", params={"project": UID}).json() == {"versions": [VERSION, "tsp-2-00000000"]}
    assert web.get("/versions", params={"project": "8.1"}).json() == {"versions": []}
    assert web.get("/versions").json() == {"versions": []}  # Label Studio does not say which project it means


# Events


def test_a_webhook_is_recorded_and_answered_at_once(web: TestClient, lonely_service: Service) -> None:
    started = time.monotonic()
    for action in ("ANNOTATION_CREATED", START_TRAINING):
        assert web.post("/webhook", json={"action": action, "project": PROJECT, "task": {}}).status_code == 200
    assert time.monotonic() - started < 1
    assert [a for _, a in inbox.unhandled(lonely_service.database, KEY)] == ["ANNOTATION_CREATED", START_TRAINING]
    assert web.get("/status").json()["projects"][0]["events"] == {"received": 2, "waiting": 2}


def test_a_webhook_without_a_time_is_for_the_known_project(web: TestClient, lonely_service: Service) -> None:
    event = {"action": "TASKS_DELETED", "project": {"id": 7}}
    assert web.post("/webhook", json=event).status_code == 422
    inbox.remember_project(lonely_service.database, ProjectName(KEY, 7))
    assert web.post("/webhook", json=event).status_code == 200
    assert [action for _, action in inbox.unhandled(lonely_service.database, KEY)] == ["TASKS_DELETED"]


def test_a_webhook_for_which_there_is_no_room_is_told_to_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.recorder._MOST_WAITING_BYTES", 0)
    state = tmp_path / "state.sqlite3"
    event = {"action": "TASKS_DELETED", "project": PROJECT}
    with application(tmp_path, DATABASE_URL=f"sqlite:///{state}?timeout=0.1") as web, ThreadPoolExecutor(1) as pool:
        with locked(state):
            first = pool.submit(web.post, "/webhook", json=event)
            while not web.get("/status").json()["events"]["problem"]:
                time.sleep(0.05)
            answer = web.post("/webhook", json=event)
            assert (answer.status_code, "this one is not kept" in answer.json()["detail"]) == (503, True)
        assert first.result(timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"", "body", id="nothing"),
        pytest.param(b"{not json", "JSON", id="not JSON"),
        pytest.param(b"[]", "dict", id="a list"),
        pytest.param(b'{"action": "TASKS_CREATED"}', "project", id="no project"),
        pytest.param(b'{"project": {"id": 7}}', "action", id="no action"),
        pytest.param(b'{"action": "X", "project": 7}', "dict", id="a number as project"),
        pytest.param(b'{"action": "X", "project": {"id": 7, "title": "a"}}', "id and created_at", id="no time"),
        pytest.param(b'{"action": "X", "project": {"id": {}, "created_at": 3}}', "id and created_at", id="odd values"),
        pytest.param(b'{"action": "%s", "project": {}}' % (b"X" * 101), "at most 100", id="a long action"),
        pytest.param(b'{"action": "\xff", "project": {}}', "", id="not UTF-8"),
        pytest.param(b'{"action": NaN, "project": Infinity}', "body.action: Input should be a valid string", id="NaN"),
        pytest.param(b'["\\ud800"]', "body: ", id="half a character"),
        pytest.param(b'{"action": "X", "project": {"\\ud800": 1e999}}', "id and created_at", id="odd keys"),
        pytest.param(b'{"action": "a\\u0000b", "project": {"id": 7, "created_at": "2023-11-14T22:13:20Z"}}', "pattern",
                     id="a null character"),
    ],
)  # fmt: skip
def test_a_webhook_that_is_none_is_refused_with_the_reason(web: TestClient, content: bytes, told: str) -> None:
    answer = web.post("/webhook", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert told in answer.text
    assert web.get("/status").json()["projects"] == []


def test_a_malformed_request_is_not_repeated_in_the_answer(web: TestClient) -> None:
    answer = web.post("/setup", json={"access_token": "a-token", "project": {"secret": "a-token"}})
    assert answer.json() == {"detail": "body.project: Input should be a valid string"}


def test_a_body_that_is_too_large_is_refused_before_it_is_read(web: TestClient) -> None:
    answer = web.post("/webhook", content=b"{}", headers={"Content-Length": str(10**12)})
    assert answer.status_code == 413
    assert "at most 100000000 bytes, 1000000000000 are announced" in answer.json()["detail"]


def test_a_body_of_unknown_length_is_refused(web: TestClient) -> None:
    answer = web.post("/webhook", content=iter([b"{}"]))
    assert answer.status_code == 411
    assert "Content-Length" in answer.json()["detail"]


# What people see


def test_the_dashboard_explains_itself_before_a_project_is_connected(web: TestClient) -> None:
    assert "No project is connected yet" in web.get("/ui").text
    assert str(web.get("/").url).endswith("/ui")


def test_the_dashboard_shows_cycles_in_every_state(web: TestClient, lonely_service: Service) -> None:
    by_class = {"cell": 0.5, "<lesion>": None}
    evaluation = Evaluation(
        map_50=0.5, map_50_95=None, ap_50_by_class=by_class, ap_50_95_by_class=by_class, images=4, instances=9
    )
    with lonely_service.database.session() as session:
        session.add(ProjectRow(key=KEY, label_studio_id=7, title="<script>alert(1)</script>", problem="5 < 6 & so on"))
        session.flush()
        session.add_all(
            [
                CycleRow(project_key=KEY, number=1, status="done", stage="finished",
                         facts={"metrics": asdict(evaluation)}),
                CycleRow(project_key=KEY, number=2, status="failed", stage="failed", error="the <loss> is NaN"),
                CycleRow(project_key=KEY, number=3, status="running", stage="training", done=3, total=12,
                         facts={"problems": ["image of task 5 (<img onerror=x>): broken"]}),
                CycleRow(project_key=KEY, number=4),
            ]
        )  # fmt: skip
    page = web.get("/ui").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for raw in ("<script>", "<loss>", "<img", "<lesion>"):
        assert raw not in page
    for shown in ("5 &lt; 6 &amp; so on", "finished", "0.500", "the &lt;loss&gt; is NaN", "training", "3 of 12",
                  "waiting for the worker", "on 4 validation images"):  # fmt: skip
        assert shown in page
    cycles = web.get("/status").json()["projects"][0]["cycles"]
    assert [(c["number"], c["status"]) for c in cycles] == [(4, "planned"), (3, "running"), (2, "failed"), (1, "done")]


def test_openapi_describes_the_routes(web: TestClient) -> None:
    description = web.get("/openapi.json").json()
    assert {"/predict", "/setup", "/webhook", "/health", "/versions", "/status", "/ui"} <= set(description["paths"])
    schemas = description["components"]["schemas"]
    assert set(schemas["SetupRequest"]["required"]) == {"project"}
    assert set(schemas["PredictRequest"]["required"]) == {"tasks", "project"}
    assert set(schemas["WebhookRequest"]["required"]) == {"action", "project"}


# Basic authentication

USER, PASSWORD = "studio", "pässword:with colon"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    with application(tmp_path, BASIC_AUTH_USER=USER, BASIC_AUTH_PASS=PASSWORD) as web:
        yield web


def basic(user: str, password: str, encoding: str = "utf-8") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode(encoding)).decode()}


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no credentials"),
        pytest.param(basic(USER, "wrong"), id="a wrong password"),
        pytest.param(basic("somebody", PASSWORD), id="a wrong name"),
        pytest.param(basic("", ""), id="empty credentials"),
        pytest.param({"Authorization": "Basic not-base64"}, id="not base64"),
        pytest.param({"Authorization": f"Bearer {PASSWORD.encode().hex()}"}, id="another scheme"),
        pytest.param({"Authorization": b"Basic \xff\xfe"}, id="bytes that are no text"),
        pytest.param({"Host": "localhost/health?"}, id="a host that looks like the open route"),
    ],
)
def test_every_route_but_health_needs_the_right_credentials(guarded: TestClient, headers: dict[str, str]) -> None:
    asked = 0
    for route in guarded.app.routes:  # type: ignore[attr-defined]
        if route.path == "/health":
            continue
        for method in route.methods:
            answer = guarded.request(method, route.path.replace("{reason}", "x"), headers=headers)
            assert answer.status_code == 401, (method, route.path)
            assert answer.headers["www-authenticate"] == "Basic"
            asked += 1
    assert asked >= 10
    assert guarded.get("/health", headers=headers).status_code == 200
    assert guarded.get("/nowhere", headers=headers).status_code == 401


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"], ids=["as browsers encode", "as Label Studio encodes"])
def test_the_right_credentials_open_every_route(guarded: TestClient, encoding: str) -> None:
    guarded.headers.update(basic(USER, PASSWORD, encoding))
    assert guarded.get("/status").status_code == 200
    assert guarded.post("/setup", json={"project": UID, "schema": POLYGON_CONFIG}).status_code == 200
    refused = guarded.post("/setup", json={"project": UID, "schema": ""}, headers={"User-Agent": "heartex/1.23.2"})
    assert "not-well-formed-XML" in str(refused.url)


# A real Label Studio


@pytest.mark.label_studio
def test_label_studio_connects_and_start_training_reaches_the_inbox_at_once(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, service: Service
) -> None:
    with served(create_app(service.settings)) as url, raw_api(label_studio) as api:
        backend = client.connect_backend(project.id, url=url, title="TSP")
        assert (backend.state, backend.model_version) == ("CO", "untrained")
        started = time.monotonic()
        assert api.post(f"/api/ml/{backend.id}/train").status_code == 200
        assert time.monotonic() - started < 2
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    assert START_TRAINING in [action for _, action in inbox.unhandled(service.database, name.key)]


@pytest.mark.label_studio
def test_before_the_first_cycle_annotators_see_no_predictions_in_label_studio(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, service: Service
) -> None:
    asked = []
    app = create_app(service.settings)

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        asked.append(request.url.path)
        return await call_next(request)

    with served(app) as url, raw_api(label_studio) as api:
        client.connect_backend(project.id, url=url, title="TSP")
        task, _ = import_images(client, project, grey_images(2))
        assert api.get(f"/api/tasks/{task}/").json()["predictions"] == []
        served_task = client.next_task(project.id)
        assert served_task is not None
        assert served_task["predictions"] == []
        retrieve = {"selectedItems": {"all": True, "excluded": []}}
        api.post(f"/api/dm/actions?id=retrieve_tasks_predictions&project={project.id}", json=retrieve)
    assert asked.count("/predict") >= 3
    assert "untrained" not in client.model_versions(project.id)


@pytest.mark.label_studio
def test_annotating_in_label_studio_reaches_the_inbox(
    client: LabelStudioClient, project: Project, service: Service
) -> None:
    with served(create_app(service.settings)) as url:
        client.connect_backend(project.id, url=url, title="TSP")
        (task,) = import_images(client, project, grey_images(1))
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    actions = [action for _, action in inbox.unhandled(service.database, name.key)]
    assert {"TASKS_CREATED", "ANNOTATION_CREATED"} <= set(actions)


@pytest.mark.label_studio
def test_label_studio_shows_why_a_configuration_is_refused(client: LabelStudioClient, service: Service) -> None:
    project = client.create_project(title="only rectangles", label_config=RECTANGLES)
    with served(create_app(service.settings)) as url, pytest.raises(LabelStudioError, match="answered 400") as caught:
        client.connect_backend(project.id, url=url, title="TSP")
    assert "expected-a-PolygonLabels-tag-with-a-name" in str(caught.value)
    assert client.ml_backends(project.id) == []


@pytest.mark.label_studio
def test_label_studio_shows_why_a_configuration_that_was_changed_is_refused(
    client: LabelStudioClient, project: Project, service: Service
) -> None:
    with served(create_app(service.settings)) as url:
        client.connect_backend(project.id, url=url, title="TSP")
        client.update_project(project.id, label_config=RECTANGLES)
        (backend,) = client.ml_backends(project.id)
    assert backend.state == "ER"
    assert "expected-a-PolygonLabels-tag-with-a-name" in backend.error_message


@pytest.mark.label_studio
def test_label_studio_gets_through_the_basic_authentication(
    client: LabelStudioClient, project: Project, service: Service, tmp_path: Path
) -> None:
    guarded = settings(tmp_path, BASIC_AUTH_USER=USER, BASIC_AUTH_PASS=PASSWORD)
    with served(create_app(guarded)) as url:
        with pytest.raises(LabelStudioError, match="answered 400"):
            client.connect_backend(project.id, url=url, title="TSP")
        backend = client.connect_backend(project.id, url=url, title="TSP", basic_auth=(USER, PASSWORD))
    assert backend.state == "CO"


@pytest.mark.label_studio
def test_an_image_that_was_uploaded_to_label_studio_is_predicted(
    client: LabelStudioClient, project: Project, service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "phantom.png"
    path.write_bytes(phantom_images(1)[0])
    client.import_files(project.id, [path])
    (task,) = client.tasks(project.id)
    assert task.data["image"].startswith("/data/upload/")
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    add_version(service, name.key)
    service.registry.activate(name.key, VERSION)
    with TestClient(create_app(service.settings)) as web:
        request = {"tasks": [{"id": task.id, "data": task.data}], "project": project.uid}
        (prediction,) = web.post("/predict", json={**request, "label_config": POLYGON_CONFIG}).json()["results"]
    assert prediction["model_version"] == VERSION
    assert prediction["score"] < 1  # 1 is that of an image that cannot be had
    for region in prediction["result"]:
        assert (region["original_width"], region["original_height"]) == (64, 64)
