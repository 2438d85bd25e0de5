"""Which tasks a version has still to look at. The first look lists them all, the next ones what has changed since."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_format import Json
from model.files import naming_full_disk

_TASKS_A_STEP = 1000
_MOST_TRIES = 3  # to list what has changed while tasks are being imported
_OVERLAP = timedelta(minutes=1)  # a change may be seen after others that were made later
_LIST_ALL_EVERY_SECONDS = 3600.0  # at most, and it takes a fiftieth of the time at most
_MOST_AWAY = 10_000  # tasks that are kept in the memory
_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, kw_only=True)
class KnownPool:
    """What a look at a project has found out, for the next one of the same version."""

    tasks: frozenset[int]  # all that the project has, annotated or not
    changed_at: datetime  # when the last of them had changed, as the look began
    list_all_at: float  # time.monotonic() from which on all are listed again
    seen: int  # how many of them the version has seen ...
    seen_bytes: int  # ... and the size of the file that says so, to which another worker may add
    away: Mapping[int, Json]  # those without annotation whose images were away, {"id", "data"} by id


class UnseenTasks:
    """The tasks {"id", "data"} of a project without annotation that a version has not seen, by id.

    They lie in a file in `folder`, so that the memory holds no more than an id of each task, whatever the pool's size;
    it is gone when this is closed. `len` counts them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._naming_full_disk():
            self._file = TemporaryFile("w+", dir=folder, encoding="utf-8")  # noqa: SIM115, closed in __exit__
        self._ids: list[int | None] = []  # by line of the file; None: the line counts no more
        self._places: dict[int, int] = {}  # the lines of the tasks
        self._seen: Set[int] = frozenset()
        self._tasks: set[int] = set()  # all of the project
        self._changed_at = _LONG_AGO
        self._list_all_at = 0.0
        self.seen = 0  # how many of the project's tasks the version has seen

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return sum(task not in self._seen for task in self._places)

    def __iter__(self) -> Iterator[Json]:
        with self._naming_full_disk():
            self._file.seek(0)  # writes what is held back
        for task, line in zip(self._ids, self._file, strict=True):
            if task is not None and task not in self._seen:
                yield json.loads(line)

    def list_in_steps(
        self,
        client: LabelStudioClient,
        project_id: int,
        seen: Callable[[], Set[int]],
        known: KnownPool | None,
        *,
        is_seen_known: bool,
    ) -> Generator[None, None, None]:
        """Ask Label Studio, and `seen` for the tasks that the version has seen if that matters; yields now and then.
        `is_seen_known`: these are as many as is known.

        With what is known, tasks that were deleted are told by their number; then all are listed.
        """
        if known and time.monotonic() < known.list_all_at:
            yield from self._list_changes(client, project_id, known)
        if not self._list_all_at:
            self._forget()
            yield from self._list_all(client, project_id)
            is_seen_known = False
        if is_seen_known and known:
            self._seen, self.seen = seen() if self._places else frozenset(), known.seen
        else:
            self._seen = seen()
            self.seen = len(self._seen & self._tasks)

    def known(self, *, seen: int, seen_bytes: int, away: Set[int]) -> KnownPool | None:
        """What the next look need not ask for, when the version has now seen so many of the project's tasks, and the
        images of those `away` could not be had. None when these are too many to be remembered."""
        if len(away) > _MOST_AWAY:
            return None
        return KnownPool(
            tasks=frozenset(self._tasks),
            changed_at=self._changed_at,
            list_all_at=self._list_all_at,
            seen=seen,
            seen_bytes=seen_bytes,
            away={task["id"]: task for task in self if task["id"] in away} if away else {},
        )

    def _list_all(self, client: LabelStudioClient, project_id: int) -> Iterator[None]:
        began = time.monotonic()
        self._changed_at, _ = client.newest_change(project_id)  # before: what changes meanwhile is listed the next time
        yield from self._list(client, project_id, None, {})
        took = time.monotonic() - began
        self._list_all_at = began + max(_LIST_ALL_EVERY_SECONDS, 50 * took)

    def _list_changes(self, client: LabelStudioClient, project_id: int, known: KnownPool) -> Iterator[None]:
        """Leaves `_list_all_at` as it is when what is known does not add up to what is there."""
        away = dict(known.away)
        self._tasks, self._changed_at = set(known.tasks), known.changed_at
        for _ in range(_MOST_TRIES):
            since = self._changed_at
            self._changed_at, total = client.newest_change(project_id)
            if self._changed_at > since or total > len(self._tasks):
                yield from self._list(client, project_id, since - _OVERLAP, away)
                total = client.count_tasks(project_id)
            if total == len(self._tasks):
                self._list_all_at = known.list_all_at
                for task in away.values():
                    self._keep(task)
                return
            if total < len(self._tasks):
                return

    def _list(
        self, client: LabelStudioClient, project_id: int, since: datetime | None, away: dict[int, Json]
    ) -> Iterator[None]:
        """Those that changed after a moment, or all; what is listed is not away any more."""
        for number, task in enumerate(client.tasks(project_id, changed_after=since), start=1):
            self._tasks.add(task.id)
            away.pop(task.id, None)
            if (place := self._places.pop(task.id, None)) is not None:  # it was listed before, and has changed
                self._ids[place] = None
            if not task.is_annotated:
                self._keep({"id": task.id, "data": task.data})
            if number % _TASKS_A_STEP == 0:
                yield

    def _keep(self, task: Json) -> None:
        with self._naming_full_disk():
            self._file.write(json.dumps(task) + "\n")
        self._places[task["id"]] = len(self._ids)
        self._ids.append(task["id"])

    def _naming_full_disk(self) -> AbstractContextManager[None]:
        return naming_full_disk("the tasks that a version has still to look at", self._folder)

    def _forget(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._ids.clear()
        self._places.clear()
        self._tasks.clear()
