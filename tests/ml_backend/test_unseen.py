"""What a look at a pool finds to do when it remembers the last one, against what a real Label Studio has."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest

from ml_backend import unseen
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.unseen import KnownPool, UnseenTasks
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import listed_rows, polygon_result, raw_api

pytestmark = pytest.mark.label_studio


@pytest.fixture(autouse=True)
def no_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unseen, "_OVERLAP", timedelta(0))


@pytest.fixture
def api(label_studio: LabelStudioServer) -> Iterator[httpx.Client]:
    with raw_api(label_studio) as api:
        yield api


class Looks:
    """A version's looks at a project, one after the other. Images of the tasks `away` are never had."""

    def __init__(self, client: LabelStudioClient, project: Project, folder: Path) -> None:
        self.client, self.project, self.folder = client, project, folder
        self.seen: set[int] = set()
        self.away: set[int] = set()
        self.known: KnownPool | None = None
        self.rows = listed_rows(client)
        self.asked = 0
        self.seen_by_others = False

    def look(self) -> list[int]:
        """The tasks that are to be looked at, after comparison with all that Label Studio has."""
        self.rows.clear()
        with UnseenTasks(self.folder) as found:
            steps = found.list_in_steps(
                self.client, self.project.id, self._seen_before, self.known, is_seen_known=not self.seen_by_others
            )
            for _ in steps:
                pass
            tasks, rows = list(found), list(self.rows)
            there = list(self.client.tasks(self.project.id))
            assert sorted(tasks, key=lambda task: task["id"]) == [
                {"id": task.id, "data": task.data}
                for task in there
                if not task.is_annotated and task.id not in self.seen
            ]
            assert len(found) == len(tasks)
            assert found.seen == len(self.seen & {task.id for task in there})
            now = {task["id"] for task in tasks} - self.away
            away = self.away & {task["id"] for task in tasks}
            self.known = found.known(seen=found.seen + len(now), seen_bytes=0, away=away)
            self.seen |= now
        assert list(self.folder.iterdir()) == []
        self.rows[:] = rows
        return [task["id"] for task in tasks]

    def _seen_before(self) -> set[int]:
        self.asked += 1
        return set(self.seen)


@pytest.fixture
def looks(client: LabelStudioClient, project: Project, tmp_path: Path) -> Looks:
    folder = tmp_path / "files"
    folder.mkdir()
    return Looks(client, project, folder)


def add(client: LabelStudioClient, project: Project, count: int) -> list[int]:
    return client.import_tasks(project.id, [{"data": {"image": f"/{number}.png"}} for number in range(count)])


def annotate(client: LabelStudioClient, task: int) -> int:
    return client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)


def test_only_what_changed_is_listed_again(
    looks: Looks, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    assert looks.look() == []
    tasks = add(client, project, 6)
    assert looks.look() == tasks
    assert looks.look() == []
    assert looks.rows == []
    asked = looks.asked
    annotation = annotate(client, tasks[2])
    assert looks.look() == []
    assert looks.rows == [1]
    assert looks.asked == asked  # the file of what was seen is not read
    api.delete(f"/api/annotations/{annotation}/").raise_for_status()
    new = add(client, project, 2)
    assert looks.look() == new
    assert looks.rows == [3]


def test_a_task_that_is_deleted_while_another_comes_is_noticed(
    looks: Looks, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    tasks = add(client, project, 3)
    looks.look()
    api.delete(f"/api/tasks/{tasks[1]}/").raise_for_status()
    new = add(client, project, 1)
    assert looks.look() == new
    assert looks.rows == [1, 3]  # what had changed, then all
    assert looks.look() == []
    assert looks.rows == []


def test_what_was_away_is_found_until_it_was_seen_or_annotated(
    looks: Looks, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    tasks = add(client, project, 4)
    looks.away = set(tasks[:3])
    assert looks.look() == tasks
    assert looks.look() == tasks[:3]
    assert looks.rows == []
    annotate(client, tasks[0])
    assert looks.look() == tasks[1:3]
    api.patch(f"/api/tasks/{tasks[1]}/", json={"data": {"image": "/other.png"}}).raise_for_status()
    assert sorted(looks.look()) == tasks[1:3]  # with its new data
    looks.away.clear()
    assert sorted(looks.look()) == tasks[1:3]
    assert looks.look() == []


@pytest.mark.parametrize("seed", range(3))
def test_many_changes_in_any_order(
    seed: int, looks: Looks, client: LabelStudioClient, project: Project, api: httpx.Client
) -> None:
    draw = np.random.default_rng(seed)
    add(client, project, 8)
    changes: list[Callable[[int], object]] = [
        lambda task: add(client, project, 2),
        lambda task: annotate(client, task),
        lambda task: client.skip(task),
        lambda task: api.delete(f"/api/tasks/{task}/"),
        lambda task: api.patch(f"/api/tasks/{task}/", json={"data": {"image": "/other.png"}}),
        lambda task: [
            api.delete(f"/api/annotations/{annotation['id']}/")
            for annotation in api.get(f"/api/tasks/{task}/annotations/").json()
        ],
        lambda task: looks.away.symmetric_difference_update({task}),
    ]
    for _ in range(10):
        for _ in range(draw.integers(4)):
            tasks = [task.id for task in client.tasks(project.id)]
            changes[draw.integers(len(changes))](tasks[draw.integers(len(tasks))])
        looks.look()


def test_a_long_list_comes_in_steps(
    looks: Looks, client: LabelStudioClient, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unseen, "_TASKS_A_STEP", 2)
    tasks = add(client, project, 5)
    with UnseenTasks(looks.folder) as found:
        assert len(list(found.list_in_steps(client, project.id, set, None, is_seen_known=False))) == 2
        assert [task["id"] for task in found] == tasks
        assert [task["id"] for task in found] == tasks  # again


def test_what_changes_while_all_are_listed_is_found_by_the_next_look(
    looks: Looks, client: LabelStudioClient, project: Project, api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that was listed as annotated loses its annotation, then one further down the list changes."""
    monkeypatch.setattr(unseen, "_TASKS_A_STEP", 1)
    tasks = add(client, project, 3)
    annotation = annotate(client, tasks[0])
    monkeypatch.setattr("ml_backend.ls_client._TASKS_A_PAGE", 1)
    with UnseenTasks(looks.folder) as found:
        steps = found.list_in_steps(client, project.id, set, None, is_seen_known=False)
        next(steps)
        api.delete(f"/api/annotations/{annotation}/").raise_for_status()
        api.patch(f"/api/tasks/{tasks[2]}/", json={"data": {"image": "/other.png"}}).raise_for_status()
        assert list(steps)
        assert [task["id"] for task in found] == tasks[1:]
        looks.known = found.known(seen=2, seen_bytes=0, away=set())
    looks.seen = set(tasks[1:])
    assert looks.look() == tasks[:1]


def test_tasks_that_come_between_two_questions_do_not_make_all_be_listed(
    looks: Looks, client: LabelStudioClient, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = add(client, project, 3)
    looks.look()
    new = add(client, project, 1)
    count_tasks = client.count_tasks

    def count_after_an_import(project_id: int) -> int:
        monkeypatch.undo()
        monkeypatch.setattr(unseen, "_OVERLAP", timedelta(0))
        new.extend(add(client, project, 1))
        return count_tasks(project_id)

    monkeypatch.setattr(client, "count_tasks", count_after_an_import)
    assert looks.look() == new
    assert looks.rows == [1, 1]
    assert len(tasks) + len(new) == 5


def test_all_are_listed_when_it_is_time(looks: Looks, client: LabelStudioClient, project: Project) -> None:
    add(client, project, 3)
    looks.look()
    assert looks.known
    looks.known = replace(looks.known, list_all_at=0.0)
    assert looks.look() == []
    assert looks.rows == [3]


def test_what_others_have_seen_is_counted_anew(looks: Looks, client: LabelStudioClient, project: Project) -> None:
    add(client, project, 1)
    looks.look()
    (new,) = add(client, project, 1)
    looks.seen.add(new)
    looks.seen_by_others = True
    assert looks.look() == []
    assert looks.known
    assert looks.known.seen == 2


def test_too_many_that_are_away_are_not_remembered(
    looks: Looks, client: LabelStudioClient, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unseen, "_MOST_AWAY", 1)
    tasks = add(client, project, 2)
    looks.away = set(tasks)
    assert looks.look() == tasks
    assert looks.known is None


def test_the_file_is_gone_after_an_error(looks: Looks) -> None:
    with pytest.raises(RuntimeError, match="stop"), UnseenTasks(looks.folder):
        raise RuntimeError("stop")
    assert list(looks.folder.iterdir()) == []
