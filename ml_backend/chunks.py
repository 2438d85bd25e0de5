"""A pool cut into chunks, so that several workers can look at it: what each chunk holds and what was found, as files.

`scores/<project>/<version>.chunks/<name>/` has `plan.json`, `<number>.tasks.json` and, for what has been looked at,
`<number>.jsonl`. Each of them is whole or not there, and so is the folder.
"""

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ml_backend.ls_format import Json
from model.files import write_bytes, write_json


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
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        write_bytes(self._found(number), text.encode())

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


class Team(Protocol):
    """Several workers."""

    def see(self, pool: CutPool) -> Iterator[Json]:
        """What is found in each task of a pool, in the order of the tasks; returns when every chunk was looked at."""
        ...

    def forget(self, pool: CutPool) -> None:
        """Remove all traces of a pool whose lines are where they belong."""
        ...


def cut(folder: Path, project_key: str, version: str, tasks: Sequence[Json], *, size: int) -> CutPool:
    """Cut tasks {"id", "data"} into chunks of `size`, the last one perhaps smaller, in a folder that has none yet."""
    shutil.rmtree(folder, ignore_errors=True)  # what a crash left unfinished
    name = secrets.token_hex(4)  # a later pool of the version must not be taken for this one
    unfinished = folder / f".{name}"
    unfinished.mkdir(parents=True)
    starts = range(0, len(tasks), size)
    for number, start in enumerate(starts):
        write_json(unfinished / f"{number}.tasks.json", tasks[start : start + size])
    write_json(unfinished / "plan.json", {"chunks": len(starts), "total": len(tasks)})
    unfinished.rename(folder / name)
    return open_cut(folder, project_key, version, name)


def find_cut(folder: Path, project_key: str, version: str) -> CutPool | None:
    """The pool that was cut in a folder and is not done with; None when there is none."""
    names = [path.name for path in folder.glob("[!.]*")]
    return open_cut(folder, project_key, version, names[0]) if names else None


def open_cut(folder: Path, project_key: str, version: str, name: str) -> CutPool:
    """The pool that was cut under a name; raises FileNotFoundError when all is over."""
    plan = json.loads((folder / name / "plan.json").read_text())
    return CutPool(project_key=project_key, version=version, folder=folder / name, **plan)
