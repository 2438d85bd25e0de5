"""Compares what we know of a project with what Label Studio says, and plans a cycle when one is due.

Webhooks only make this happen sooner: lost, doubled or reordered, they change nothing in the end.
"""

import logging
from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from ml_backend import inbox
from ml_backend.cold_start import first_batch
from ml_backend.db import UNFINISHED, CycleRow, Database, EventRow, ProjectRow, UsedTaskRow, utc_now
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, Project
from ml_backend.planner import Decision, Situation, plan
from ml_backend.service import Service
from ml_backend.webhook_secret import guard_webhooks

logger = logging.getLogger(__name__)


def reconcile(service: Service, project_key: str) -> Decision:
    """Look at the project in Label Studio; if the planner says so, a cycle row is planned when this returns."""
    events = inbox.unhandled(service.database, project_key)
    project = service.project(project_key)
    annotated = service.label_studio.annotated_task_ids(project.id)
    now = service.database.now()
    with service.database.session() as session:
        row = session.get_one(ProjectRow, project_key)
        used = session.scalars(select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == project_key))
        new = len(annotated - set(used))
        row.title, row.annotated, row.new_annotated = project.title, len(annotated), new
        row.checked_at, row.problem = now, ""
    last, running = _cycles(service.database, project_key)
    decision = plan(
        Situation(
            annotated=len(annotated),
            new=new,
            batch_size=service.settings.batch_size,
            running=running,
            requested=any(action == inbox.START_TRAINING for _, action in events),
        )
    )
    # A wish to train that comes during a cycle is kept for afterwards.
    handled = [number for number, action in events if not (running and action == inbox.START_TRAINING)]
    if decision.start:
        _plan_cycle(service.database, project_key, last + 1, decision.reason, handled)
    else:
        inbox.mark_handled(service.database, handled)
    _repair_queue(service, project_key, project)
    guard_webhooks(service.settings, service.label_studio, project.id)
    return decision


def unfinished_cycle(database: Database, project_key: str) -> int | None:
    """The number of the cycle that is planned or running."""
    with database.session() as session:
        return session.scalar(
            select(CycleRow.number).where(CycleRow.project_key == project_key, CycleRow.status.in_(UNFINISHED))
        )


def _cycles(database: Database, project_key: str) -> tuple[int, bool]:
    """The number of the newest cycle (0: none yet), and whether one is planned or running."""
    with database.session() as session:
        query = select(CycleRow.number, CycleRow.status).where(CycleRow.project_key == project_key)
        cycles = session.execute(query.order_by(CycleRow.number)).all()
    return (cycles[-1].number if cycles else 0), any(cycle.status in UNFINISHED for cycle in cycles)


def _repair_queue(service: Service, project_key: str, project: Project) -> None:
    """Random order before the first version (Label Studio's own default is the order of import), or that of a first
    batch, then the active version's: somebody may have deleted a version, which makes Label Studio forget the one it
    showed."""
    client, version = service.label_studio, service.registry.active(project_key)
    if version is None:
        if project.sampling != UNCERTAINTY_SAMPLING:
            client.update_project(project.id, sampling=UNCERTAINTY_SAMPLING)
        batch = first_batch(service, project_key)
        version = batch.version if batch else None
    if version and project.model_version != version and unfinished_cycle(service.database, project_key) is None:
        versions = client.model_versions(project.id)
        if version in versions and project.model_version not in versions:
            client.set_model_version(project.id, version)


def _plan_cycle(database: Database, project_key: str, number: int, reason: str, handled: Sequence[int] = ()) -> None:
    """Plan a cycle and mark the events that led to it, in one transaction.

    `number` follows the newest cycle that the decision knew of, so that two deciders cannot both plan one.
    """
    try:
        with database.session() as session:
            session.add(CycleRow(project_key=project_key, number=number, reason=reason))
            session.execute(update(EventRow).where(EventRow.id.in_(handled)).values(handled_at=utc_now()))
    except IntegrityError:
        logger.info("project %s: cycle %d is planned already", project_key, number)
    else:
        logger.info("project %s: cycle %d starts: %s", project_key, number, reason)
