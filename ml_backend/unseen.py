"""Which tasks a version has still to look at. The first look lists them all, the next ones what has changed since."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_format import Json
from model.files import naming_full_disk

_TASKS_A_STEP = 1000
_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True, kw_only=True)
class KnownPool:
    """What a look at a project has found out, for the next one of the same version."""

    tasks: frozenset[int]  # all that the project has, annotated or not
    listed_at: float  # time.monotonic() when they were last listed
    changed_at: datetime  # when the last of them had changed
    seen: int  # how many of them the version has seen ...
    seen_bytes: int  # ... and the size of the file that says so, to which another worker may add
    away: Mapping[int, Json]  # those without annotation whose images were away, {"id", "data"} by id


class UnseenTasks:
    """The tasks {"id", "data"} of a project without annotation that a version has not seen, by id.

    They lie in a file in `folder`, so that the memory holds no more than an id of each task, whatever the pool's size;
    it is gone when this is closed. `len` counts them.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile("w+", dir=folder, encoding="utf-8")  # noqa: SIM115, closed in __exit__
        self._folder = folder
        self._ids: list[int] = []
        self._seen: Set[int] = frozenset()
        self._tasks: set[int] = set()  # all of the project
        self._changed_at = _LONG_AGO
        self._listed_at = 0.0
        self.seen = 0  # how many of the project's tasks the version has seen

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return sum(task not in self._seen for task in self._ids)

    def __iter__(self) -> Iterator[Json]:
        self._file.seek(0)
        for task, line in zip(self._ids, self._file, strict=True):
            if task not in self._seen:
                yield json.loads(line)

    def list_in_steps(
        self, client: LabelStudioClient, project_id: int, seen: Callable[[], Set[int]], known: KnownPool | None
    ) -> Generator[None, None, None]:
        """Ask Label Studio, and `seen` for the tasks that the version has seen if that matters; yields now and then.

        With what is `known`, tasks that were deleted, or that changed unseen, are told by counts; then all are listed.
        """
        if known:
            yield from self._list(client, project_id, known)
            if client.count_tasks(project_id) == len(self._tasks):
                self._seen, self.seen = seen() if self._ids else frozenset(), known.seen
                return
            self._forget()
        self._listed_at = time.monotonic()
        yield from self._list(client, project_id, None)
        self._seen = seen()
        self.seen = len(self._seen & self._tasks)

    def known(self, *, seen: int, seen_bytes: int, away: Set[int]) -> KnownPool:
        """What the next look need not ask for, when the version has now seen so many of the project's tasks, and the
        images of those `away` could not be had."""
        return KnownPool(
            tasks=frozenset(self._tasks),
            listed_at=self._listed_at,
            changed_at=self._changed_at,
            seen=seen,
            seen_bytes=seen_bytes,
            away={task["id"]: task for task in self if task["id"] in away} if away else {},
        )

    def _list(self, client: LabelStudioClient, project_id: int, known: KnownPool | None) -> Iterator[None]:
        """All tasks, or those that changed after what is known."""
        away: dict[int, Json] = {}
        if known:
            self._tasks, self._changed_at, away = set(known.tasks), known.changed_at, dict(known.away)
            self._listed_at = known.listed_at
        listed = client.tasks(project_id, changed_after=known.changed_at if known else None)
        with naming_full_disk("the tasks that a version has still to look at", self._folder):
            for number, task in enumerate(listed, start=1):
                self._tasks.add(task.id)
                self._changed_at = max(self._changed_at, task.updated_at)
                away.pop(task.id, None)
                if not task.is_annotated:
                    self._keep({"id": task.id, "data": task.data})
                if number % _TASKS_A_STEP == 0:
                    yield
            for one in away.values():
                self._keep(one)
            self._file.flush()

    def _keep(self, task: Json) -> None:
        self._file.write(json.dumps(task) + "\n")
        self._ids.append(task["id"])

    def _forget(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._ids.clear()
        self._tasks, self._changed_at = set(), _LONG_AGO
