"""The rounds of a worker within this process, one after the other: what it looks at, and when."""

import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from dbos import DBOS
from dbos._dbos import _get_or_create_dbos_registry
from fastapi.testclient import TestClient

from ml_backend import inbox
from ml_backend.app import create_app
from ml_backend.claims import open_claims
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, PoolLookRow, ProjectRow, unfinished_work
from ml_backend.forget import forget, forgotten_projects, remove_forgotten_data
from ml_backend.import_turns import ImportTurns
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.overview import overview
from ml_backend.pool import read_scores, score_pool
from ml_backend.publish import import_missing
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from ml_backend.versions import request_activation
from ml_backend.worker import Worker
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, listed_rows, polygon_result, raw_api
from tests.ml_backend.examples import VERSION, add_version, import_images, key_of, phantom_images, settings
from tests.ml_backend.test_worker import SECONDS, wait
from tests.postgres import Postgres

pytestmark = pytest.mark.label_studio


class Rounds:
    """A worker that does a round when it is told to, and its service."""

    def __init__(self, service: Service, worker: Worker) -> None:
        self.service, self.worker = service, worker

    def start(self) -> None:
        """From now on the worker also runs cycles."""
        self.worker.start()

    def go(self) -> None:
        self.worker.round()

    def until(self, done: Callable[[], bool], *, each_time: Callable[[], object] = lambda: None) -> None:
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, self.problems()
            each_time()
            self.go()
            time.sleep(0.1)

    def problems(self) -> list[str]:
        with self.service.database.session() as session:
            return [row.problem for row in session.query(ProjectRow)]


@pytest.fixture
def begin(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Callable[..., Rounds]]:
    """Begins a worker with settings by the names of their variables; nobody else looks."""
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    with ExitStack() as stack:

        def begin(**environment: object) -> Rounds:
            service = stack.enter_context(closing(Service.connect(settings(tmp_path, **place, **environment))))
            claims = stack.enter_context(closing(open_claims(service.settings)))
            worker = Worker(service, claims, name="here")
            stack.callback(_get_or_create_dbos_registry().instance_info_map.clear)
            stack.callback(lambda: DBOS.destroy(workflow_completion_timeout_sec=10))
            return Rounds(service, worker)

        yield begin


@pytest.fixture
def one_task_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml_backend.pool_looks._SLICE_SECONDS", 0.0)


@pytest.fixture
def other_project(client: LabelStudioClient) -> Project:
    return client.create_project(title="another", label_config=POLYGON_CONFIG)


def annotate(client: LabelStudioClient, tasks: Sequence[int]) -> None:
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)


def shown(service: Service, key: str) -> dict[str, Any]:
    """The project as the dashboard has it."""
    (project,) = [project for project in overview(service) if project["key"] == key]
    return project


def dashboard(service: Service) -> str:
    with TestClient(create_app(service.settings)) as web:
        return web.get("/ui").text


def use_version(service: Service, project: Project) -> str:
    """The project's key; a tiny network is its active version."""
    key = key_of(service, project)
    add_version(service, key)
    service.registry.activate(key, VERSION)
    return key


def project_is_looked_at(rounds: Rounds) -> bool:
    """Whether a look at a pool has ended."""
    return bool(rounds.worker._pool_looks._looked_at)


def test_tasks_whose_event_was_lost_get_predictions_while_people_annotate(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=5)
    key = use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(3)[:2])
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks))
    tasks += import_images(client, project, phantom_images(3)[2:])
    rounds.until(
        lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks),
        each_time=lambda: inbox.record(rounds.service.database, key, "ANNOTATION_UPDATED"),
    )


def test_a_look_that_is_due_is_one_at_the_pool_too(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=3600)
    key = use_version(rounds.service, project)
    import_images(client, project, phantom_images(1))
    rounds.until(lambda: key in rounds.worker._pool_looks._looked_at)  # it has ended, later than it began
    assert rounds.worker._pool_looks._is_due(key, rounds.worker._next_look[key] + 0.001)  # rounding aside


def test_a_large_import_waits_for_that_of_another_worker(
    begin: Callable[..., Rounds],
    client: LabelStudioClient,
    project: Project,
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ml_backend.import_turns._SMALL_BYTES", 0)
    monkeypatch.setattr("ml_backend.import_turns._TELL_EVERY_SECONDS", 0.5)
    rounds = begin(DATABASE_URL=postgres.new_database(), TSP_RECONCILE_SECONDS=3600, TSP_SCORING_CHUNK=100)
    key = use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(2))
    stored: list[dict[str, int]] = []

    def let_go_when_told() -> None:
        wait(lambda: "waiting" in (shown(rounds.service, key)["pool_look"] or {}).get("facts", {}), dict)
        stored.append(client.model_versions(project.id))
        others.close()

    with closing(open_claims(rounds.service.settings)) as claims, ExitStack() as others:
        others.enter_context(ImportTurns(claims).turn(1))
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(let_go_when_told)
            rounds.until(lambda: key in rounds.worker._pool_looks._looked_at)
            waiting.result(timeout=SECONDS)
    assert stored == [{}]
    assert client.predicted_task_ids(project.id, VERSION) == set(tasks)


def test_nothing_is_published_again_when_only_a_task_is_deleted(
    begin: Callable[..., Rounds],
    label_studio: LabelStudioServer,
    client: LabelStudioClient,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    published: list[str] = []

    def import_and_note(service: Service, key: str, version: str, log: CycleLog, *, among: Set[int]) -> int:
        published.append(version)
        return import_missing(service, key, version, log, among=among)

    monkeypatch.setattr("ml_backend.pool_looks.import_missing", import_and_note)
    rounds = begin(TSP_RECONCILE_SECONDS=3600)
    key = use_version(rounds.service, project)
    gone, *tasks = import_images(client, project, phantom_images(2))
    rounds.until(lambda: key in rounds.worker._pool_looks._looked_at)
    with raw_api(label_studio) as api:
        api.delete(f"/api/tasks/{gone}/").raise_for_status()
    inbox.record(rounds.service.database, key, "TASKS_CREATED")
    rounds.go()
    rounds.until(lambda: key in rounds.worker._pool_looks._looked_at)
    assert published == [VERSION]
    assert client.predicted_task_ids(project.id, VERSION) == set(tasks)


def test_tasks_that_come_during_a_cycle_are_looked_at_after_it(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=3600)
    key = use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(3)[:2])
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks))

    with rounds.service.database.session() as session:
        session.add(CycleRow(project_key=key, number=1))
    rounds.worker._busy_with["cycle"] = "another"  # so that this one waits
    late = import_images(client, project, phantom_images(3)[2:])
    inbox.record(rounds.service.database, key, "TASKS_CREATED")
    rounds.go()
    assert not inbox.has_new(rounds.service.database, key)
    assert client.predicted_task_ids(project.id, VERSION) == set(tasks)

    CycleLog(rounds.service.database, key, 1).finish("failed", error="Told.")
    inbox.record(rounds.service.database, key, "ANNOTATION_UPDATED")
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == {*tasks, *late})


def test_a_cycle_that_ends_while_its_project_is_removed_does_not_keep_the_worker_busy(
    begin: Callable[..., Rounds], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = begin()
    key = key_of(rounds.service, project)
    with rounds.service.database.session() as session:
        session.add(CycleRow(project_key=key, number=1))
    forget(rounds.service, key, delete_data=True)

    def remove_late(service: Service, project_key: str, delete_workflows: Callable[[list[str]], None]) -> None:
        wait(lambda: unfinished_work(service.database, key) is None, rounds.problems)
        remove_forgotten_data(service, project_key, delete_workflows)

    monkeypatch.setattr("ml_backend.worker.remove_forgotten_data", remove_late)
    rounds.start()
    rounds.go()
    assert forgotten_projects(rounds.service) == []
    assert rounds.worker._busy_with == {"cycle": None, "activation": None}
    with closing(open_claims(rounds.service.settings)) as others:
        assert others.take(key)


def test_a_worker_that_is_started_while_people_annotate_goes_on_with_the_first_batch(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=3600, TSP_COLD_START="spread", TSP_BATCH_SIZE=3)
    key = key_of(rounds.service, project)
    import_images(client, project, phantom_images(4))
    reconcile(rounds.service, key)  # somebody has looked just now
    rounds.until(
        lambda: client.project(project.id).model_version.startswith("tsp-0-"),
        each_time=lambda: inbox.record(rounds.service.database, key, "ANNOTATION_UPDATED"),
    )


@pytest.mark.usefixtures("one_task_a_turn")
def test_while_many_imported_tasks_are_looked_at_other_projects_are_noticed_and_people_see_how_far_it_is(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project, other_project: Project
) -> None:
    rounds = begin(TSP_BATCH_SIZE=2)
    key, other = use_version(rounds.service, project), key_of(rounds.service, other_project)
    tasks = import_images(client, project, phantom_images(6))
    annotate(client, import_images(client, other_project, phantom_images(2)))
    rounds.worker._busy_with["cycle"] = "another"  # a cycle that is planned waits
    rounds.go()
    assert client.predicted_task_ids(project.id, VERSION) == set()
    assert unfinished_work(rounds.service.database, other) == ("cycle", 1, None)
    look = shown(rounds.service, key)["pool_look"]
    assert (look["stage"], look["total"]) == ("scoring the unlabelled images", 6)
    assert "New tasks: scoring the unlabelled images" in dashboard(rounds.service)

    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks))
    assert shown(rounds.service, key)["pool_look"] is None


@pytest.mark.usefixtures("one_task_a_turn")
@pytest.mark.parametrize("what", ["a batch", "older version", "forgetting"])
def test_what_people_want_ends_a_look_at_imported_tasks_of_the_same_project(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project, what: str
) -> None:
    rounds = begin(TSP_BATCH_SIZE=2)
    key = use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(6))
    rounds.worker._busy_with |= {"cycle": "another", "activation": "another"}  # what is planned waits for others
    rounds.go()
    assert shown(rounds.service, key)["pool_look"]["total"] == 6
    if what == "a batch":
        annotate(client, tasks[:2])
        inbox.record(rounds.service.database, key, "ANNOTATION_CREATED")
    elif what == "older version":
        request_activation(rounds.service, key, VERSION, "asked for")
    else:
        forget(rounds.service, key)
    rounds.go()
    with rounds.service.database.session() as session:
        assert session.query(PoolLookRow).all() == []
    assert len(list(read_scores(rounds.service.scores_file(key, VERSION)))) < 6
    with closing(open_claims(rounds.service.settings)) as others:
        assert others.take(key)  # whoever is free may do it


def test_predictions_that_are_deleted_in_label_studio_come_back(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project, label_studio: LabelStudioServer
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=1)
    use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(2))
    rounds.until(lambda: client.project(project.id).model_version == VERSION)
    for chosen in ({"all": False, "included": tasks[:1]}, {"all": True, "excluded": []}):
        with raw_api(label_studio) as api:
            place = {"id": "delete_tasks_predictions", "project": str(project.id)}
            assert api.post("/api/dm/actions/", params=place, json={"selectedItems": chosen}).is_success
        assert client.predicted_task_ids(project.id, VERSION) < set(tasks)
        rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks))
    assert client.project(project.id).model_version == VERSION


def test_predictions_that_people_retrieve_for_other_tasks_hide_none_that_is_missing(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=1)
    use_version(rounds.service, project)
    annotated = import_images(client, project, phantom_images(5)[:3])
    annotate(client, annotated)
    rounds.until(lambda: project_is_looked_at(rounds))
    retrieved = [{"task": task, "result": [], "score": 0.5, "model_version": VERSION} for task in annotated]
    client.import_predictions(project.id, retrieved)
    tasks = import_images(client, project, phantom_images(5)[3:])
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == {*annotated, *tasks})


def test_a_worker_that_starts_publishes_what_predictions_of_other_tasks_hide(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    first = begin(TSP_RECONCILE_SECONDS=3600)
    key = use_version(first.service, project)
    tasks = import_images(client, project, phantom_images(4)[:2])
    score_pool(first.service, key, VERSION)  # and it was killed before it had published
    annotated = import_images(client, project, phantom_images(4)[2:])
    annotate(client, annotated)
    retrieved = [{"task": task, "result": [], "score": 0.5, "model_version": VERSION} for task in annotated]
    client.import_predictions(project.id, retrieved)
    first.until(lambda: client.predicted_task_ids(project.id, VERSION) == {*annotated, *tasks})


def test_a_deleted_task_makes_label_studio_refuse_no_import(
    begin: Callable[..., Rounds], label_studio: LabelStudioServer, client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=1)
    key = use_version(rounds.service, project)
    gone, *tasks = import_images(client, project, phantom_images(3)[:2])
    rounds.until(lambda: key in rounds.worker._pool_looks._looked_at)
    with raw_api(label_studio) as api:
        api.delete(f"/api/tasks/{gone}/").raise_for_status()
    refused: list[int] = []

    def note(response: httpx.Response) -> None:
        if response.request.url.path.endswith("/import/predictions"):
            refused.append(response.status_code)

    rounds.service.label_studio._http.event_hooks = {"response": [note]}
    tasks += import_images(client, project, phantom_images(3)[2:])
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks))
    assert refused == [201]


def test_a_look_when_nothing_has_changed_lists_nothing(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=0.5)
    key = use_version(rounds.service, project)
    annotate(client, import_images(client, project, phantom_images(4))[:2])
    rounds.until(lambda: client.project(project.id).model_version == VERSION)
    rounds.until(lambda: key in rounds.worker._pool_looks._looked_at)
    rows, looks = listed_rows(rounds.service.label_studio), set[float | None]()
    rounds.until(
        lambda: len(looks - {None}) > 3, each_time=lambda: looks.add(rounds.worker._pool_looks._looked_at.get(key))
    )
    assert rows == []


@pytest.mark.usefixtures("one_task_a_turn")
def test_tasks_that_were_looked_at_just_before_the_store_went_away_get_their_predictions_later(
    begin: Callable[..., Rounds],
    client: LabelStudioClient,
    project: Project,
    postgres: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ml_backend.worker.WAIT_FOR_LABEL_STUDIO_SECONDS", 0.1)
    store = tmp_path / "store"
    store.mkdir()
    place = {"DATABASE_URL": postgres.new_database(), "TSP_STORE_URL": f"file://{store}"}
    rounds = begin(TSP_RECONCILE_SECONDS=3600, **place)
    key = use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(4)[:2])
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == set(tasks))
    late = import_images(client, project, phantom_images(4)[2:])
    inbox.record(rounds.service.database, key, "TASKS_CREATED")
    lines = rounds.service.scores_file(key, VERSION)
    rounds.until(lambda: len(list(read_scores(lines))) > 2)
    store.rename(tmp_path / "away")
    rounds.until(lambda: "the store does not answer" in shown(rounds.service, key)["problem"])
    assert len(list(read_scores(lines))) == 4
    (tmp_path / "away").rename(store)
    inbox.record(rounds.service.database, key, "ANNOTATION_UPDATED")
    rounds.until(lambda: client.predicted_task_ids(project.id, VERSION) == {*tasks, *late})


def test_a_folder_that_cannot_be_written_costs_one_cycle_and_people_are_told_when_it_is_tried_again(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    rounds = begin(TSP_BATCH_SIZE=2)
    key = key_of(rounds.service, project)
    annotate(client, import_images(client, project, phantom_images(2)))
    (tmp_path / "models" / "cycles").write_text("a file is where the folder should be")
    rounds.start()
    told = "failed before it had read the annotations. The next one starts at"
    rounds.until(
        lambda: told in shown(rounds.service, key)["problem"],
        each_time=lambda: inbox.record(rounds.service.database, key, "ANNOTATION_UPDATED"),
    )
    (cycle,) = shown(rounds.service, key)["cycles"]
    assert cycle["status"] == "failed"
    assert "cycles" in cycle["error"]
    assert told in dashboard(rounds.service)
