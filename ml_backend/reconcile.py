"""Compares what we know of a project with what Label Studio says, and plans a cycle when one is due.

Webhooks only make this happen sooner: lost, doubled or reordered, they change nothing in the end.
"""

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import takewhile

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from ml_backend import inbox
from ml_backend.db import (
    ActivationRow,
    CycleRow,
    Database,
    EventRow,
    ProjectRow,
    unfinished_work,
    used_tasks,
    utc_now,
)
from ml_backend.first_batch import first_batch
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_client import UNCERTAINTY_SAMPLING
from ml_backend.ls_types import Project
from ml_backend.order import frozen_batch
from ml_backend.planner import NOTHING_ANNOTATED, Decision, Situation, plan
from ml_backend.postponed import still_postponed
from ml_backend.publication import OUR_NAME, publication_of, settle
from ml_backend.service import Service
from ml_backend.versions import request_activation
from ml_backend.webhook_secret import guard_webhooks

logger = logging.getLogger(__name__)

_FIRST_PAUSE = timedelta(minutes=5)  # after a cycle that failed before its snapshot; twice as long after the next one
_LONGEST_PAUSE = timedelta(hours=1)
_NEWEST_CYCLES = 10  # whose failures make the pause longer


def reconcile(service: Service, project_key: str, events: Sequence[tuple[int, str]] | None = None) -> Decision:
    """Look at the project in Label Studio; if the planner says so, a cycle row is planned when this returns.

    `events` are those of `inbox.unhandled` by default. LabelConfigError, before anything is planned, when no cycle
    could work with the labelling configuration.
    """
    if events is None:
        events = inbox.unhandled(service.database, project_key)
    project = service.project(project_key)
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    annotated = service.annotated.of(project_key, project.id)
    postponed = still_postponed(service, project_key, project)
    new = len(annotated - used_tasks(service.database, project_key) - postponed)
    now = service.database.now()
    cycles = _newest_cycles(service.database, project_key)
    running = unfinished_work(service.database, project_key) is not None
    decision = plan(
        Situation(
            annotated=len(annotated),
            new=new,
            batch_size=service.settings.batch_size,
            running=running,
            requested=any(action == inbox.START_TRAINING for _, action in events),
            try_again_at=_try_again_at(cycles, now),
        )
    )
    with service.database.session() as session:
        row = session.get_one(ProjectRow, project_key)
        row.title, row.annotated, row.new_annotated, row.checked_at = project.title, len(annotated), new, now
        row.problem = _problem(decision, len(annotated), row.problem)
    # A wish to train that comes during a cycle is kept for afterwards.
    handled = [number for number, action in events if not (running and action == inbox.START_TRAINING)]
    if decision.start:
        number = cycles[0].number + 1 if cycles else 1
        _plan_cycle(service.database, project_key, number, decision.reason, handled)
    else:
        inbox.mark_handled(service.database, handled)
    is_busy = unfinished_work(service.database, project_key) is not None
    _repair_queue(service, project_key, project, is_busy=is_busy)
    if not is_busy:
        _follow_labels(service, project_key, config)
    guard_webhooks(service.settings, service.label_studio, project.id, store=service.store)
    return decision


def _newest_cycles(database: Database, project_key: str) -> Sequence[CycleRow]:
    """The newest one first."""
    with database.session() as session:
        query = select(CycleRow).where(CycleRow.project_key == project_key).order_by(CycleRow.number.desc())
        return session.scalars(query.limit(_NEWEST_CYCLES)).all()


def _try_again_at(cycles: Sequence[CycleRow], now: str) -> str:
    """When a full batch leads to a cycle again, for people, after some that failed before their snapshot: they have
    used no task up, so that each look would start the next one. "": now."""
    failed = list(takewhile(lambda cycle: cycle.status == "failed" and "annotated" not in cycle.facts, cycles))
    if not failed or not failed[0].finished_at:
        return ""
    pause = min(_FIRST_PAUSE * 2 ** (len(failed) - 1), _LONGEST_PAUSE)
    until = datetime.fromisoformat(failed[0].finished_at) + pause
    is_before = timedelta(0) < until - datetime.fromisoformat(now) <= pause
    return f"{until:%Y-%m-%d %H:%M} UTC" if is_before else ""


def _problem(decision: Decision, annotated: int, told: str) -> str:
    """What the dashboard says after `told`. That nothing could be trained on stays there while it is so: the wish is
    not repeated by each look."""
    if decision.is_problem:
        return decision.reason
    return told if told == NOTHING_ANNOTATED and not annotated else ""


def _repair_queue(service: Service, project_key: str, project: Project, *, is_busy: bool) -> None:
    """Random order before the first version (Label Studio's own default is the order of import), or that of a first
    batch, then the active version's: somebody may have deleted a version, which makes Label Studio forget the one it
    showed."""
    client, version = service.label_studio, service.registry.active(project_key)
    if version is None:
        if project.sampling != UNCERTAINTY_SAMPLING:
            client.update_project(project.id, sampling=UNCERTAINTY_SAMPLING)
        batch = first_batch(service, project_key)
        name = batch.version if batch else None
    else:
        publication = publication_of(service, project_key, version)
        name = publication.name if publication else version
    if name and project.model_version != name and not is_busy:
        versions = client.model_versions(project.id)
        is_stale = project.model_version not in versions or OUR_NAME.fullmatch(project.model_version)
        if name in versions and is_stale:
            client.set_model_version(project.id, name)


def _follow_labels(service: Service, project_key: str, config: LabelConfig) -> None:
    """When the labelling configuration names the active version's classes otherwise than its predictions do, or lacks
    some, ask for these to be published anew."""
    version = service.registry.active(project_key)
    if version is None:
        return
    published = publication_of(service, project_key, version)
    if published is None or published.draws_like(config):
        settle(service, project_key, version, config, frozen_batch(service, project_key, version) or ())
        return
    reason = published.change_to(config)
    with service.database.session() as session:
        query = select(ActivationRow.reason).where(
            ActivationRow.project_key == project_key, ActivationRow.status == "failed"
        )
        failed = session.scalar(query.order_by(ActivationRow.number.desc()).limit(1))
    if reason != failed:  # else people have been told, and may ask
        logger.info("project %s: %s", project_key, reason)
        request_activation(service, project_key, version, reason)


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
