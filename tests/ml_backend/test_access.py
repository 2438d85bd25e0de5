"""Who gets in: odd paths and methods, the secret of the webhooks, requests of other sites, and a real Label Studio."""

import base64
import stat
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from ml_backend import inbox
from ml_backend.app import create_app
from ml_backend.errors import SettingsError
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.webhook_secret import HEADER, guard_webhooks, webhook_secret
from scripts.label_studio_server import LabelStudioServer
from scripts.served_app import served
from tests.label_studio import polygon_result, raw_api
from tests.ml_backend.examples import KEY, UID, grey_images, import_images, key_of, settings

USER, PASSWORD = "studio", "pässword:with colon"
EVENT = {"action": "ANNOTATION_CREATED", "project": {"id": 7, "created_at": "2023-11-14T22:13:20Z"}}
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture
def guarded(tmp_path: Path) -> Settings:
    return settings(tmp_path, BASIC_AUTH_USER=USER, BASIC_AUTH_PASS=PASSWORD)


@pytest.fixture
def app(guarded: Settings) -> FastAPI:
    return create_app(guarded)


@pytest.fixture
def web(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as web:
        yield web


def secret_of(guarded: Settings) -> str:
    secret = webhook_secret(guarded)
    assert secret is not None
    return secret


# Paths and methods


def test_every_route_but_health_asks_for_the_password(app: FastAPI, web: TestClient) -> None:
    paths = {route.path for route in app.routes} | {"/ui/", "/static/ui.html", "/nowhere"}
    assert {"/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/status", "/health"} <= paths
    for path in paths - {"/health"}:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"):
            assert web.request(method, path).status_code == 401, (method, path)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """A guarded web process behind a real socket: a client that tidies paths up would hide what is asked."""
    folder = tmp_path_factory.mktemp("guarded")
    with served(create_app(settings(folder, BASIC_AUTH_USER=USER, BASIC_AUTH_PASS=PASSWORD))) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


@pytest.mark.parametrize(
    "target",
    [
        "//health", "/health/", "/health//", "/./health", "/health/../status", "/x/../health/../status", "/health%2f",
        "/health%2f..%2fstatus", "/%2e%2e/status", "/health;/status", "/health%00", "/health%20", "/Health", "/HEALTH",
        "/status?/health", "/status#/health", "/status/health", "http://x/status", "http://x/health/../status",
        "*", "/openapi.json/", "/docs/", "/ui/health", "\\health", "/webhook/",
    ],
)  # fmt: skip
def test_no_odd_path_slips_through(address: tuple[str, int], target: str) -> None:
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        connection = HTTPConnection(*address, timeout=10)
        connection.putrequest(method, target, skip_accept_encoding=True)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        assert connection.getresponse().status in (400, 401), (method, target)
        connection.close()


def test_health_in_its_own_name_is_all_that_is_open(address: tuple[str, int]) -> None:
    for target in ("/health", "/%68ealth", "/health?x=/status"):
        connection = HTTPConnection(*address, timeout=10)
        connection.request("GET", target)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"UP","model_class":"TSPBackend"}')
        connection.close()


@pytest.mark.parametrize(
    "header",
    ["", "Basic", "Basic ", BASIC.lower(), BASIC.replace("Basic", "Bearer"), BASIC + "x", BASIC[:-2], f" {BASIC}x",
     "Basic " + base64.b64encode(USER.encode()).decode(), "Basic " + base64.b64encode(f"{USER}:".encode()).decode()],
)  # fmt: skip
def test_what_is_nearly_the_password_is_not_it(web: TestClient, header: str) -> None:
    assert web.get("/status", headers={"Authorization": header}).status_code == 401
    assert web.get("/status", headers={"Authorization": BASIC}).status_code == 200


# The secret of the webhooks


def test_the_secret_opens_the_webhook_and_nothing_else(web: TestClient, guarded: Settings) -> None:
    secret = secret_of(guarded)
    headers = {HEADER: secret}
    assert web.post("/webhook", json=EVENT, headers=headers).status_code == 200
    assert web.post("/webhook", json=EVENT, headers={"Authorization": BASIC}).status_code == 200
    for path in ("/status", "/ui", "/versions", "/openapi.json"):
        assert web.get(path, headers=headers).status_code == 401
    for path in ("/setup", "/predict", "/webhook/", "//webhook"):
        assert web.post(path, json={"project": UID}, headers=headers).status_code == 401


@pytest.mark.parametrize("given", ["", "0" * 64, "x", "ä"], ids=["empty", "wrong", "short", "no ascii"])
def test_a_wrong_secret_is_refused_and_nothing_is_recorded(web: TestClient, guarded: Settings, given: str) -> None:
    assert web.post("/webhook", json=EVENT, headers={HEADER: given.encode()}).status_code == 401
    assert (
        web.post("/webhook", json=EVENT, headers={"Authorization": f"Bearer {secret_of(guarded)}"}).status_code == 401
    )
    service = Service.connect(guarded)
    assert inbox.unhandled(service.database, KEY) == []
    service.close()


def test_without_a_password_there_is_no_secret(tmp_path: Path) -> None:
    open_settings = settings(tmp_path)
    assert webhook_secret(open_settings) is None
    with TestClient(create_app(open_settings)) as web:
        assert web.post("/webhook", json=EVENT).status_code == 200
    assert not (open_settings.model_dir / "webhook-secret").exists()


def test_the_secret_survives_restarts_is_readable_by_its_owner_alone_and_is_in_no_database(guarded: Settings) -> None:
    guarded.model_dir.mkdir()
    first = secret_of(guarded)
    path = guarded.model_dir / "webhook-secret"
    assert (len(first), secret_of(guarded)) == (64, first)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with TestClient(create_app(guarded)) as web:
        web.post("/webhook", json=EVENT, headers={HEADER: first}).raise_for_status()
        shown = web.get("/status", headers={"Authorization": BASIC}).text
    assert first not in shown
    for file in guarded.model_dir.rglob("*"):
        assert file == path or file.is_dir() or first.encode() not in file.read_bytes()


def test_processes_that_start_together_have_one_secret(guarded: Settings) -> None:
    guarded.model_dir.mkdir()
    start, found = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        found.append(webhook_secret(guarded))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in guarded.model_dir.iterdir()] == ["webhook-secret"]


def test_processes_without_a_common_disk_have_one_secret(guarded: Settings, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    found = []
    for name in ("web", "worker"):
        (tmp_path / name).mkdir()
        place = {"store_url": f"file://{tmp_path / 'store'}", "model_dir": tmp_path / name}
        found.append(webhook_secret(guarded.model_copy(update=place)))
        assert stat.S_IMODE((tmp_path / name / "webhook-secret").stat().st_mode) == 0o600
    assert found[0] == found[1]
    assert len(str(found[0])) == 64


def test_a_secret_of_before_there_was_a_store_is_everybodys(guarded: Settings, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    found = []
    for name in ("old", "new", "old as well", "old"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        without = guarded.model_copy(update={"model_dir": folder, "store_url": ""})
        if name.startswith("old"):
            webhook_secret(without)
        found.append(webhook_secret(without.model_copy(update={"store_url": f"file://{tmp_path / 'store'}"})))
        assert webhook_secret(without) == found[0]  # in the file, too
    assert found == [found[0]] * 4
    (tmp_path / "store").rename(tmp_path / "away")
    assert webhook_secret(without.model_copy(update={"store_url": f"file://{tmp_path / 'store'}"})) == found[0]


def test_a_damaged_secret_is_told(guarded: Settings) -> None:
    guarded.model_dir.mkdir()
    (guarded.model_dir / "webhook-secret").write_text("\n")
    with pytest.raises(SettingsError, match="expected 64 hexadecimal digits: delete the file"):
        create_app(guarded)


# Refusals are seen


def test_refused_webhooks_are_counted_and_shown_with_what_to_do(web: TestClient) -> None:
    right = {"Authorization": BASIC}
    assert web.get("/status", headers=right).json()["refused"]["problem"] == ""
    for _ in range(3):
        web.post("/webhook", json=EVENT)
    web.post("/setup", json={"project": UID}, headers={"Authorization": "Basic bm90OnJpZ2h0"})
    web.get("/nowhere")
    refused = web.get("/status", headers=right).json()["refused"]
    assert {path: of["count"] for path, of in refused["requests"].items()} == {
        "/webhook": 3, "/setup": 1, "/predict": 0
    }  # fmt: skip
    assert "3 requests to /webhook were refused, the last one at 20" in refused["problem"]
    assert "1 request to /setup was refused" in refused["problem"]
    assert "BASIC_AUTH_PASS" in refused["problem"]
    assert "3 requests to /webhook were refused" in web.get("/ui", headers=right).text


def test_refused_requests_fill_neither_the_database_nor_the_log(
    web: TestClient, guarded: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    before = sum(path.stat().st_size for path in guarded.model_dir.rglob("*") if path.is_file())
    for number in range(200):
        web.post("/webhook", json={**EVENT, "project": {"id": number, "created_at": "2023-11-14T22:13:20Z"}})
    assert sum(path.stat().st_size for path in guarded.model_dir.rglob("*") if path.is_file()) == before
    assert len([record for record in caplog.records if record.name == "ml_backend.access"]) == 1


# Pages of other sites


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 200, id="a program"),
        pytest.param({"Sec-Fetch-Site": "same-origin", "Origin": "http://behind-a-proxy"}, 200, id="our page"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, 403, id="another site"),
        pytest.param({"Sec-Fetch-Site": "same-site"}, 403, id="a neighbour"),
        pytest.param({"Origin": "http://testserver"}, 200, id="our page over http"),
        pytest.param({"Origin": "http://public.example", "X-Forwarded-Host": "public.example"}, 200, id="by a proxy"),
        pytest.param({"Origin": "http://evil.example"}, 403, id="another site over http"),
        pytest.param({"Origin": "http://testserver:81"}, 403, id="another port"),
        pytest.param({"Origin": "null"}, 403, id="a sandbox"),
        pytest.param({"Origin": "http://["}, 403, id="nonsense"),
    ],
)
def test_a_browser_cannot_be_made_to_send_what_changes_something(
    web: TestClient, headers: dict[str, str], status: int
) -> None:
    answer = web.post("/webhook", json=EVENT, headers={"Authorization": BASIC, **headers})
    assert answer.status_code == status
    page = web.get("/ui", headers={"Authorization": BASIC, **headers})
    assert (page.status_code, page.headers["x-frame-options"]) == (200, "DENY")


# A real Label Studio


@pytest.fixture
def guarded_service(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(settings(tmp_path, BASIC_AUTH_USER=USER, BASIC_AUTH_PASS="a password", **place))
    yield service
    service.close()


def hooks(label_studio: LabelStudioServer, project: Project) -> dict[str, dict[str, Any]]:
    with raw_api(label_studio) as api:
        return {hook["url"]: hook for hook in api.get("/api/webhooks/", params={"project": project.id}).json()}


@pytest.mark.label_studio
def test_label_studios_webhook_is_refused_until_the_worker_has_given_it_the_secret(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, guarded_service: Service
) -> None:
    key = key_of(guarded_service, project)
    with served(create_app(guarded_service.settings)) as url, raw_api(label_studio) as api:
        backend = client.connect_backend(project.id, url=url, title="TSP", basic_auth=(USER, "a password"))
        made = hooks(label_studio, project)[f"{url}/webhook"]
        tasks = import_images(client, project, grey_images(2))
        assert inbox.unhandled(guarded_service.database, key) == []

        reconcile(guarded_service, key)
        given = hooks(label_studio, project)[f"{url}/webhook"]
        assert given["headers"] == {HEADER: webhook_secret(guarded_service.settings)}
        changing = ("headers", "updated_at")
        assert {k: v for k, v in given.items() if k not in changing} == {
            k: v for k, v in made.items() if k not in changing
        }
        client.submit_annotation(tasks[0], result=[polygon_result()], lead_time_seconds=1)
        assert [a for _, a in inbox.unhandled(guarded_service.database, key)] == ["ANNOTATION_CREATED"]
        assert api.post(f"/api/ml/{backend.id}/train").status_code == 200  # Start Training brings the password
        assert inbox.unhandled(guarded_service.database, key)[-1][1] == inbox.START_TRAINING


@pytest.mark.label_studio
def test_only_webhooks_to_this_backend_get_the_secret_and_keep_what_they_had(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, guarded_service: Service
) -> None:
    config = guarded_service.settings
    with served(create_app(config)) as url, raw_api(label_studio) as api:
        other = {"url": f"{url}/other/webhook", "headers": {}, "send_for_all_actions": False,
                 "actions": ["TASKS_CREATED"], "project": project.id}  # fmt: skip
        ours = {**other, "url": f"{url}/webhook", "headers": {"X-Own": "1"}, "actions": ["ANNOTATION_CREATED"]}
        for hook in (other, ours):
            api.post("/api/webhooks/", json=hook).raise_for_status()
        client.connect_backend(project.id, url=url, title="TSP", basic_auth=(USER, "a password"))
        guard_webhooks(config, client, project.id)
        found = hooks(label_studio, project)
    assert found[other["url"]]["headers"] == {}
    assert found[ours["url"]]["headers"] == {"X-Own": "1", HEADER: webhook_secret(config)}
    assert found[ours["url"]]["actions"] == ["ANNOTATION_CREATED"]
    assert found[ours["url"]]["send_for_all_actions"] is False
