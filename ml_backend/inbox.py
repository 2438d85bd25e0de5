"""What Label Studio tells us: recorded at once and looked at later, for it waits one second and never asks again."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError

from ml_backend.db import Database, EventRow, ForgottenRow, ProjectRow, unfinished_work, utc_now
from model.errors import InvalidInputError

START_TRAINING = "START_TRAINING"
_UID = re.compile(r"([0-9]{1,9})\.([0-9]{1,12})")  # ids fit into 32 bits, as the databases and Label Studio have them


@dataclass(frozen=True)
class ProjectName:
    """A project as Label Studio names it: its id, and the key that stays unique across hosts and reinstallations."""

    key: str
    label_studio_id: int

    @classmethod
    def from_uid(cls, uid: object) -> "ProjectName | None":
        """From "<id>.<unix time of creation>", as /setup and /predict name projects; None when it is no such name."""
        match = _UID.fullmatch(str(uid))
        return cls(f"{int(match[1])}-{int(match[2])}", int(match[1])) if match else None

    @classmethod
    def from_webhook(cls, project: object) -> "ProjectName | None":
        """From the project of a webhook's payload; None when id or time of creation is missing."""
        if not isinstance(project, Mapping):
            return None
        try:
            created = datetime.fromisoformat(str(project.get("created_at"))).timestamp()
        except (ValueError, OverflowError):  # no time, or one before time began
            return None
        return cls.from_uid(f"{project.get('id')}.{int(created)}")


def label_studio_id(project_key: str) -> int:
    """The id by which Label Studio's API knows the project."""
    return int(project_key.partition("-")[0])


def remember_project(database: Database, name: ProjectName, *, connected: bool = False) -> None:
    """From now on the worker looks after this project. One that was forgotten stays so until it is `connected` again:
    its webhook in Label Studio outlives the connection."""
    with suppress(IntegrityError), database.session() as session:  # somebody else may remember it at this moment
        forgotten = session.get(ForgottenRow, name.key)
        if forgotten is not None and not connected:
            return
        if forgotten is not None:
            session.delete(forgotten)
        if session.get(ProjectRow, name.key) is None:
            session.add(ProjectRow(key=name.key, label_studio_id=name.label_studio_id))


def check_known(database: Database, project_key: str) -> None:
    """InvalidInputError when no such project was ever connected."""
    with database.session() as session:
        if session.get(ProjectRow, project_key) is None:
            known = session.scalars(select(ProjectRow.key).order_by(ProjectRow.key)).all()
            raise InvalidInputError(f"there is no project {project_key!r}; known are {', '.join(known) or 'none'}")


def project_number(project: object) -> int | None:
    """Label Studio's id in a payload, or given alone; None when it can be none."""
    number = project.get("id") if isinstance(project, Mapping) else project
    # True is an int as well; no database has a longer one
    return number if type(number) is int and number.bit_length() <= 31 else None


def known_project(database: Database, project: object) -> ProjectName | None:
    """The project of a payload that lacks the time of creation, if just one known project has its id."""
    number = project_number(project)
    if number is None:
        return None
    with database.session() as session:
        rows = session.scalars(select(ProjectRow).where(ProjectRow.label_studio_id == number)).all()
    return ProjectName(rows[0].key, rows[0].label_studio_id) if len(rows) == 1 else None


def record(database: Database, project_key: str, action: str) -> None:
    """Keep a hint that something happened; returns when it is on the disk. Of a forgotten project nothing is kept."""
    record_all(database, [(project_key, action)])


def record_all(database: Database, events: Sequence[tuple[str, str]]) -> None:
    """`record` for (project key, action) each, in one transaction: all of them are kept, or none."""
    with database.session() as session:
        forgotten = set(session.scalars(select(ForgottenRow.project_key)))
        session.add_all(EventRow(project_key=key, action=action) for key, action in events if key not in forgotten)


def unhandled(database: Database, project_key: str) -> list[tuple[int, str]]:
    """The events nobody has looked at, (id, action), the oldest first."""
    with database.session() as session:
        query = select(EventRow.id, EventRow.action).where(
            EventRow.project_key == project_key, EventRow.handled_at.is_(None)
        )
        return [(number, action) for number, action in session.execute(query.order_by(EventRow.id))]


def has_new(database: Database, project_key: str) -> bool:
    """Whether an event waits to be looked at. A wish to train during a cycle waits for its end, so it is not new."""
    is_busy = unfinished_work(database, project_key) is not None
    with database.session() as session:
        query = select(EventRow.id).where(EventRow.project_key == project_key, EventRow.handled_at.is_(None))
        if is_busy:
            query = query.where(EventRow.action != START_TRAINING)
        return session.scalar(query.limit(1)) is not None


def mark_handled(database: Database, event_ids: Sequence[int]) -> None:
    """These events have been looked at; exactly these, for others may have come meanwhile."""
    with database.session() as session:
        session.execute(update(EventRow).where(EventRow.id.in_(event_ids)).values(handled_at=utc_now()))


def event_counts(database: Database, project_key: str) -> dict[str, Any]:
    """How many events came and how many wait, for the dashboard."""
    with database.session() as session:
        of_project = select(func.count()).select_from(EventRow).where(EventRow.project_key == project_key)
        return {
            "received": session.scalar(of_project) or 0,
            "waiting": session.scalar(of_project.where(EventRow.handled_at.is_(None))) or 0,
        }
