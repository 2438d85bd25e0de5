"""How Label Studio is spoken to: tokens, addresses, and faults of the network, which come from a scripted server."""

import base64
import json
import logging
from typing import Any

import httpx
import pytest

from ml_backend import ls_http, ls_tokens
from ml_backend.errors import LabelStudioAuthError, LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_client import LabelStudioClient
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import PASSWORD, USERNAME, create_annotator, prediction
from tests.scripted_server import Answer, hangs_up, says, scripted, scripted_server


@pytest.fixture(scope="module")
def access_token(label_studio: LabelStudioServer) -> str:
    """The personal access token of an account; each may have one."""
    create_annotator(label_studio, "pat@example.com")
    return label_studio.create_personal_access_token(email="pat@example.com", password=PASSWORD)


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
