"""What a training leaves beside its version: hundreds of megabytes a cycle that nobody goes on with."""

import logging
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

from sqlalchemy import select

from ml_backend.db import UNFINISHED, CycleRow
from ml_backend.errors import StoreUnavailableError
from ml_backend.service import Service
from ml_backend.store import Store
from model.together import JOB

logger = logging.getLogger(__name__)

_CHECKPOINTS = ("checkpoint", ".checkpoint")  # what the names begin with; the latter were cut off, or held to be shared


class EndedCheckpoints:
    """Removes the checkpoints of ended cycles, and what a worker that was stopped left of them, here and from the
    store."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._removed: dict[str, dict[int, str | None]] = {}  # by project: the cycles, and when they ended
        self._told: dict[str, str] = {}

    def remove(self, project_key: str) -> None:
        """Once for each cycle that has ended, and for all when a worker has started. What cannot be removed, and a
        store that does not answer, are told once, and each further call tries again. For whoever has the project's
        claim."""
        ended = self._ended(project_key)
        if ended == self._removed.get(project_key, {}):
            return
        problems = [problem for number in ended for problem in self._remove_here(project_key, number)]
        if self._service.store is not None:
            try:
                self._remove_from(self._service.store, project_key, ended)
            except StoreUnavailableError as error:
                problems.append(str(error))
        if not problems:
            self._removed[project_key] = ended
            self._told.pop(project_key, None)
        elif self._told.get(project_key) != problems[0]:
            logger.warning("project %s: checkpoints of ended cycles stay for now: %s", project_key, problems[0])
            self._told[project_key] = problems[0]

    def _ended(self, project_key: str) -> dict[int, str | None]:
        with self._service.database.session() as session:
            query = select(CycleRow.number, CycleRow.finished_at).where(
                CycleRow.project_key == project_key, CycleRow.status.not_in(UNFINISHED)
            )
            return {row.number: row.finished_at for row in session.execute(query)}

    def _remove_here(self, project_key: str, number: int) -> Iterator[str]:
        """Why something cannot be removed; the rest is."""
        folder = self._service.cycle_folder(project_key, number)
        try:
            paths = sorted(folder.iterdir()) if folder.exists() else []
        except OSError as error:
            yield str(error)
            return
        for path in paths:
            try:
                if path.name.startswith(JOB):
                    shutil.rmtree(path)
                elif path.name.startswith(_CHECKPOINTS):
                    path.unlink(missing_ok=True)
            except OSError as error:
                yield str(error)

    def _remove_from(self, store: Store, project_key: str, ended: Container[int]) -> None:
        """The newest cycle first: one that cannot be removed keeps no later one."""
        folder = self._service.cycles_folder(project_key)
        found = [path for path in map(Path, store.everything(folder)) if path.name.startswith(_CHECKPOINTS)]
        numbered = {path: int(path.parts[0]) for path in found if path.parts[0].isdecimal()}
        for path in sorted(numbered, key=lambda path: (-numbered[path], path)):
            if numbered[path] in ended:
                store.remove(folder / path)
