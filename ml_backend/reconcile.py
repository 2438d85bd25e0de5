"""Compares what we know of a project with what Label Studio says, and plans a cycle when one is due.

Webhooks only make this happen sooner: lost, doubled or reordered, they change nothing in the end.
"""

import logging

from sqlalchemy import func, select

from ml_backend import inbox
from ml_backend.db import UNFINISHED, CycleRow, Database, ProjectRow, UsedTaskRow, utc_now
from ml_backend.planner import Decision, Situation, plan
from ml_backend.service import Service

logger = logging.getLogger(__name__)


def reconcile(service: Service, project_key: str) -> Decision:
    """Look at the project in Label Studio; if the planner says so, a cycle row is planned when this returns."""
    events = inbox.unhandled(service.database, project_key)
    project = service.label_studio.project(inbox.label_studio_id(project_key))
    annotated = service.label_studio.annotated_task_ids(project.id)
    with service.database.session() as session:
        row = session.get_one(ProjectRow, project_key)
        used = session.scalars(select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == project_key))
        new = len(annotated - set(used))
        row.title, row.annotated, row.new_annotated = project.title, len(annotated), new
        row.checked_at, row.problem = utc_now(), ""
    running = unfinished_cycle(service.database, project_key) is not None
    decision = plan(
        Situation(
            annotated=len(annotated),
            new=new,
            batch_size=service.settings.batch_size,
            running=running,
            requested=any(action == inbox.START_TRAINING for _, action in events),
        )
    )
    if decision.start:
        _plan_cycle(service.database, project_key, decision.reason)
    # A wish to train that comes during a cycle is kept for afterwards.
    handled = [number for number, action in events if not (running and action == inbox.START_TRAINING)]
    inbox.mark_handled(service.database, handled)
    return decision


def unfinished_cycle(database: Database, project_key: str) -> int | None:
    """The number of the cycle that is planned or running."""
    with database.session() as session:
        return session.scalar(
            select(CycleRow.number).where(CycleRow.project_key == project_key, CycleRow.status.in_(UNFINISHED))
        )


def _plan_cycle(database: Database, project_key: str, reason: str) -> None:
    with database.session() as session:
        last = session.scalar(select(func.max(CycleRow.number)).where(CycleRow.project_key == project_key)) or 0
        session.add(CycleRow(project_key=project_key, number=last + 1, reason=reason))
    logger.info("project %s: cycle %d starts: %s", project_key, last + 1, reason)
