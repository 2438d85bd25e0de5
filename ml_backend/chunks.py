"""A pool cut into chunks, so that several workers can look at it: what each chunk holds and what was found, as files.

`scores/<project>/<version>.chunks/<name>/` has `plan.json`, `<number>.tasks.json` and, for what has been looked at,
`<number>.jsonl`. Each of them is whole or not there, and so is the folder. With an object store they lie in that alone.
"""

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ml_backend.ls_format import Json
from ml_backend.store import Store
from model.files import write_bytes, write_json

_PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class CutPool:
    """The tasks of a project's pool that a version has not seen, cut once: a worker that goes on finds the same
    chunks, in the same order."""

    project_key: str
    version: str
    folder: Path
    chunks: int
    total: int  # tasks

    def tasks(self, number: int) -> list[Json]:
        """The tasks {"id", "data"} of a chunk; raises FileNotFoundError when all is over."""
        found: list[Json] = json.loads(self._tasks(number).read_text())
        return found

    def is_seen(self, number: int) -> bool:
        """Whether there is what was found in a chunk."""
        return self._found(number).exists()

    def keep(self, number: int, lines: Iterable[Json]) -> None:
        """Write what was found in a chunk, at once and for good."""
        write_bytes(self._found(number), _as_lines(lines))

    def lines(self, number: int) -> Iterator[Json]:
        """What was found in a chunk, in the order of its tasks."""
        with self._found(number).open("rb") as file:
            yield from map(json.loads, file)

    def remove(self) -> None:
        """All is where it belongs. The folder is hidden first, so that nobody finds what a crash leaves of it."""
        with suppress(FileNotFoundError):
            self.folder.rename(self.folder.with_name(f".{self.folder.name}"))
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _tasks(self, number: int) -> Path:
        return self.folder / f"{number}.tasks.json"

    def _found(self, number: int) -> Path:
        return self.folder / f"{number}.jsonl"


@dataclass(frozen=True, kw_only=True)
class StoredPool(CutPool):
    """The same in a store; the folder has `plan.json` when it is whole."""

    store: Store = field(compare=False, repr=False)

    def tasks(self, number: int) -> list[Json]:
        found: list[Json] = json.loads(_read(self.store, self._tasks(number)))
        return found

    def is_seen(self, number: int) -> bool:
        return self.store.has(self._found(number))

    def keep(self, number: int, lines: Iterable[Json]) -> None:
        self.store.write(self._found(number), _as_lines(lines))
        if not self.store.has(self.folder / _PLAN):  # all was removed meanwhile, and nobody would come to this again
            self.store.remove(self._found(number))

    def lines(self, number: int) -> Iterator[Json]:
        yield from map(json.loads, _read(self.store, self._found(number)).splitlines())

    def remove(self) -> None:
        self.store.remove(self.folder / _PLAN)
        self.store.remove(self.folder.parent)


class Team(Protocol):
    """Several workers."""

    def see(self, pool: CutPool) -> Iterator[Json | None]:
        """What is found in each task of a pool, in the order of the tasks; returns when every chunk was looked at.
        None, several times a second, while nothing new is found."""
        ...

    def forget(self, pool: CutPool) -> None:
        """Remove all traces of a pool whose lines are where they belong."""
        ...


def cut(
    folder: Path, project_key: str, version: str, tasks: Iterable[Json], *, size: int, store: Store | None = None
) -> CutPool:
    """Cut tasks {"id", "data"} into chunks of `size`, the last one perhaps smaller, in a folder that has none yet. One
    chunk at a time is in the memory."""
    name = secrets.token_hex(4)  # a later pool of the version must not be taken for this one
    if store:
        store.remove(folder)  # what a crash left unfinished
        for file, content in _contents(tasks, size):
            store.write(folder / name / file, json.dumps(content, allow_nan=False).encode())
    else:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished = folder / f".{name}"
        unfinished.mkdir(parents=True)
        for file, content in _contents(tasks, size):
            write_json(unfinished / file, content)
        unfinished.rename(folder / name)
    return open_cut(folder, project_key, version, name, store=store)


def _contents(tasks: Iterable[Json], size: int) -> Iterator[tuple[str, Any]]:
    """The files of a cut pool, the plan last."""
    left, chunks, total = iter(tasks), 0, 0
    while chunk := list(islice(left, size)):
        yield f"{chunks}.tasks.json", chunk
        chunks, total = chunks + 1, total + len(chunk)
    yield _PLAN, {"chunks": chunks, "total": total}


def find_cut(folder: Path, project_key: str, version: str, *, store: Store | None = None) -> CutPool | None:
    """The pool that was cut in a folder and is not done with; None when there is none."""
    if store:
        names = [path.partition("/")[0] for path in store.names(folder) if path.endswith(f"/{_PLAN}")]
    else:
        names = [path.name for path in folder.glob("[!.]*")]
    return open_cut(folder, project_key, version, names[0], store=store) if names else None


def open_cut(folder: Path, project_key: str, version: str, name: str, *, store: Store | None = None) -> CutPool:
    """The pool that was cut under a name; raises FileNotFoundError when all is over."""
    what: dict[str, Any] = {"project_key": project_key, "version": version, "folder": folder / name}
    if store:
        return StoredPool(**what, **json.loads(_read(store, folder / name / _PLAN)), store=store)
    return CutPool(**what, **json.loads((folder / name / _PLAN).read_text()))


def _as_lines(lines: Iterable[Json]) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def _read(store: Store, path: Path) -> bytes:
    content = store.read(path)
    if content is None:
        raise FileNotFoundError(f"{path} is not in the store")
    return content
