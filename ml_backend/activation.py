"""What the worker does to make another version the active one; versions.py writes down that people want it."""

from sqlalchemy import func, select

from ml_backend.batch import choose_batch
from ml_backend.chunks import Team
from ml_backend.cycle_log import CycleLog
from ml_backend.db import UNFINISHED, ActivationRow, CycleRow, utc_now
from ml_backend.pool import score_pool
from ml_backend.publish import publish
from ml_backend.service import Service
from ml_backend.versions import add_activation
from model.errors import InvalidInputError
from model.strategies import STRATEGIES


def activate_version(
    service: Service, project_key: str, number: int, log: CycleLog, *, team: Team | None = None
) -> None:
    """Fulfil a wish: look at the tasks that the version has not seen, choose a batch if its own is used up, publish.

    Every part can be repeated and goes on where it was; until the last one, the queue stays as it is.
    """
    with service.database.session() as session:
        version = session.get_one(ActivationRow, (project_key, number)).version or ""
        query = select(CycleRow.number).where(CycleRow.project_key == project_key, CycleRow.status.in_(UNFINISHED))
        if (running := session.scalar(query.limit(1))) is not None:  # both began in the same moment
            raise InvalidInputError(f"cycle {running} has begun meanwhile; ask again when it is finished.")
        newest_cycle = session.scalar(select(func.max(CycleRow.number)).where(CycleRow.project_key == project_key)) or 0
    log.begin()
    score_pool(service, project_key, version, log, team=team)
    choose_batch(service, project_key, newest_cycle, version, log, anew_when_used_up=True)
    publish(service, project_key, version, log)


def end_refused_cycle(service: Service, project_key: str, number: int) -> None:
    """The gate has refused what a cycle made. The active version's queue stays; where it is a batch, which people have
    used up by now, the next one is asked for."""
    active = service.registry.active(project_key)
    with service.database.session() as session:
        row = session.get_one(CycleRow, (project_key, number))
        if row.status not in UNFINISHED:
            return
        row.status, row.stage, row.finished_at = "refused", "refused", utc_now()
        if active and STRATEGIES[service.registry.card(project_key, active).strategy].chooses_a_set:
            add_activation(session, project_key, active, f"cycle {number} was refused: {active} chooses the next batch")
