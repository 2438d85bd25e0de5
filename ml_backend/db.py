"""What the service remembers between requests, in SQLite or PostgreSQL: projects, events, cycles. Never a token."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import JSON, ForeignKey, Index, create_engine, event, make_url, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

UNFINISHED = ("planned", "running")  # the statuses of a cycle that is not over
_PAUSES_SECONDS = (0.1, 0.3, 1.0)
_SQLITE_LOCKS = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
# PostgreSQL: lost connections, rollbacks of rivals, no room or memory, locks, starting or ending
_PASSING_STATES = ("08", "40", "53", "55", "57")
_FOR_GOOD = ("password", "does not exist", "pg_hba.conf", "permission denied")
# For libpq: a server that is gone without a word, or whose packets are dropped, would keep us waiting for minutes, and
# in the middle of an answer for ever. In seconds; the last in milliseconds, for what was sent and is not acknowledged.
_NOTICING_SILENCE = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
_PATIENCE_SECONDS = 0.5  # with whoever is writing, before somebody looks at the dashboard


class Base(DeclarativeBase):
    """The tables."""

    type_annotation_map = {dict[str, Any]: JSON}  # noqa: RUF012 - SQLAlchemy reads this class attribute


def utc_now() -> str:
    """ISO 8601 with microseconds: text that sorts by time in every database."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class ProjectRow(Base):
    """A Label Studio project that uses this backend; `key` is "<id>-<unix time of creation>", unique among hosts."""

    __tablename__ = "projects"

    key: Mapped[str] = mapped_column(primary_key=True)
    label_studio_id: Mapped[int]
    title: Mapped[str] = mapped_column(default="")
    problem: Mapped[str] = mapped_column(default="")  # why the project cannot be worked with at the moment
    annotated: Mapped[int] = mapped_column(default=0)  # tasks, at the last look
    new_annotated: Mapped[int] = mapped_column(default=0)  # of these, not in the last cycle's snapshot
    checked_at: Mapped[str] = mapped_column(default="")


class EventRow(Base):
    """A hint that something happened in a project: a webhook's action. Label Studio itself is asked what is true."""

    __tablename__ = "events"
    __table_args__ = (Index("unhandled_events", "project_key", "handled_at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    project_key: Mapped[str]
    action: Mapped[str]
    received_at: Mapped[str] = mapped_column(default=utc_now)
    handled_at: Mapped[str | None]


class Work:
    """What the worker does for a project while people watch. status: planned, running, done, failed (or "refused");
    stage: what it is doing now, in words."""

    project_key: Mapped[str] = mapped_column(ForeignKey("projects.key"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str] = mapped_column(default="planned")
    reason: Mapped[str] = mapped_column(default="")
    stage: Mapped[str] = mapped_column(default="waiting for the worker")
    done: Mapped[int] = mapped_column(default=0)  # of `total` steps, images or predictions in this stage
    total: Mapped[int] = mapped_column(default=0)
    version: Mapped[str | None]
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)  # counts and metrics, as the stages find them
    error: Mapped[str] = mapped_column(default="")
    planned_at: Mapped[str] = mapped_column(default=utc_now)
    finished_at: Mapped[str | None]


class CycleRow(Work, Base):
    """One turn of Algorithm 1. "refused": the gate found its version worse than the active one."""

    __tablename__ = "cycles"


class ActivationRow(Work, Base):
    """A wish that `version` is the active one and the queue in Label Studio is its queue; the worker fulfils it."""

    __tablename__ = "activations"


class PoolLookRow(Work, Base):
    """A look at the tasks that came after the last cycle, while it lasts; number 1 of its project."""

    __tablename__ = "pool_looks"


class ForgottenRow(Base):
    """A project that people do not want to see any more; it is left alone until it is connected again."""

    __tablename__ = "forgotten_projects"

    project_key: Mapped[str] = mapped_column(primary_key=True)
    delete_data: Mapped[bool] = mapped_column(default=False)  # what is on the disk and in these tables, too
    asked_at: Mapped[str] = mapped_column(default=utc_now)


class UsedTaskRow(Base):
    """An annotated task and the first cycle whose snapshot had it: what counts towards the next batch is the rest."""

    __tablename__ = "used_tasks"

    project_key: Mapped[str] = mapped_column(ForeignKey("projects.key"), primary_key=True)
    task_id: Mapped[int] = mapped_column(primary_key=True)
    first_cycle: Mapped[int]


class PostponedTaskRow(Base):
    """An annotated task whose image's host was away when somebody last asked for it; it does not count until it is
    there."""

    __tablename__ = "postponed_tasks"

    project_key: Mapped[str] = mapped_column(ForeignKey("projects.key"), primary_key=True)
    task_id: Mapped[int] = mapped_column(primary_key=True)
    tried_at: Mapped[str]


def used_tasks(database: "Database", project_key: str) -> set[int]:
    """The tasks that were in the snapshot of a cycle."""
    with database.session() as session:
        return set(session.scalars(select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == project_key)))


def is_forgotten(database: "Database", project_key: str) -> bool:
    """Whether people do not want to see the project any more."""
    with database.session() as session:
        return session.get(ForgottenRow, project_key) is not None


class UnfinishedWork(NamedTuple):
    """A cycle or an activation that is planned or running, and its version (of a cycle: once there is one)."""

    what: Literal["cycle", "activation"]
    number: int
    version: str | None

    def __str__(self) -> str:
        return f"{self.what} {self.number}" + (f" ({self.version})" if self.version else "")


def unfinished_works(database: "Database", project_key: str) -> list[UnfinishedWork]:
    """What is planned or running in a project: a cycle or an activation, or both if they were asked for in the same
    moment."""
    kinds: tuple[tuple[type[Work], Literal["cycle", "activation"]], ...] = (
        (CycleRow, "cycle"),
        (ActivationRow, "activation"),
    )
    with database.session() as session:
        return [
            UnfinishedWork(what, number, version)
            for table, what in kinds
            for number, version in session.execute(
                select(table.number, table.version).where(
                    table.project_key == project_key, table.status.in_(UNFINISHED)
                )
            )
        ]


def unfinished_work(database: "Database", project_key: str) -> UnfinishedWork | None:
    """The first of these; None when there is nothing."""
    return next(iter(unfinished_works(database, project_key)), None)


class WorkerRow(Base):
    """A worker process: when it was last alive, what it is at, and whether Label Studio lets it in."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    seen_at: Mapped[str] = mapped_column(default=utc_now)  # by the clock of the database
    project_key: Mapped[str | None]  # whose cycle it runs
    problem: Mapped[str] = mapped_column(default="")  # why Label Studio cannot be worked with


class Database:
    """The engine and its sessions; the tables are made when they are missing."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        try:
            self._create_tables()
        except DBAPIError:
            self.close()
            raise

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end of the block, rolled back on an error."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def now(self) -> str:
        """The time of day as all who share the database have it, like `utc_now`."""
        if self.engine.dialect.name == "sqlite":
            return utc_now()
        with self.engine.connect() as connection:
            moment: datetime = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        return moment.astimezone(UTC).isoformat(timespec="microseconds")

    def ping(self) -> None:
        """Raise if the database does not answer."""
        with self.engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def lock_problem(self) -> str:
        """Why nothing can be written at this moment, for people; "" when it can. SQLite takes one writer at a time."""
        address = self.engine.url
        if address.get_backend_name() != "sqlite" or not address.database:
            return ""
        try:
            connection = sqlite3.connect(address.database, timeout=_PATIENCE_SECONDS, isolation_level=None)
            with closing(connection):
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if _sqlite_code(error) not in _SQLITE_LOCKS:
                return f"{address.database} cannot be written: {error}."
            return (
                f"Another program keeps {address.database} from being written ({error}); "
                "`fuser` of that file tells which. Everything goes on when it lets go."
            )
        return ""

    def close(self) -> None:
        self.engine.dispose()

    def _create_tables(self) -> None:
        """Make what is missing. The web process and the worker start together: the slower one looks again; not at a
        server that has been silent for some time, so that people are told of it."""
        for pause in _PAUSES_SECONDS:
            try:
                return Base.metadata.create_all(self.engine)
            except DBAPIError as error:
                if _was_silent(error):
                    raise
                time.sleep(pause)
        return Base.metadata.create_all(self.engine)


def passes_by_itself(error: DBAPIError) -> bool:
    """Whether the database will go on without anybody mending its address, its rights or its tables: a lock, a lost or
    refused connection, a full disk (for which somebody has to make space, but not here)."""
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return _sqlite_code(error.orig) in {*_SQLITE_LOCKS, sqlite3.SQLITE_FULL}
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # there was no connection; why, only the text says
        return not any(words in str(error.orig) for words in _FOR_GOOD)
    return str(state).startswith(_PASSING_STATES)


def _was_silent(error: DBAPIError) -> bool:
    """Whether nobody has answered the wish for a connection."""
    from psycopg.errors import ConnectionTimeout  # not needed with SQLite, as long as nothing fails

    return isinstance(error.orig, ConnectionTimeout)


def _sqlite_code(error: sqlite3.Error) -> int:
    """Without the details that SQLite packs into its higher bits; 0 for errors of Python's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _engine(url: str) -> Engine:
    address = make_url(url)
    if not url.startswith("sqlite"):
        ours = {name: value for name, value in _NOTICING_SILENCE.items() if name not in address.query}
        return create_engine(url, pool_pre_ping=True, connect_args=ours)
    if address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    waits = {} if "timeout" in address.query else {"timeout": 30}  # seconds, for other writers
    engine = create_engine(url, connect_args=waits)

    @event.listens_for(engine, "connect")
    def _two_processes_share_the_file(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")  # the web process reads while the worker writes
        connection.execute("PRAGMA synchronous=FULL")  # a commit survives the loss of power
        connection.execute("PRAGMA foreign_keys=ON")

    return engine
