"""The annotated tasks of a project. What was read once is kept in a file, and only what changed is fetched again.

The file may be lost or damaged, which costs time and nothing else: every row carries its digest, and what it says of
the project is counted against what Label Studio says (docs/decisions/082).
"""

import hashlib
import json
import logging
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from ml_backend.ls_client import LabelStudioClient, counted_annotations
from ml_backend.ls_format import Json
from ml_backend.ls_types import AnnotatedTask

logger = logging.getLogger(__name__)

_OVERLAP = timedelta(hours=1)  # servers' clocks may differ, and a long import is seen after others that began later
_SHORT_OVERLAP = timedelta(minutes=1)  # where a change that is missed is none that a cycle misses
_LISTED_AT_ONCE = 500
_TASKS_IN_MEMORY = 1000
_PATIENCE_SECONDS = 5.0  # when another process writes


class AnnotatedTasks:
    """The tasks of a project that have an annotation that counts, as they are when this is made: iterating gives each,
    by id, with `id`, `data`, `updated_at` and all `annotations` (skipped ones too). `len` counts them; those that are
    gone before they are read are left out.

    Raises the client's errors; trouble with the file at `path` is logged.
    """

    def __init__(self, client: LabelStudioClient, project_id: int, path: Path) -> None:
        self._client, self._project_id, self._path = client, project_id, path
        with _Kept.opened(path) as kept:
            self._there = _listed(client, project_id, kept.tasks())
            kept.leave_only(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def __iter__(self) -> Iterator[Json]:
        ids = sorted(self._there)
        with _Kept.opened(self._path) as kept:
            for start in range(0, len(ids), _TASKS_IN_MEMORY):
                part = ids[start : start + _TASKS_IN_MEMORY]
                read = kept.read([self._there[number] for number in part])
                missing = [number for number in part if number not in read]
                fetched = [_slim(task) for task in self._client.annotated_tasks(self._project_id, missing)]
                kept.keep(fetched)
                read |= {task["id"]: task for task in fetched}
                yield from (read[number] for number in part if number in read)


class AnnotatedIds:
    """Which tasks of the projects are annotated, for the looks of one process: the first one lists them, later ones ask
    for what has changed."""

    def __init__(self, client: LabelStudioClient) -> None:
        self._client = client
        # By project: what is there, and when the last of all tasks had changed, as the look began.
        self._known: dict[str, tuple[dict[int, AnnotatedTask], datetime]] = {}

    def of(self, project_key: str, project_id: int) -> Set[int]:
        """The tasks with an annotation that is neither skipped nor a draft; imported ground truth does count."""
        changed_at, _ = self._client.newest_change(project_id)
        tasks, since = self._known.get(project_key, ({}, None))
        if since is None:
            tasks = {task.id: task for task in self._client.annotated(project_id)}
        else:
            if changed_at > since:
                tasks = tasks | _changed(self._client, project_id, since - _SHORT_OVERLAP)
            tasks = _agreed(self._client, project_id, tasks, 0, None)
        self._known[project_key] = tasks, changed_at
        return tasks.keys()

    def keep_only(self, project_keys: Collection[str]) -> None:
        """Nobody looks after the others any more."""
        self._known = {key: known for key, known in self._known.items() if key in project_keys}


def _listed(client: LabelStudioClient, project_id: int, known: Mapping[int, AnnotatedTask]) -> dict[int, AnnotatedTask]:
    """The annotated tasks, of which `known` have not changed if nothing says otherwise."""
    if not known:
        return {task.id: task for task in client.annotated(project_id)}
    since = max(task.updated_at for task in known.values()) - _OVERLAP
    return _agreed(client, project_id, {**known, **_changed(client, project_id, since)}, 0, None)


def _changed(client: LabelStudioClient, project_id: int, since: datetime) -> dict[int, AnnotatedTask]:
    return {task.id: task for task in client.annotated(project_id, changed_after=since)}


def _agreed(
    client: LabelStudioClient, project_id: int, known: Mapping[int, AnnotatedTask], after: int, up_to: int | None
) -> dict[int, AnnotatedTask]:
    """`known`, all of which have ids above `after` and up to `up_to`, without what Label Studio no longer has there and
    with what it has besides: halves are compared by counts, and small parts that differ are listed."""
    there = client.count_annotated(project_id, after_id=after, up_to_id=up_to)
    if there == (len(known), sum(task.annotations for task in known.values())):
        return dict(known)
    if len(known) <= _LISTED_AT_ONCE:
        return {task.id: task for task in client.annotated(project_id, after_id=after, up_to_id=up_to)}
    middle = sorted(known)[len(known) // 2]
    lower = {number: task for number, task in known.items() if number <= middle}
    upper = {number: task for number, task in known.items() if number > middle}
    return _agreed(client, project_id, lower, after, middle) | _agreed(client, project_id, upper, middle, up_to)


def _slim(task: Mapping[str, Any]) -> Json:
    """An exported task without what nobody reads here: each annotation holds a copy of the prediction it began from."""
    annotations = [{**annotation, "prediction": None} for annotation in task["annotations"]]
    return {"id": task["id"], "data": task["data"], "updated_at": task["updated_at"], "annotations": annotations}


class _Kept:
    """The file. One that is damaged, or none, is made anew; one that cannot be used is as good as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        self._open()
        if not path.exists():  # it was damaged
            self._open()

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Self]:
        """The file, which is closed at the end."""
        kept = cls(path)
        try:
            yield kept
        finally:
            kept._close()

    def tasks(self) -> dict[int, AnnotatedTask]:
        """What was read, without rows that are damaged."""
        found: dict[int, AnnotatedTask] = {}
        with self._trouble():
            if self._database:
                for row in self._database.execute("SELECT id, updated_at, annotations, content, digest FROM task"):
                    if row[4] == _digest(*row[:4]):
                        found[row[0]] = AnnotatedTask(
                            id=row[0], updated_at=datetime.fromisoformat(row[1]), annotations=row[2]
                        )
        return found

    def read(self, tasks: Sequence[AnnotatedTask]) -> dict[int, Json]:
        """Those that are kept as they are now."""
        found: dict[int, Json] = {}
        with self._trouble():
            for task in tasks if self._database else ():
                query = "SELECT updated_at, content, body FROM task WHERE id = ?"
                row = self._database.execute(query, (task.id,)).fetchone() if self._database else None
                if row and row[0] == _text(task.updated_at) and row[1] == hashlib.sha256(row[2]).digest():
                    found[task.id] = json.loads(zlib.decompress(row[2]))
        return found

    def keep(self, tasks: Sequence[Json]) -> None:
        """Keep tasks as they were read just now."""
        with self._trouble():
            if self._database and tasks:
                with self._database:
                    self._database.executemany("REPLACE INTO task VALUES (?, ?, ?, ?, ?, ?)", map(_row, tasks))

    def leave_only(self, tasks: Mapping[int, AnnotatedTask]) -> None:
        """Remove what is kept of others."""
        with self._trouble():
            if self._database:
                kept = self._database.execute("SELECT id FROM task").fetchall()
                with self._database:
                    gone = [(number,) for (number,) in kept if number not in tasks]
                    self._database.executemany("DELETE FROM task WHERE id = ?", gone)

    def _open(self) -> None:
        with self._trouble():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=_PATIENCE_SECONDS)
            self._database.execute(_TABLE)

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """After an error nothing more is read or written; a file that is damaged is removed."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._close()
            is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            logger.warning(
                "%s: what was read of annotations before cannot be used (%s), they are fetched again%s",
                self._path, error, "" if is_damaged else "; if this goes on, remove the file",
            )  # fmt: skip
            if is_damaged:
                for path in (self._path, self._path.with_name(f"{self._path.name}-journal")):
                    path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._database:
            self._database.close()
            self._database = None


_TABLE = """
    CREATE TABLE IF NOT EXISTS task
    (id INTEGER PRIMARY KEY, updated_at TEXT, annotations INTEGER, content BLOB, digest BLOB, body BLOB)
"""


def _row(task: Json) -> tuple[int, str, int, bytes, bytes, bytes]:
    """`content` is the digest of the body, `digest` that of the others."""
    body = zlib.compress(json.dumps(task).encode(), 1)
    moment, content = _text(datetime.fromisoformat(task["updated_at"])), hashlib.sha256(body).digest()
    head = task["id"], moment, len(counted_annotations(task)), content
    return (*head, _digest(*head), body)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


def _digest(*values: object) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()
