"""What a training leaves beside its version: hundreds of megabytes a cycle that nobody goes on with."""

import logging
from pathlib import Path

from sqlalchemy import select

from ml_backend.db import UNFINISHED, CycleRow
from ml_backend.errors import StoreUnavailableError
from ml_backend.service import Service
from ml_backend.store import Store
from ml_backend.stored_checkpoint import CHECKPOINT

logger = logging.getLogger(__name__)


class EndedCheckpoints:
    """Removes the checkpoints of ended cycles, here and from the store."""

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
        try:
            for number in ended:
                (self._service.cycle_folder(project_key, number) / CHECKPOINT).unlink(missing_ok=True)
            if (store := self._service.store) is not None:
                self._remove_from(store, project_key, ended)
        except (OSError, StoreUnavailableError) as error:
            if self._told.get(project_key) != str(error):
                logger.warning("project %s: checkpoints of ended cycles stay for now: %s", project_key, error)
            self._told[project_key] = str(error)
        else:
            self._removed[project_key] = ended
            self._told.pop(project_key, None)

    def _ended(self, project_key: str) -> dict[int, str | None]:
        with self._service.database.session() as session:
            query = select(CycleRow.number, CycleRow.finished_at).where(
                CycleRow.project_key == project_key, CycleRow.status.not_in(UNFINISHED)
            )
            return {row.number: row.finished_at for row in session.execute(query)}

    def _remove_from(self, store: Store, project_key: str, ended: dict[int, str | None]) -> None:
        folders = {str(number): self._service.cycle_folder(project_key, number) for number in ended}
        for path in map(Path, store.names(self._service.cycles_folder(project_key))):
            if path.parts[0] in folders and path.name.startswith("checkpoint"):
                store.remove(folders[path.parts[0]] / path.name)
