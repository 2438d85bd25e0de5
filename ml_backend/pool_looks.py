"""This worker's looks at the pools: tasks that are imported, or lose their annotation, join the queue of the active
version, without keeping the other projects and wishes waiting."""

import math
import time
from collections.abc import Generator

from ml_backend import inbox
from ml_backend.claims import Claims
from ml_backend.cold_start import prepare_first_batch
from ml_backend.cycle_log import PoolLookLog
from ml_backend.pool import score_pool_in_steps
from ml_backend.publication import POOL, publication_of
from ml_backend.publish import import_missing
from ml_backend.service import Service
from ml_backend.team import ScoringTeam

_MOST_AT_ONCE = 2  # each has a network in the memory
_SLICE_SECONDS = 5.0  # how long a project's new tasks are worked on before the others have their turn


class PoolLooks:
    """One look for each project at most, a slice of it at each turn; whoever calls has the project's claim."""

    def __init__(self, service: Service, claims: Claims, team: ScoringTeam | None) -> None:
        self._service, self._claims, self._team = service, claims, team
        self._looked_at: dict[str, float] = {}  # when the last whole look at each began; missing: it is due
        self._changed: set[str] = set()  # projects of which an event said so since the last look began
        self._going: dict[str, Generator[object, None, None]] = {}

    def is_going(self, project_key: str) -> bool:
        """Whether a look at the project has begun and not ended."""
        return project_key in self._going

    def note_change(self, project_key: str) -> None:
        """An event says that tasks may lack a prediction."""
        self._changed.add(project_key)

    def begin_if_due(self, project_key: str, now: float) -> None:
        """Begin one, unless as many as the memory is meant for go on already."""
        if not self.is_going(project_key) and len(self._going) < _MOST_AT_ONCE and self._is_due(project_key, now):
            self._going[project_key] = self._look(project_key, began=now)

    def go_on(self, project_key: str) -> None:
        """A few seconds' work, so that annotations are noticed meanwhile, and the other projects."""
        steps = self._going.pop(project_key, None)
        if steps is None:
            return
        deadline = time.monotonic() + _SLICE_SECONDS
        for _ in steps:
            if time.monotonic() >= deadline:
                self._going[project_key] = steps
                return

    def end(self, project_key: str) -> None:
        """What it has read is kept, and the next look goes on there."""
        if steps := self._going.pop(project_key, None):
            steps.close()

    def _is_due(self, project_key: str, now: float) -> bool:
        """A clock of its own, besides that of the looks at Label Studio, which events put off for as long as people
        annotate."""
        age = now - self._looked_at.get(project_key, -math.inf)
        return project_key in self._changed or age >= self._service.settings.reconcile_seconds

    def _look(self, project_key: str, *, began: float) -> Generator[object, None, None]:
        """In steps: tasks that were imported, or lost their annotation, since the last cycle join the queue of its
        version; before the first version, a first batch is prepared."""
        self._looked_at.pop(project_key, None)
        self._changed.discard(project_key)
        version = self._service.registry.active(project_key)
        if version is not None:
            yield from self._predict_new_tasks(project_key, version)
        elif self._service.settings.cold_start == "spread":
            yield from prepare_first_batch(self._service, project_key)
        self._looked_at[project_key] = began

    def _predict_new_tasks(self, project_key: str, version: str) -> Generator[object, None, None]:
        """Also those whose predictions somebody has deleted in Label Studio, which sends no event for that."""
        log = PoolLookLog(self._service.database, project_key, 1, confirm=self._claims.confirm)
        try:
            seen = yield from score_pool_in_steps(self._service, project_key, version, log, team=self._team)
            if self._count_published(project_key, version) < seen:
                import_missing(self._service, project_key, version, log)
        finally:
            log.end()

    def _count_published(self, project_key: str, version: str) -> int:
        """How many predictions of the version Label Studio has; each task that the version has seen has one."""
        publication = publication_of(self._service, project_key, version)
        name = publication.name if publication else version
        counts = self._service.label_studio.model_versions(inbox.label_studio_id(project_key))
        return counts.get(name, 0) + counts.get(name + POOL, 0)
