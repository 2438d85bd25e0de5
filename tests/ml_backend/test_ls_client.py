"""The Label Studio client against a real Label Studio; faults of the network come from a scripted server."""

import base64
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from ml_backend import ls_client, ls_http, ls_tokens
from ml_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, WEBHOOK_ACTIONS, LabelStudioClient, counted_annotations
from ml_backend.ls_types import Project
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import (
    PASSWORD,
    POLYGON_CONFIG,
    USERNAME,
    create_annotator,
    png_bytes,
    polygon_result,
    prediction,
    raw_api,
)

Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(scope="module")
def access_token(label_studio: LabelStudioServer) -> str:
    """The personal access token of an account; each may have one."""
    create_annotator(label_studio, "pat@example.com")
    return label_studio.create_personal_access_token(email="pat@example.com", password=PASSWORD)


@pytest.fixture(scope="module")
def colleague(label_studio: LabelStudioServer) -> Iterator[LabelStudioClient]:
    """Another annotator of the same organisation."""
    with LabelStudioClient(label_studio.url, create_annotator(label_studio, "colleague@example.com")) as client:
        yield client


@contextmanager
def scripted_server(answers: dict[str, list[Answer]]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives the answers of each path in turn, the last one for ever; yields its address and its log."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keeps the test output clean."""

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            path = self.path.partition("?")[0]
            log.append(f"{self.command} {path} {self.headers.get('authorization', '')}".strip())
            script = answers[path]
            (script.pop(0) if len(script) > 1 else script[0])(self)

        do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def scripted(answers: dict[str, list[Answer]], token: str = "t" * 40) -> Iterator[tuple[LabelStudioClient, list[str]]]:
    """A client of such a server, and the server's log."""
    with scripted_server(answers) as (url, log), LabelStudioClient(url, token) as client:
        yield client, log


def says(status: int, body: Any = None, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        handler.send_response(status)
        for name, value in {"content_type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls_http, "_PAUSES_SECONDS", (0.01, 0.01))


def jwt(**payload: Any) -> str:
    encoded = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJIUzI1NiJ9.{encoded}.c2lnbmF0dXJl"


WHOAMI = "/api/current-user/whoami"
REFRESH = "/api/token/refresh/"


# Tokens


@pytest.mark.label_studio
@pytest.mark.parametrize("kind", ["legacy", "personal"])
def test_both_kinds_of_token_are_understood(kind: str, label_studio: LabelStudioServer, access_token: str) -> None:
    token, owner = {"legacy": (label_studio.token, USERNAME), "personal": (access_token, "pat@example.com")}[kind]
    with LabelStudioClient(label_studio.url, token) as client:
        assert client.whoami() == owner


@pytest.mark.label_studio
@pytest.mark.parametrize("kind", ["legacy", "personal"])
def test_a_wrong_token_is_named_by_its_kind_and_never_shown(
    kind: str, label_studio: LabelStudioServer, access_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    token = {"legacy": "0" * 40, "personal": access_token[:-6] + "AAAAAA"}[kind]
    with (
        LabelStudioClient(label_studio.url, token) as client,
        pytest.raises(LabelStudioAuthError, match=f"looks like a {kind}.*LABEL_STUDIO_API_KEY") as refused,
    ):
        client.whoami()
    assert token not in str(refused.value)
    assert token not in caplog.text


@pytest.mark.parametrize(
    ("length", "told"), [(40, "like a legacy token. Copy"), (39, "token but has 39 characters instead of 40. Copy")]
)
def test_a_refused_token_of_another_length_than_theirs_is_told_so(length: int, told: str) -> None:
    assert told in ls_tokens.read_credentials("a" * length).refusal("http://localhost", "no")


@pytest.mark.label_studio
def test_a_legacy_token_in_an_organisation_that_switched_them_off_is_told_so(
    label_studio: LabelStudioServer, client: LabelStudioClient, access_token: str
) -> None:
    refreshed = httpx.post(f"{label_studio.url}{REFRESH}", json={"refresh": access_token}).json()["access"]
    bearer = {"Authorization": f"Bearer {refreshed}"}
    settings = f"{label_studio.url}/api/jwt/settings"
    off = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": False}
    assert httpx.post(settings, json=off, headers=bearer).is_success
    try:
        with pytest.raises(LabelStudioAuthError, match=r"switched off in this organisation.*personal access token"):
            client.whoami()
    finally:
        httpx.post(settings, json={**off, "legacy_api_tokens_enabled": True}, headers=bearer).raise_for_status()
    assert client.whoami() == USERNAME


@pytest.mark.parametrize(
    ("token", "advice"),
    [
        pytest.param("", "no Label Studio token: set LABEL_STUDIO_API_KEY", id="missing"),
        pytest.param("two words", "has blanks", id="blanks"),
        pytest.param("tökén", "characters that no token has", id="not ASCII"),
        pytest.param(jwt(token_type="access", exp=1, iat=0), "dies after 5 minutes", id="access token"),
    ],
)
def test_what_cannot_be_a_token_is_refused_at_once(token: str, advice: str) -> None:
    with pytest.raises(LabelStudioAuthError, match=advice):
        LabelStudioClient("http://localhost:8080", token)


@pytest.mark.label_studio
def test_an_access_token_that_label_studio_no_longer_takes_is_renewed(
    label_studio: LabelStudioServer, access_token: str
) -> None:
    with LabelStudioClient(label_studio.url, access_token) as client:
        client.whoami()
        # Label Studio's own access tokens live five minutes: too long to wait, so this one is spoilt instead.
        credentials = client._http._credentials
        assert isinstance(credentials, ls_tokens.PersonalAccessToken)
        credentials._access += "x"
        assert client.whoami() == "pat@example.com"


def test_an_access_token_is_exchanged_once_and_again_shortly_before_it_dies() -> None:
    refresh = jwt(token_type="refresh")
    long_lived, dying = jwt(iat=0, exp=300), jwt(iat=0, exp=20)
    answers = {
        REFRESH: [says(200, {"access": dying}), says(200, {"access": long_lived})],
        WHOAMI: [says(200, {"email": "a@b.c"})],
    }
    with scripted(answers, refresh) as (client, log):
        for _ in range(3):
            client.whoami()
    assert [line.split(" ")[1] for line in log] == [REFRESH, WHOAMI, REFRESH, WHOAMI, WHOAMI]
    assert log[-1].endswith(f"Bearer {long_lived}")


def test_a_token_that_stays_refused_after_one_renewal_is_an_error() -> None:
    answers = {
        REFRESH: [says(200, {"access": jwt(iat=0, exp=300)})],
        WHOAMI: [says(401, {"detail": "no"})],
    }
    with (
        scripted(answers, jwt(token_type="refresh")) as (client, log),
        pytest.raises(LabelStudioAuthError, match="personal access token"),
    ):
        client.whoami()
    assert [line.split(" ")[1] for line in log] == [REFRESH, WHOAMI, REFRESH, WHOAMI]


# Faults


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [says(503), says(429), says(500), hangs_up], ids=["503", "429", "500", "hangs up"])
def test_reading_is_repeated_until_label_studio_is_back(fault: Answer) -> None:
    with scripted({WHOAMI: [fault, fault, says(200, {"email": "a@b.c"})]}) as (client, log):
        assert client.whoami() == "a@b.c"
    assert len(log) == 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("wish", "pause"),
    [
        pytest.param("0.03", "0.01", id="not in whole seconds"),
        pytest.param("0", "0.01", id="not at all"),
        pytest.param("1", "0.05", id="for a while"),
        pytest.param("9" * 500, "0.05", id="for ever"),
        pytest.param("soon", "0.01", id="in words"),
        pytest.param("Fri, 31 Dec 2100 23:59:59 GMT", "0.05", id="until a date"),
        pytest.param("Fri, 31 Dec 1999 23:59:59 GMT", "0.01", id="until a date that is over"),
        pytest.param("Fri, 31 Dec 2100 23:59:59", "0.01", id="until a date without a zone"),
    ],
)
def test_label_studio_is_left_alone_as_long_as_it_asks_and_is_bearable(
    wish: str, pause: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ls_http, "_LONGEST_PAUSE_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    with scripted({WHOAMI: [says(429, retry_after=wish), says(200, {"email": "a@b.c"})]}) as (client, _):
        assert client.whoami() == "a@b.c"
    assert f"status 429, trying again in {pause} s" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_others_who_need_an_access_token_do_not_wait_as_long_as_label_studio_asks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ls_http, "_LONGEST_PAUSE_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    exchange = [says(429, retry_after="30"), says(200, {"access": jwt(token_type="access", iat=0, exp=300)})]
    answers = {REFRESH: exchange, WHOAMI: [says(200, {"email": "a@b.c"})]}
    with scripted(answers, jwt(token_type="refresh")) as (client, _):
        assert client.whoami() == "a@b.c"
    assert f"{REFRESH}: status 429, trying again in 0.01 s" in caplog.text


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "half",
    [
        pytest.param(says(200, b'{"email": "a@', content_type="application/json"), id="in its JSON"),
        pytest.param(says(200, b"not packed", content_encoding="gzip"), id="in what was packed"),
        pytest.param(says(503, b'{"detail": "mainten', content_type="application/json"), id="in what is wrong"),
    ],
)
def test_an_answer_that_ends_in_the_middle_is_asked_for_again(half: Answer) -> None:
    with scripted({WHOAMI: [half, half, says(200, {"email": "a@b.c"})]}) as (client, log):
        assert client.whoami() == "a@b.c"
    assert len(log) == 3
    with scripted({WHOAMI: [half]}) as (client, _), pytest.raises(LabelStudioUnavailableError):
        client.whoami()


def test_an_answer_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports and pages of tasks have tens of megabytes."""
    parsed: list[httpx.Response] = []
    parse = httpx.Response.json
    monkeypatch.setattr(httpx.Response, "json", lambda response: parsed.append(response) or parse(response))
    with scripted({"/api/projects/1/model-versions/": [says(200, {"v1": 3})]}) as (client, _):
        assert client.model_versions(1) == {"v1": 3}
    assert len(parsed) == 1


def test_tasks_that_are_counted_but_not_listed_are_asked_for_later() -> None:
    answers = {"/api/tasks/": [says(200, {"tasks": [], "total": 1})]}
    with scripted(answers) as (client, _), pytest.raises(LabelStudioUnavailableError, match="counts 1 tasks and lists"):
        client.annotated_task_ids(1)


@pytest.mark.usefixtures("impatient")
def test_reading_gives_up_after_a_few_tries() -> None:
    with (
        scripted({WHOAMI: [says(503, {"detail": "maintenance"})]}) as (client, log),
        pytest.raises(LabelStudioUnavailableError, match=r"503.*maintenance"),
    ):
        client.whoami()
    assert len(log) == 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [says(503), hangs_up], ids=["503", "hangs up"])
def test_an_import_is_never_sent_twice(fault: Answer) -> None:
    with (
        scripted({"/api/projects/1/import/predictions": [fault]}) as (client, log),
        pytest.raises(LabelStudioUnavailableError),
    ):
        client.import_predictions(1, [prediction(1, score=0.5)])
    assert len(log) == 1


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_unavailable() -> None:
    with scripted_server({}) as (url, _):
        pass
    with LabelStudioClient(url, "t" * 40) as client, pytest.raises(LabelStudioUnavailableError, match="is it running"):
        client.import_tasks(1, [{"data": {}}])


@pytest.mark.parametrize(
    ("answer", "explanation"),
    [
        pytest.param(says(200, b"<html>", content_type="text/html"), "really Label Studio's address", id="html"),
        pytest.param(
            says(302, location="https://x/y?s=1"), "redirect to https://x/y: set LABEL_STUDIO_URL", id="moved"
        ),
        pytest.param(says(403, {"detail": "no permission"}), "403: .*no permission", id="forbidden"),
        pytest.param(
            says(200, b"{", content_type="application/json"), "1 bytes that are no whole JSON", id="half a JSON"
        ),
    ],
)
def test_a_strange_answer_says_what_came(answer: Answer, explanation: str) -> None:
    with (
        scripted({"/api/projects/1/model-versions/": [answer]}) as (client, _),
        pytest.raises(LabelStudioError, match=explanation),
    ):
        client.model_versions(1)


def test_a_server_without_the_page_that_each_label_studio_has_is_doubted() -> None:
    with (
        scripted({WHOAMI: [says(404, {"detail": "Not Found"})]}) as (client, _),
        pytest.raises(LabelStudioError, match=rf"is {client.url} really Label Studio's address\?"),
    ):
        client.whoami()


def test_an_error_that_repeats_our_token_is_scrubbed() -> None:
    token = "0123456789" * 4
    with (
        scripted({WHOAMI: [says(403, {"detail": f"{token} may not"})]}, token) as (client, _),
        pytest.raises(LabelStudioError, match=r"\[token\] may not"),
    ):
        client.whoami()


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://host", "http://", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(LabelStudioError, match="expected Label Studio's address"):
        LabelStudioClient(url, "t" * 40)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/data/upload/1/a.png", "/data/upload/1/a.png"),
        ("http://ls:8080/data/local-files/?d=a/b.png", "/data/local-files/?d=a/b.png"),
        ("http://LS:8080/x", "/x"),
        ("https://labels.example.com/ls/data/x.png", "/data/x.png"),
        ("https://labels.example.com:443/ls/data/x.png", "/data/x.png"),
        ("https://labels.example.com/data/x.png", None),
        ("//ls:8080/x", None),
        ("http://ls/x", None),
        ("https://ls:8080/x", None),
        ("http://ls:8080@evil.example.com/x", None),
        ("http://ls:8080.evil.example.com/x", None),
        ("s3://bucket/x", None),
        ("http://[broken", None),
        ("HTTP://ls:8080/x", "/x"),
        ("http://user:word@ls:8080/x", "/x"),
        ("http://ls:8080./x", None),
        ("http://ls.:8080/x", None),
        ("http://a.ls:8080/x", None),
        ("http://ls:8081/x", None),
        ("http://ls:80800/x", None),
        ("http://ls\\@evil.example.com:8080/x", None),
        ("http://evil.example.com/http://ls:8080/x", None),
        ("http://evil.example.com#@ls:8080/x", None),
        ("http://evil.example.com?@ls:8080/x", None),
        ("http:ls:8080/x", None),
        ("http:///ls:8080/x", None),
        ("ftp://ls:8080/x", None),
        ("http://\u217cs:8080/x", None),  # a Roman numeral that looks like an l
        ("https://labels.example.com.evil.example/ls/data/x.png", None),
        ("https://evil.labels.example.com/ls/data/x.png", None),
        ("https://labels.example.com:444/ls/data/x.png", None),
        ("http://labels.example.com/ls/data/x.png", None),
        ("https://labels.example.com./ls/data/x.png", None),
    ],
)
def test_what_lives_on_label_studio_is_told_apart(address: str, path: str | None) -> None:
    with LabelStudioClient("http://ls:8080", "t" * 40, public_url="https://labels.example.com/ls") as client:
        assert client.own_path(address) == path


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

    def give_up_on_large(call: Call) -> Fault | None:
        return Fault(kind="status", status=504) if len(call.body) > 3 * one else None

    with (
        FaultProxy(label_studio.url, give_up_on_large) as proxy,
        LabelStudioClient(proxy.url, label_studio.token) as behind,
    ):
        for _ in range(2):
            with pytest.raises(LabelStudioUnavailableError):
                behind.import_predictions(project.id, sent)
        assert behind.import_predictions(project.id, sent) == 8
    assert client.predicted_task_ids(project.id, "v1") == set(ids)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_not_finite_is_no_prediction(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(ls_client._json_parts([prediction(7, score=value)], max_bytes=1000))


def test_words_that_look_like_numbers_are_sent_as_they_are() -> None:
    item = {"task": 1, "result": ["NaN", "-Infinity", "ä", 1e-7, 12.125, None, True]}
    ((part,),) = ls_client._json_parts([item], max_bytes=1000)
    assert json.loads(part) == item


@pytest.mark.parametrize("max_bytes", [20, 21, 22, 50, 1000])
def test_no_request_is_longer_than_allowed_and_nothing_is_lost(max_bytes: int) -> None:
    items = [{"a": number} for number in range(20)]
    bodies = [ls_client._json_array(parts) for parts in ls_client._json_parts(items, max_bytes=max_bytes)]
    assert max(map(len, bodies)) <= max_bytes
    assert [item for body in bodies for item in json.loads(body)] == items


def test_a_prediction_that_is_too_long_for_any_request_is_named() -> None:
    with pytest.raises(LabelStudioError, match=r"prediction of task 7 is .* bytes long"):
        list(ls_client._json_parts([prediction(7, score=0.5)], max_bytes=100))


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
