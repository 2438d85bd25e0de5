"""What people want to know of every project, gathered for the dashboard and for `/status`."""

from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from typing import Any

from sqlalchemy import select

from ml_backend import inbox
from ml_backend.db import UNFINISHED, ActivationRow, CycleRow, ForgottenRow, PoolLookRow, ProjectRow, WorkerRow
from ml_backend.empty_batch import advice
from ml_backend.errors import StoreUnavailableError
from ml_backend.first_batch import first_batch_progress
from ml_backend.pace import duration_in_words, seconds_left
from ml_backend.publication import publication_of
from ml_backend.service import Service
from ml_backend.sign_of_life import SILENT_SECONDS
from ml_backend.versions import versions_overview
from model.errors import DiskFullError, RegistryError


def worker_overview(service: Service) -> dict[str, Any]:
    """Whether workers live, what each is at, and what keeps them from working ("" when nothing does)."""
    now = datetime.fromisoformat(service.database.now())
    with service.database.session() as session:
        rows = session.scalars(select(WorkerRow).order_by(WorkerRow.name)).all()
    silent = {row.name for row in rows if (now - datetime.fromisoformat(row.seen_at)).total_seconds() > SILENT_SECONDS}
    return {
        "seen_at": max((row.seen_at for row in rows), default=None),
        "problem": "\n".join(
            [*_storage_problems(service, is_silent=len(silent) == len(rows)), *_problems(rows, silent)]
        ),
        "living": len(rows) - len(silent),
        "workers": [
            {"name": row.name, "seen_at": row.seen_at, "lives": row.name not in silent, "project": row.project_key}
            for row in rows
        ],
    }


def _storage_problems(service: Service, *, is_silent: bool) -> list[str]:
    """What keeps every worker from writing; a silent one could not say so itself."""
    locked = service.database.lock_problem() if is_silent else ""
    try:
        service.check_space()
    except DiskFullError as error:
        return list(filter(None, [f"The worker waits: {error}", locked]))
    return [locked] if locked else []


def _problems(rows: Sequence[WorkerRow], silent: Set[str]) -> list[str]:
    if not rows:
        return [
            "No worker is here. One that was just started needs a few seconds; if there is none, start "
            "`python -m ml_backend.worker` with the same environment."
        ]
    if len(silent) == len(rows):
        last = max(row.seen_at for row in rows)
        return [
            f"The worker gave no sign of life since {last[:19]} UTC. Unless it was just started, start it again: its "
            "log says why it ended."
        ]
    living = dict.fromkeys(row.problem for row in rows if row.problem and row.name not in silent)
    return [
        *living,
        *(
            f"Worker {row.name} gave no sign of life since {row.seen_at[:19]} UTC; others go on with its projects."
            for row in rows
            if row.name in silent
        ),
    ]


def overview(service: Service) -> list[dict[str, Any]]:
    """For each project: its progress towards the next cycle, its active version, and its cycles, the newest first."""
    now = service.database.now()
    with service.database.session() as session:
        forgotten = select(ForgottenRow.project_key)
        projects = session.scalars(
            select(ProjectRow).where(ProjectRow.key.not_in(forgotten)).order_by(ProjectRow.key)
        ).all()
        rows = session.scalars(select(CycleRow).order_by(CycleRow.number.desc())).all()
        activations = session.scalars(select(ActivationRow).order_by(ActivationRow.number.desc())).all()
        at_work = {row.project_key for row in rows if row.status in UNFINISHED}
        at_work |= {wish.project_key for wish in activations if wish.status in UNFINISHED}
        looks = {  # one that is shown beside work was left by a worker that was stopped
            look.project_key: _cycle(look, now)
            for look in session.scalars(select(PoolLookRow))
            if look.project_key not in at_work
        }
    cycles = {project.key: [_cycle(row, now) for row in rows if row.project_key == project.key] for project in projects}
    return [
        {
            "key": project.key,
            "id": project.label_studio_id,
            "title": project.title,
            "url": f"{service.settings.browser_url}/projects/{project.label_studio_id}/data",
            "problem": project.problem,
            "annotated": project.annotated,
            "new_annotated": project.new_annotated,
            "batch_size": service.settings.batch_size,
            "checked_at": project.checked_at,
            "events": inbox.event_counts(service.database, project.key),
            "activations": [_cycle(wish, now) for wish in activations if wish.project_key == project.key],
            "pool_look": looks.get(project.key),
            **_versions(service, project.key),
            "cycles": cycles[project.key],
            "advice": advice([cycle["facts"] for cycle in cycles[project.key]], service.settings.strategy),
        }
        for project in projects
    ]


def _first_batch(service: Service, project_key: str) -> dict[str, Any] | None:
    """How far the spread-out first batch is; None when there is none, or a version has made it needless."""
    if service.settings.cold_start != "spread" or service.registry.active(project_key) is not None:
        return None
    return first_batch_progress(service, project_key)


def _labels(service: Service, project_key: str) -> dict[str, list[str]]:
    """How the labels of the project differ from the classes of the active version: classes that are "gone" from the
    configuration, and "new" labels, which the version has not learnt."""
    version = service.registry.active(project_key)
    publication = publication_of(service, project_key, version) if version else None
    return {"gone": publication.gone, "new": publication.unlearnt} if publication else {"gone": [], "new": []}


def _versions(service: Service, project_key: str) -> dict[str, Any]:
    """The version in use and what is known of it, the versions that are kept, and why they cannot be listed."""
    found: dict[str, Any] = {"active_version": None, "first_batch": None, "labels": {"gone": [], "new": []}}
    found |= {"versions": [], "versions_problem": ""}
    try:
        found |= {
            "active_version": service.registry.active(project_key),
            "first_batch": _first_batch(service, project_key),
            "labels": _labels(service, project_key),
        }
        found["versions"] = versions_overview(service, project_key)
    except (RegistryError, StoreUnavailableError) as error:
        found["versions_problem"] = str(error)
    return found


def progress_title(projects: Sequence[Mapping[str, Any]]) -> str:
    """What the first cycle or activation that runs is at, for the title of the dashboard; "" when none runs."""
    running = [
        (work, project)
        for project in projects
        for work in (*project["activations"], *project["cycles"])
        if work["status"] == "running"
    ]
    if not running:
        return ""
    work, project = running[0]
    percent = f"{100 * work['done'] // work['total']} % " if work["total"] else ""
    stage = "waiting" if "waiting" in work["facts"] else percent + work["stage"].partition(" on ")[0]
    others = f" and {len(running) - 1} more" if len(running) > 1 else ""
    return f"{stage} - {project['title'] or 'project ' + str(project['id'])}{others}"


def _cycle(cycle: CycleRow | ActivationRow | PoolLookRow, now: str) -> dict[str, Any]:
    left = seconds_left(cycle.facts.get("pace"), cycle.total - cycle.done, now=now)
    return {
        "number": cycle.number,
        "status": cycle.status,
        "reason": cycle.reason,
        "stage": cycle.stage,
        "done": cycle.done,
        "total": cycle.total,
        "time_left": duration_in_words(left) if left is not None and cycle.status in UNFINISHED else "",
        "version": cycle.version,
        "facts": cycle.facts,
        "error": cycle.error,
        "planned_at": cycle.planned_at,
        "finished_at": cycle.finished_at,
    }
