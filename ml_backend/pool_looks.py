"""This worker's looks at the pools: tasks that are imported, or lose their annotation, join the queue of the active
version, without keeping the other projects and wishes waiting."""

import math
import time
from collections.abc import Collection, Generator

from ml_backend import inbox
from ml_backend.claims import Claims
from ml_backend.cold_start import prepare_first_batch
from ml_backend.cycle_log import CycleLog, PoolLookLog
from ml_backend.pool import PoolSeen, score_pool_in_steps
from ml_backend.publication import POOL, publication_of
from ml_backend.publish import import_missing
from ml_backend.service import Service
from ml_backend.team import ScoringTeam
from ml_backend.unseen import KnownPool

_MOST_AT_ONCE = 2  # each has a network in the memory
_QUICKLY_COMPARED = 1000  # tasks
_SLICE_SECONDS = 5.0  # how long a project's new tasks are worked on before the others have their turn


class PoolLooks:
    """One look for each project at most, a slice of it at each turn; whoever calls has the project's claim."""

    def __init__(self, service: Service, claims: Claims, team: ScoringTeam | None) -> None:
        self._service, self._claims, self._team = service, claims, team
        self._looked_at: dict[str, float] = {}  # when the last whole look at each began; missing: it is due
        self._changed: set[str] = set()  # projects of which an event said so since the last look began
        self._going: dict[str, Generator[object, None, None]] = {}
        self._surplus: dict[tuple[str, str], int] = {}  # predictions of a project's version for tasks it has not seen
        self._known: dict[str, tuple[str, KnownPool | None]] = {}  # the last look's version, and what it has found out

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

    def keep_only(self, project_keys: Collection[str]) -> None:
        """Nobody looks after the others any more."""
        self._known = {key: known for key, known in self._known.items() if key in project_keys}
        self._surplus = {of: surplus for of, surplus in self._surplus.items() if of[0] in project_keys}

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
        of_version, known = self._known.get(project_key, (version, None))
        try:
            seen = yield from score_pool_in_steps(
                self._service,
                project_key,
                version,
                log,
                team=self._team,
                known=known if of_version == version else None,
            )
            self._publish_missing(project_key, version, seen, log)
        finally:
            log.end()
        self._known[project_key] = version, seen.known

    def _publish_missing(self, project_key: str, version: str, seen: PoolSeen, log: CycleLog) -> None:
        """Each task that the version has seen has one prediction. Those of others, which people may have retrieved, are
        a surplus that must not hide what is missing; how large it should be, a worker that starts cannot tell."""
        surplus = self._count_published(project_key, version) - seen.count
        known = self._surplus.get((project_key, version))
        is_doubtful = known is None and (surplus != 0 or seen.count <= _QUICKLY_COMPARED)
        if seen.added or is_doubtful or surplus < (known or 0):
            there = seen.known.tasks if seen.known else None
            import_missing(self._service, project_key, version, log, among=there)
            surplus = self._count_published(project_key, version) - seen.count
        self._surplus[project_key, version] = max(surplus, 0)

    def _count_published(self, project_key: str, version: str) -> int:
        """How many predictions of the version Label Studio has."""
        publication = publication_of(self._service, project_key, version)
        name = publication.name if publication else version
        counts = self._service.label_studio.model_versions(inbox.label_studio_id(project_key))
        return counts.get(name, 0) + counts.get(name + POOL, 0)
