"""What is read of a project's annotations, against what a real Label Studio has, whatever happened in between."""

import sqlite3
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest

from ml_backend import annotations
from ml_backend.annotations import AnnotatedIds, AnnotatedTasks
from ml_backend.cycle import snapshot
from ml_backend.frozen import frozen_part
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.service import Service
from scripts.fault_proxy import Call, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, listed_rows, polygon_result, raw_api
from tests.ml_backend.examples import begin_cycle, grey_images, import_images, key_of

pytestmark = pytest.mark.label_studio

Read = Callable[[], list[int]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, and no hour in which everything is looked at again."""
    monkeypatch.setattr(annotations, "_OVERLAP", timedelta(0))
    monkeypatch.setattr(annotations, "_SHORT_OVERLAP", timedelta(0))
    monkeypatch.setattr(annotations, "_LISTED_AT_ONCE", 2)
    monkeypatch.setattr(annotations, "_TASKS_IN_MEMORY", 3)
    monkeypatch.setattr(annotations, "_PATIENCE_SECONDS", 0.1)


@pytest.fixture
def api(label_studio: LabelStudioServer) -> Iterator[httpx.Client]:
    with raw_api(label_studio) as api:
        yield api


class Reader:
    """Reads a project through a proxy that looks on, and compares with what is there."""

    def __init__(self, url: str, token: str, project: Project, path: Path) -> None:
        self.path, self.project = path, project
        self.exported: list[int] = []
        self.listed = 0
        self._proxy = FaultProxy(url, self._look)
        self._proxy.__enter__()
        self.client = LabelStudioClient(self._proxy.url, token)
        self._ids = AnnotatedIds(self.client)

    def close(self) -> None:
        self.client.close()
        self._proxy.__exit__(None, None, None)

    def _look(self, call: Call) -> None:
        query = parse_qs(urlsplit(call.path).query)
        self.exported += map(int, query.get("ids[]", []))
        self.listed += call.path.startswith("/api/tasks/?") and query["page_size"] != ["1"]

    def read(self) -> list[int]:
        """Read, compare with everything that Label Studio has, and tell which tasks were fetched for it. The ids, which
        a process remembers, are compared as well."""
        self.exported.clear()
        self.listed = 0
        tasks = AnnotatedTasks(self.client, self.project.id, self.path)
        found = list(tasks)
        fetched, listed = list(self.exported), self.listed
        ids = self.client.annotated_task_ids(self.project.id)
        assert self._ids.of("a project", self.project.id) == ids
        there = self.client.annotated_tasks(self.project.id, sorted(ids))
        assert found == [annotations._slim(task) for task in there]
        assert len(tasks) == len(found)
        self.listed = listed
        return fetched


@pytest.fixture
def reader(label_studio: LabelStudioServer, project: Project, tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(label_studio.url, label_studio.token, project, tmp_path / "new" / "annotations.sqlite")
    yield reader
    reader.close()


def annotated(client: LabelStudioClient, project: Project, count: int) -> tuple[list[int], list[int]]:
    """Tasks and their annotations, one each."""
    tasks = client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(count)])
    return tasks, [annotate(client, task) for task in tasks]


def annotate(client: LabelStudioClient, task: int) -> int:
    return client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)


def test_only_what_changed_is_fetched_again(
    reader: Reader, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    assert reader.read() == []
    tasks, made = annotated(client, project, 8)
    assert reader.read() == tasks
    assert reader.read() == []
    assert reader.listed == 1  # what changed since: nothing
    (new,) = client.import_tasks(project.id, [{"data": {"image": "/new.png"}}])
    assert reader.read() == []
    annotate(client, new)
    api.patch(f"/api/annotations/{made[2]}/", json={"result": []}).raise_for_status()
    assert reader.read() == [tasks[2], new]
    assert reader.listed == 1
    assert reader.read() == []


def test_ids_that_are_known_are_not_listed_again(client: LabelStudioClient, project: Project) -> None:
    ids, rows = AnnotatedIds(client), listed_rows(client)
    tasks, _ = annotated(client, project, 4)
    assert ids.of("a project", project.id) == set(tasks)
    assert ids.of("a project", project.id) == set(tasks)
    (new,) = client.import_tasks(project.id, [{"data": {"image": "/new.png"}}])
    annotate(client, new)
    assert ids.of("a project", project.id) == {*tasks, new}
    ids.keep_only({"a project"})
    assert ids.of("a project", project.id) == {*tasks, new}
    assert rows == [4, 1]
    ids.keep_only(set())
    assert ids.of("a project", project.id) == {*tasks, new}
    assert rows == [4, 1, 5]


CHANGES: dict[str, Callable[[httpx.Client, Project, int, int], httpx.Response]] = {
    "edited": lambda api, project, task, annotation: api.patch(
        f"/api/annotations/{annotation}/", json={"result": [polygon_result(label="lesion")]}
    ),
    "deleted": lambda api, project, task, annotation: api.delete(f"/api/annotations/{annotation}/"),
    "skipped": lambda api, project, task, annotation: api.patch(
        f"/api/annotations/{annotation}/", json={"was_cancelled": True}
    ),
    "made a draft": lambda api, project, task, annotation: api.post(
        f"/api/annotations/{annotation}/convert-to-draft", json={}
    ),
    "declared the truth": lambda api, project, task, annotation: api.patch(
        f"/api/annotations/{annotation}/", json={"ground_truth": True}
    ),
    "followed by a second one": lambda api, project, task, annotation: api.post(
        f"/api/tasks/{task}/annotations/", json={"result": [], "lead_time": 1}
    ),
    "followed by a skipped one": lambda api, project, task, annotation: api.post(
        f"/api/tasks/{task}/annotations/", json={"result": [], "was_cancelled": True}
    ),
    "gone with its task": lambda api, project, task, annotation: api.delete(f"/api/tasks/{task}/"),
    "gone with all of the task's": lambda api, project, task, annotation: api.post(
        "/api/dm/actions",
        params={"id": "delete_tasks_annotations", "project": project.id},
        json={"selectedItems": {"all": False, "included": [task]}},
    ),
    "of another image": lambda api, project, task, annotation: api.patch(
        f"/api/tasks/{task}/", json={"data": {"image": "/other.png"}}
    ),
    "joined by an import": lambda api, project, task, annotation: api.post(
        f"/api/projects/{project.id}/import",
        json=[{"data": {"image": "/imported.png"}, "annotations": [{"result": [polygon_result()]}]}],
    ),
    "joined by predictions that became annotations": lambda api, project, task, annotation: api.post(
        "/api/dm/actions",
        params={"id": "predictions_to_annotations", "project": project.id},
        json={"model_version": "v1", "selectedItems": {"all": False, "included": [task]}},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_annotation_that_is(
    change: str, reader: Reader, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    tasks, made = annotated(client, project, 6)
    client.import_predictions(
        project.id, [{"task": tasks[3], "result": [polygon_result()], "score": 0.5, "model_version": "v1"}]
    )
    reader.read()
    before = list(AnnotatedTasks(reader.client, project.id, reader.path))
    CHANGES[change](api, project, tasks[3], made[3]).raise_for_status()
    assert len(reader.read()) <= 2
    assert list(AnnotatedTasks(reader.client, project.id, reader.path)) != before
    assert reader.read() == []


@pytest.mark.parametrize("seed", range(2))
def test_many_changes_in_any_order(
    seed: int, reader: Reader, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    draw = np.random.default_rng(seed)
    annotated(client, project, 9)
    for _ in range(8):
        for _ in range(draw.integers(4)):
            tasks = list(client.tasks(project.id))
            task = tasks[draw.integers(len(tasks))].id
            of_task = api.get(f"/api/tasks/{task}/annotations/").json()
            if not of_task:
                annotate(client, task)
                continue
            change = str(draw.choice(sorted(set(CHANGES) - {"joined by predictions that became annotations"})))
            CHANGES[change](api, project, task, of_task[draw.integers(len(of_task))]["id"]).raise_for_status()
        reader.read()


def _overwritten(path: Path, start: float, junk: bytes) -> None:
    content = bytearray(path.read_bytes())
    at = int(start * len(content))
    content[at : at + len(junk)] = junk
    path.write_bytes(content)


def _sql(statement: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        database = sqlite3.connect(path)
        with database:
            assert database.execute(statement).rowcount > 0
        database.close()

    return run


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="lost"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"nothing that sqlite knows" * 100), id="something else"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5000]), id="cut off"),
        pytest.param(_a_folder, id="a folder"),
        *(pytest.param(lambda path, at=at: _overwritten(path, at / 10, bytes(64)), id=f"zeros at {at}0 %")
          for at in (0, 3, 6, 9)),
        *(pytest.param(lambda path, at=at: _overwritten(path, at / 10, b"\xff\x17" * 99), id=f"noise at {at}5 %")
          for at in (0, 2, 4, 7)),
        pytest.param(_sql("DELETE FROM task WHERE id % 2"), id="rows lost"),
        pytest.param(_sql("UPDATE task SET id = id + 1000000"), id="other ids"),
        pytest.param(_sql("UPDATE task SET updated_at = '2999-01-01T00:00:00+00:00'"), id="from the future"),
        pytest.param(_sql("UPDATE task SET annotations = 7"), id="other counts"),
        pytest.param(_sql("UPDATE task SET body = (SELECT max(body) FROM task)"), id="bodies of others"),
        pytest.param(_sql("UPDATE task SET body = zeroblob(200)"), id="no bodies"),
        pytest.param(
            _sql("INSERT INTO task SELECT id + 1000000, updated_at, annotations, content, digest, body FROM task"),
            id="tasks that are not there",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_damaged_costs_time_and_nothing_else(
    damage: Callable[[Path], None],
    client: LabelStudioClient,
    label_studio: LabelStudioServer,
    tmp_path: Path,
    everything: Any,
) -> None:
    path = tmp_path / "annotations.sqlite"
    expected = list(AnnotatedTasks(client, everything.id, path))
    assert len(expected) == 12
    damage(path)
    assert list(AnnotatedTasks(client, everything.id, path)) == expected
    assert list(AnnotatedTasks(client, everything.id, path)) == expected


def test_a_moment_that_was_damaged_hides_no_change(
    reader: Reader, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    tasks, made = annotated(client, project, 3)
    reader.read()
    _sql(f"UPDATE task SET updated_at = '2999-01-01T00:00:00+00:00' WHERE id = {tasks[0]}")(reader.path)
    CHANGES["edited"](api, project, tasks[1], made[1]).raise_for_status()
    assert reader.read() == tasks[:2]


@pytest.fixture(scope="module")
def everything(label_studio: LabelStudioServer) -> Project:
    """A project that only gets read."""
    with LabelStudioClient(label_studio.url, label_studio.token) as client:
        project = client.create_project(title="everything", label_config=POLYGON_CONFIG)
        annotated(client, project, 12)
    return project


def test_a_file_that_is_locked_is_left_alone(client: LabelStudioClient, everything: Project, tmp_path: Path) -> None:
    path = tmp_path / "annotations.sqlite"
    expected = list(AnnotatedTasks(client, everything.id, path))
    before = path.read_bytes()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert list(AnnotatedTasks(client, everything.id, path)) == expected
    other.close()
    assert path.read_bytes() == before


def test_a_read_that_broke_off_goes_on(reader: Reader, client: LabelStudioClient, project: Project) -> None:
    tasks, _ = annotated(client, project, 8)
    reading = iter(AnnotatedTasks(reader.client, project.id, reader.path))
    for _ in range(4):
        next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert reader.read() == tasks[6:]


def test_a_snapshot_follows_edits_and_new_names_of_labels(
    service: Service, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    key = key_of(service, project)
    tasks = import_images(client, project, grey_images(3))
    made = [annotate(client, task) for task in tasks]

    def learnt(number: int) -> list[tuple[str, ...]]:
        snapshot(service, key, number, begin_cycle(service, key, number))
        part = frozen_part(service.cycle_folder(key, number), "training")
        return [tuple(part.class_names[label - 1] for label in image.labels) for image in part.images]

    assert learnt(1) == [("cell",)] * 3
    CHANGES["edited"](api, project, tasks[1], made[1]).raise_for_status()
    assert learnt(2) == [("cell",), ("lesion",), ("cell",)]
    client.update_project(project.id, label_config=POLYGON_CONFIG.replace('"lesion"', '"lesion"/><Label value="more"'))
    renamed = [polygon_result(label="more")]
    api.patch(f"/api/annotations/{made[0]}/", json={"result": renamed}).raise_for_status()
    assert learnt(3) == [("more",), ("lesion",), ("cell",)]
