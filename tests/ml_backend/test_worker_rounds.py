"""The rounds of a worker within this process, one after the other: what it looks at, and when."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from dbos import DBOS
from dbos._dbos import _get_or_create_dbos_registry

from ml_backend import inbox
from ml_backend.claims import open_claims
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, ProjectRow, unfinished_work
from ml_backend.forget import forget, forgotten_projects, remove_forgotten_data
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.service import Service
from ml_backend.worker import Worker
from scripts.label_studio_server import LabelStudioServer
from tests.ml_backend.examples import VERSION, add_version, import_images, key_of, phantom_images, settings
from tests.ml_backend.test_worker import SECONDS, wait

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


def use_version(service: Service, project: Project) -> str:
    """The project's key; a tiny network is its active version."""
    key = key_of(service, project)
    add_version(service, key)
    service.registry.activate(key, VERSION)
    return key


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


def test_tasks_that_come_during_a_cycle_are_looked_at_after_it(
    begin: Callable[..., Rounds], client: LabelStudioClient, project: Project
) -> None:
    rounds = begin(TSP_RECONCILE_SECONDS=3600)
    key = use_version(rounds.service, project)
    tasks = import_images(client, project, phantom_images(3)[:2])
    rounds.go()
    assert client.predicted_task_ids(project.id, VERSION) == set(tasks)

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
    rounds.go()
    assert client.predicted_task_ids(project.id, VERSION) == {*tasks, *late}


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
