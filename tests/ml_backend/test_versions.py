"""Wishes for another version and forgotten projects: what is refused and what is written down."""

import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from ml_backend.actions import form_token
from ml_backend.activation import end_refused_cycle
from ml_backend.app import create_app
from ml_backend.cycle_log import ActivationLog, CycleLog
from ml_backend.db import (
    ActivationRow,
    CycleRow,
    EventRow,
    ForgottenRow,
    PostponedTaskRow,
    ProjectRow,
    UsedTaskRow,
    utc_now,
)
from ml_backend.forget import forget, forgotten_projects, remove_forgotten_data
from ml_backend.inbox import ProjectName, record, remember_project
from ml_backend.overview import overview
from ml_backend.service import Service
from ml_backend.versions import main, request_activation
from model.errors import TSPError
from tests.label_studio import POLYGON_CONFIG
from tests.ml_backend.examples import KEY, NOWHERE, UID, VERSION, add_version, settings

SECOND = "tsp-2-00000000"


@pytest.fixture
def service(lonely_service: Service) -> Service:
    """A project with two versions."""
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    for version in (VERSION, SECOND):
        add_version(lonely_service, KEY, version)
    lonely_service.registry.activate(KEY, SECOND)
    return lonely_service


@pytest.fixture
def web(service: Service) -> TestClient:
    return TestClient(create_app(service.settings))


def wishes(service: Service) -> list[ActivationRow]:
    with service.database.session() as session:
        return list(session.scalars(select(ActivationRow).order_by(ActivationRow.number)))


def test_a_wish_is_written_down_once_and_nothing_else_changes(service: Service) -> None:
    assert request_activation(service, KEY, VERSION, "why not") == 1
    with pytest.raises(TSPError, match=rf"activation 1 \({VERSION}\) is not finished yet"):
        request_activation(service, KEY, VERSION, "a second click")
    (wish,) = wishes(service)
    assert (wish.version, wish.status, wish.reason) == (VERSION, "planned", "why not")
    assert service.registry.active(KEY) == SECOND
    ActivationLog(service.database, KEY, 1).finish("done")
    assert request_activation(service, KEY, SECOND, "back") == 2


@pytest.mark.parametrize(
    ("key", "version", "told"),
    [
        pytest.param(KEY, "tsp-9-00000000", f"it has {VERSION}, {SECOND}", id="no"),
        pytest.param(KEY, "../../etc", "expected a name of letters", id="a path"),
        pytest.param(KEY, "", "expected a name of letters", id="nothing"),
        pytest.param("8-1700000000", VERSION, "has no version", id="another project"),
    ],
)
def test_a_version_that_there_is_not_is_named(service: Service, key: str, version: str, told: str) -> None:
    with pytest.raises(TSPError) as refused:
        request_activation(service, key, version, "")
    assert told in str(refused.value)
    assert wishes(service) == []


def test_a_version_whose_files_are_missing_is_named(service: Service) -> None:
    weights = service.registry.root / KEY / VERSION / "weights.safetensors"
    weights.unlink()
    with pytest.raises(TSPError, match=rf"{VERSION} of {KEY} is damaged: {weights} is missing"):
        request_activation(service, KEY, VERSION, "")


def test_nothing_is_switched_while_a_cycle_runs(service: Service) -> None:
    with service.database.session() as session:
        session.add(CycleRow(project_key=KEY, number=3, status="running"))
    with pytest.raises(TSPError, match="cycle 3 is not finished yet; ask again when it is"):
        request_activation(service, KEY, VERSION, "")


@pytest.mark.parametrize(("strategy", "wished"), [("tsp", 0), ("random", 1)], ids=["by score", "a chosen set"])
def test_after_a_refused_cycle_only_a_chosen_batch_has_to_be_chosen_again(
    lonely_service: Service, strategy: str, wished: int
) -> None:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    add_version(lonely_service, KEY, strategy=strategy)
    lonely_service.registry.activate(KEY, VERSION)
    with lonely_service.database.session() as session:
        session.add(CycleRow(project_key=KEY, number=2, status="running", version=SECOND))
    for _ in ("once", "a repetition after a crash changes nothing"):
        end_refused_cycle(lonely_service, KEY, 2)
        assert [wish.version for wish in wishes(lonely_service)] == [VERSION] * wished
    with lonely_service.database.session() as session:
        cycle = session.get_one(CycleRow, (KEY, 2))
    assert (cycle.status, cycle.stage, cycle.error) == ("refused", "refused", "")
    assert cycle.finished_at is not None


# The dashboard


@pytest.mark.parametrize("token", ["", "f" * 64, "ü"], ids=["none", "a wrong one", "no ASCII"])
@pytest.mark.parametrize("action", ["activate", "forget"])
def test_a_form_of_another_page_does_nothing(web: TestClient, service: Service, action: str, token: str) -> None:
    answer = web.post(f"/projects/{KEY}/{action}", data={"version": VERSION, "token": token})
    assert answer.status_code == 422
    assert "this form is not from this dashboard" in answer.text
    assert web.get(f"/projects/{KEY}/activate").status_code == 405
    assert wishes(service) == []
    assert forgotten_projects(service) == []


def test_the_dashboard_may_not_be_put_into_a_frame(web: TestClient) -> None:
    for page in ("/ui", f"/projects/{KEY}/forget"):
        answer = web.get(page)
        assert answer.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_the_button_writes_a_wish_down_and_the_dashboard_shows_it(web: TestClient, service: Service) -> None:
    page = web.get("/ui").text
    token = form_token(service.settings)
    assert service.settings.require_api_key() not in page
    assert page.count(token) == 1  # not at the version that is in use
    pressed = web.post(f"/projects/{KEY}/activate", data={"version": VERSION, "token": token}, follow_redirects=False)
    assert (pressed.status_code, pressed.headers["location"]) == (303, "../../ui")
    assert f"{VERSION}, asked for on the dashboard" in web.get("/ui").text
    again = web.post(f"/projects/{KEY}/activate", data={"version": VERSION, "token": token})
    assert again.status_code == 422
    assert f"activation 1 ({VERSION}) is not finished yet" in again.text
    (told,) = web.get("/status").json()["projects"]
    assert [wish["version"] for wish in told["activations"]] == [VERSION]
    assert [(v["version"], v["is_active"]) for v in told["versions"]] == [(SECOND, True), (VERSION, False)]


def test_while_the_store_is_away_the_button_says_so_and_leads_back(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    of_store = settings(tmp_path).model_copy(update={"store_url": f"file://{tmp_path / 'store'}"})
    with TestClient(create_app(of_store)) as web:
        (tmp_path / "store").rmdir()
        form = {"version": VERSION, "token": form_token(of_store)}
        answer = web.post(f"/projects/{KEY}/activate", data=form)
    assert answer.status_code == 503
    assert "This version cannot be used now" in answer.text
    assert "the store does not answer for" in answer.text
    assert '<a href="../../ui">Back to the dashboard</a>' in answer.text


def test_a_damaged_card_does_not_take_the_dashboard_away(web: TestClient, service: Service) -> None:
    (service.registry.root / KEY / VERSION / "card.json").write_text("{")
    assert f"version {VERSION} of {KEY} is damaged" in web.get("/ui").text


def test_the_question_whether_to_forget_a_project_calls_it_by_its_title(web: TestClient, service: Service) -> None:
    with service.database.session() as session:
        session.get_one(ProjectRow, KEY).title = "Cells <b>"
    assert f"Project &#34;Cells &lt;b&gt;&#34; ({KEY}) disappears" in web.get(f"/projects/{KEY}/forget").text


def test_a_project_is_forgotten_until_it_is_connected_again(web: TestClient, service: Service) -> None:
    assert f"Project {KEY} disappears" in web.get(f"/projects/{KEY}/forget").text
    answer = web.post(f"/projects/{KEY}/forget", data={"token": form_token(service.settings)})
    assert f"Project {KEY} is forgotten" in answer.text
    assert overview(service) == []
    assert f"Forgotten: {KEY}" in web.get("/ui").text
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 7, "created_at": "2023-11-14T22:13:20Z"}}
    assert web.post("/webhook", json=event).status_code == 200  # Label Studio keeps the webhook
    assert overview(service) == []
    web.post("/setup", json={"project": UID, "schema": POLYGON_CONFIG}).raise_for_status()
    (project,) = overview(service)
    assert (project["key"], project["active_version"], project["events"]["received"]) == (KEY, SECOND, 0)
    assert web.get("/projects/9-1/forget").status_code == 422


def test_work_for_a_forgotten_project_ends_and_its_data_goes_only_when_asked(service: Service) -> None:
    service.scores_file(KEY, VERSION).parent.mkdir(parents=True)
    service.cycle_folder(KEY, 1).mkdir(parents=True)
    record(service.database, KEY, "TASKS_CREATED")
    with service.database.session() as session:
        session.add_all([CycleRow(project_key=KEY, number=1, status="running"),
                         ActivationRow(project_key=KEY, number=1, status="done"),
                         UsedTaskRow(project_key=KEY, task_id=1, first_cycle=1),
                         PostponedTaskRow(project_key=KEY, task_id=2, tried_at=utc_now())])  # fmt: skip
    workflows: list[str] = []
    forget(service, KEY)
    remove_forgotten_data(service, KEY, workflows.extend)
    assert all(folder.exists() for folder in service.project_folders(KEY))
    log = CycleLog(service.database, KEY, 1)
    for work in (lambda: log.stage("training"), lambda: log.progress(1, 1), log.check_wanted):
        with pytest.raises(TSPError, match="asked to forget this project"):
            work()

    forget(service, KEY, delete_data=True)
    remove_forgotten_data(service, KEY, workflows.extend)
    assert all(folder.exists() for folder in service.project_folders(KEY))  # the cycle is not over
    log.finish("failed")
    for _ in ("once", "a repetition changes nothing"):
        remove_forgotten_data(service, KEY, workflows.extend)
        assert workflows == [f"cycle-{KEY}-1", f"activation-{KEY}-1"]
    assert not any(folder.exists() for folder in service.project_folders(KEY))
    with service.database.session() as session:
        left = [session.scalars(select(table)).all() for table in (ProjectRow, CycleRow, ActivationRow, UsedTaskRow,
                                                                 PostponedTaskRow, EventRow)]  # fmt: skip
        assert left == [[]] * 6
        assert session.get_one(ForgottenRow, KEY).delete_data is False
    remember_project(service.database, ProjectName(KEY, 7))  # of a webhook that was left
    assert overview(service) == []
    remember_project(service.database, ProjectName(KEY, 7), connected=True)
    assert [project["active_version"] for project in overview(service)] == [None]


# The command


def run(monkeypatch: pytest.MonkeyPatch, service: Service, *arguments: str, model_dir: Path | None = None) -> None:
    monkeypatch.setenv("MODEL_DIR", str(model_dir or service.settings.model_dir))
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", service.settings.require_api_key())
    monkeypatch.setenv("LABEL_STUDIO_URL", NOWHERE)
    monkeypatch.setattr(sys, "argv", ["versions", *arguments])
    main()


@pytest.mark.parametrize("name", [KEY, "7"], ids=["by key", "by id"])
def test_the_command_does_what_the_buttons_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], service: Service, name: str
) -> None:
    run(monkeypatch, service, "list", name)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [SECOND, VERSION]
    assert ["active" in line for line in lines] == [True, False]
    run(monkeypatch, service, "activate", name, VERSION)
    assert [wish.version for wish in wishes(service)] == [VERSION]
    run(monkeypatch, service, "forget", name)
    assert forgotten_projects(service) == [KEY]
    capsys.readouterr()
    run(monkeypatch, service, "list", name)
    assert capsys.readouterr().out.startswith(f"{KEY} is forgotten")


def test_the_command_makes_no_place_of_its_own(
    monkeypatch: pytest.MonkeyPatch, service: Service, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"{elsewhere / 'state.sqlite3'}, but no such file exists: set MODEL_DIR"):
        run(monkeypatch, service, "list", "7", model_dir=elsewhere)
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("activate", KEY, "tsp-9-00000000"), "has no version"),
        (("list", "9"), f"there is no project '9'; known are {KEY}"),
        (("list", "7"), "several projects have the id 7: name one of"),
    ],
    ids=["no version", "no project", "two projects of one id"],
)
def test_the_command_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, service: Service, arguments: tuple[str, ...], told: str
) -> None:
    if "several" in told:
        remember_project(service.database, ProjectName("7-1600000000", 7))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, service, *arguments)
    assert told in str(end.value)
