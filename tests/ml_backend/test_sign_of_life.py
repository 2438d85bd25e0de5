"""The worker's sign of life, with and without a real Label Studio, and what the dashboard makes of it."""

import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from ml_backend.app import create_app
from ml_backend.db import WorkerRow
from ml_backend.overview import worker_overview
from ml_backend.service import Service
from ml_backend.sign_of_life import SignOfLife, TokenCheck
from ml_backend.store import Store
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import LabelStudioServer, free_port
from tests.label_studio import USERNAME
from tests.ml_backend.examples import settings
from tests.scripted_server import says, scripted_server

NAME = "host-1"
# The middle part of JSON web tokens, as Label Studio fills it in
REFRESH_TOKEN = base64.urlsafe_b64encode(b'{"token_type": "refresh"}').decode().rstrip("=")
ACCESS_TOKEN = base64.urlsafe_b64encode(b'{"token_type": "access"}').decode().rstrip("=")


def sign_of_life(service: Service, name: str = NAME) -> SignOfLife:
    return SignOfLife(service.database, service.label_studio, name=name, ask_every_seconds=60)


def test_a_worker_that_was_never_started_is_a_problem(lonely_service: Service) -> None:
    assert "start `python -m ml_backend.worker`" in worker_overview(lonely_service)["problem"]


def test_a_worker_that_lives_is_none(lonely_service: Service) -> None:
    sign_of_life(lonely_service).give()
    assert worker_overview(lonely_service)["problem"] == ""


def test_a_living_worker_touches_its_file_for_health_checks(lonely_service: Service, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    life = SignOfLife(
        lonely_service.database, lonely_service.label_studio, name=NAME, ask_every_seconds=60, alive_file=file
    )
    life.give()
    os.utime(file, (0, 0))
    life.give()
    assert time.time() - file.stat().st_mtime < 10


def test_a_worker_that_fell_silent_is_a_problem(lonely_service: Service) -> None:
    sign_of_life(lonely_service).give()
    with lonely_service.database.session() as session:
        session.get_one(WorkerRow, NAME).seen_at = "2025-01-02T03:04:05.000000+00:00"
    assert "no sign of life since 2025-01-02T03:04:05 UTC" in worker_overview(lonely_service)["problem"]


def test_label_studio_being_away_is_told_before_any_project_is_known(
    lonely_service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    life = sign_of_life(lonely_service)
    life.ask()
    life.give()  # does not forget the answer
    life.ask()
    assert "no answer from Label Studio" in worker_overview(lonely_service)["problem"]
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1  # once, not every minute


def test_a_store_that_lets_nobody_in_is_told_until_it_does(
    lonely_service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bucket"
    store = Store(f"file://{folder}", tmp_path)
    life = SignOfLife(lonely_service.database, lonely_service.label_studio, store, name=NAME, ask_every_seconds=60)
    life.give()
    for _ in range(2):
        life.ask()
        problem = worker_overview(lonely_service)["problem"]
        assert "no answer from Label Studio" in problem
        assert f"the store does not answer for file://{folder}/checks/{NAME}: the folder is not there" in problem
    assert caplog.text.count("the store does not answer") == 1
    folder.mkdir()
    life.ask()
    assert "the store" not in worker_overview(lonely_service)["problem"]
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    folder.rename(tmp_path / "away")
    life.ask()  # from now on it is not asked
    assert "the store" not in worker_overview(lonely_service)["problem"]


@pytest.mark.label_studio
def test_the_owner_of_a_good_token_is_told_to_the_log_alone(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ml_backend.sign_of_life")
    sign_of_life(service).ask()
    assert f"knows us as {USERNAME}" in caplog.text
    assert worker_overview(service)["problem"] == ""
    with service.database.session() as session:
        row = vars(session.get_one(WorkerRow, NAME))
    assert USERNAME not in f"{worker_overview(service)} {row}"  # anybody may read /status


@pytest.mark.label_studio
@pytest.mark.parametrize(
    ("token", "kind"),
    [("f" * 40, "a legacy token"), (f"eyJhbGciOiJIUzI1NiJ9.{REFRESH_TOKEN}.c2lnbmF0dXJl", "a personal access token")],
    ids=["legacy", "personal"],
)
def test_a_wrong_token_is_told_on_the_dashboard_with_what_to_do(
    label_studio: LabelStudioServer, tmp_path: Path, token: str, kind: str
) -> None:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": token}
    wrong = Service.connect(settings(tmp_path, **place))
    sign_of_life(wrong).ask()
    wrong.close()
    with TestClient(create_app(settings(tmp_path, **place))) as web:
        page, problem = web.get("/ui").text, web.get("/status").json()["worker"]["problem"]
    for told in (page, problem):
        assert f"Label Studio refused the token, which looks like {kind}" in told
        assert "LABEL_STUDIO_API_KEY" in told
        assert token not in told


@pytest.mark.label_studio
def test_a_web_process_alone_says_that_its_token_is_wrong(label_studio: LabelStudioServer, tmp_path: Path) -> None:
    token = "f" * 40
    environment = {
        "LABEL_STUDIO_URL": label_studio.url,
        "LABEL_STUDIO_API_KEY": token,
        "MODEL_DIR": str(tmp_path / "models"),
        "PORT": str(free_port()),
        "TSP_RECONCILE_SECONDS": "0.1",
    }
    web = BackendProcesses(settings=environment, log_dir=tmp_path)
    try:
        web.start_one("web")
        web.wait_until_it_answers()
        _wait(lambda: "refused the token" in httpx.get(f"{web.url}/status").json()["label_studio"]["problem"])
        page = httpx.get(f"{web.url}/ui").text
    finally:
        web.stop()
    log = (tmp_path / "web.log").read_text()
    assert log.count("Label Studio refused the token, which looks like a legacy token") == 1
    assert "Label Studio refused the token, which looks like a legacy token" in page
    assert token not in log + page


def test_the_web_process_answers_while_it_waits_for_label_studio(tmp_path: Path) -> None:
    has_asked, may_answer = threading.Event(), threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        has_asked.set()
        may_answer.wait()
        says(401, {"detail": "Invalid token."})(handler)

    with (
        scripted_server({"/api/current-user/whoami": [answer]}) as (url, _),
        TestClient(create_app(settings(tmp_path, LABEL_STUDIO_URL=url))) as web,
    ):
        assert has_asked.wait(60)
        assert web.get("/health").status_code == 200
        assert web.get("/status").json()["label_studio"]["problem"] == ""
        may_answer.set()
        _wait(lambda: "Label Studio said: " in web.get("/ui").text)


def test_what_has_not_changed_is_not_logged_again(lonely_service: Service, caplog: pytest.LogCaptureFixture) -> None:
    check = TokenCheck(lonely_service.label_studio)
    assert check.ask() == check.ask() != ""
    assert caplog.text.count("no answer from Label Studio") == 1


def test_what_the_worker_says_of_label_studio_is_not_said_twice(tmp_path: Path, lonely_service: Service) -> None:
    sign_of_life(lonely_service).ask()
    sign_of_life(lonely_service).give()
    with TestClient(create_app(settings(tmp_path))) as web:
        _wait(lambda: web.get("/status").json()["label_studio"]["problem"] != "")
        assert web.get("/ui").text.count("no answer from Label Studio") == 1


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("module", "token", "told"),
    [("ml_backend.worker", "", "LABEL_STUDIO_API_KEY is not set"),
     ("ml_backend.app", "two words", "has blanks or characters that no token has"),
     ("ml_backend.worker", f"a.{ACCESS_TOKEN}.b", "is an access token, which dies after 5 minutes")],
    ids=["missing", "mangled", "access token"],
)  # fmt: skip
def test_no_process_starts_without_something_that_can_be_a_token(
    module: str, token: str, told: str, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], "LABEL_STUDIO_API_KEY": token, "MODEL_DIR": str(tmp_path), "PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not token or token not in ended.stderr
