"""Events that come at the same time are kept in one transaction: a commit waits for the disk, so they wait together.

While the database is locked, away or out of space, they wait here: Label Studio never sends an event again.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError, OperationalError

from ml_backend import inbox
from ml_backend.db import Database, passes_by_itself, utc_now
from ml_backend.errors import DatabaseAwayError
from ml_backend.inbox import ProjectName
from model.errors import InvalidInputError

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 500
_MOST_WAITING_BYTES = 200_000_000  # each event holds its request open, with what Label Studio sent
_REQUEST_BYTES = 10_000  # of an open request without its body
_PAUSE_SECONDS = 1.0
_LAST_SECONDS = 5.0  # for what waits when the process ends; a try may last longer, for a lock is waited for

_KEPT_LATER = "They are kept as soon as it does; do not restart this process before."
_NEEDS_MENDING = (
    "This does not pass by itself: see that DATABASE_URL names the right database and password, and that this process "
    "may write there (rights of the file and its folder, read-only mounts). Missing tables are made when this process "
    'starts again; the events that wait are lost then, so press "Start Training" again where somebody did.'
)


@dataclass
class _Event:
    """What waits to be written as one row, and who waits for it."""

    project: ProjectName | int  # or the id alone, when Label Studio does not say when the project was made
    action: str
    size: int  # bytes, of all requests that wait for it
    answers: list[Future[None]]


class EventRecorder:
    """One thread that writes; any number of requests wait for it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._trouble: tuple[str, DBAPIError] | None = None  # since when, and what the database says
        self._changed = threading.Condition()  # of what follows
        self._waiting: list[_Event] = []  # all without an answer, the oldest first
        self._bytes = 0  # of these
        self._alone = 0  # so many of these are tried alone
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="event recorder", daemon=True)
        self._thread.start()

    async def record(self, project: ProjectName | int, action: str, *, size: int = 0) -> None:
        """Remember the project and keep the hint that something happened; returns when it is on the disk. `size`: bytes
        that the caller keeps in memory meanwhile. A project's id will do if just one known project has it.

        Raises InvalidInputError when none or several have it, what the database raises, unless that may pass, and
        DatabaseAwayError when too many wait for it or this process ends before it is back.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # from now on a caller that goes away cannot cancel what is written
        event = _Event(project, action, size + _REQUEST_BYTES, [done])
        with self._changed:
            if self._closing:
                raise DatabaseAwayError("this process ends and keeps no event any more")
            if self._waiting and self._bytes + event.size > _MOST_WAITING_BYTES:
                raise DatabaseAwayError(
                    f"events of {self._bytes // 10**6} MB wait for the database already, {_MOST_WAITING_BYTES // 10**6}"
                    f" MB are the most; this one is not kept. {self.problem}"
                )
            self._waiting.append(event)
            self._bytes += event.size
            self._changed.notify()
        # Whoever asked may hang up: the event is kept all the same, and the thread must find a future to answer.
        await asyncio.shield(asyncio.wrap_future(done))

    @property
    def problem(self) -> str:
        """Why events wait, for people; "" when none has to."""
        trouble = self._trouble
        if trouble is None:
            return ""
        since, error = trouble
        return (
            f"Label Studio's events wait since {since[:19]} UTC, for the database does not take them: "
            f"{_first_line(error)}. {_KEPT_LATER if passes_by_itself(error) else _NEEDS_MENDING}"
        )

    def close(self) -> None:
        """Write what waits, then end. While the database takes nothing, those who wait get DatabaseAwayError, after a
        few seconds at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_LAST_SECONDS)
        self._give_up()

    def _run(self) -> None:
        while group := self._next_group():
            try:
                self._write(group)
            except DBAPIError as error:
                if isinstance(error, OperationalError) or error.connection_invalidated:
                    self._wait(group, error)
                else:
                    self._refuse(group, error)
            except Exception as error:
                self._refuse(group, error)
            else:
                self._answer(group, None)

    def _next_group(self) -> list[_Event]:
        """What is written next, the first of those that wait; [] when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting[: 1 if self._alone else _MOST_AT_ONCE]

    def _write(self, events: Sequence[_Event]) -> None:
        names = {project: self._named(project) for project in {event.project for event in events}}
        for name in set(names.values()):
            inbox.remember_project(self._database, name)
        inbox.record_all(self._database, [(names[event.project].key, event.action) for event in events])
        self._trouble = None

    def _named(self, project: ProjectName | int) -> ProjectName:
        name = inbox.known_project(self._database, project) if isinstance(project, int) else project
        if name is None:
            raise InvalidInputError(
                "webhook: expected a project with id and created_at as Label Studio sends it; this one has no "
                f"created_at, and there is not just one known project with the id {project}"
            )
        return name

    def _wait(self, events: Sequence[_Event], error: DBAPIError) -> None:
        """The database's trouble, not the events': pause before the next try. Until then, those that say the same
        become one row: nobody has written any of them, so that whoever reads the row looks after all of them."""
        self._trouble = self._trouble[0] if self._trouble else utc_now(), error
        logger.warning("%d events wait for the database: %s", len(events), error.orig)
        with self._changed:
            self._waiting = _each_once(self._waiting)
            self._changed.wait_for(lambda: self._closing, _PAUSE_SECONDS)
            if not self._closing:
                return
        self._give_up()

    def _refuse(self, events: Sequence[_Event], error: Exception) -> None:
        """One of several is at fault: each is tried alone, so that nobody gets another's error."""
        if len(events) == 1:
            self._answer(events, error)
            return
        logger.warning("%d events could not be kept together, each is tried alone", len(events), exc_info=error)
        with self._changed:
            self._alone = len(events)

    def _give_up(self) -> None:
        """The process ends: those who still wait get an error."""
        with self._changed:
            if self._waiting:
                reason = _first_line(self._trouble[1]) if self._trouble else "it does not answer"
                logger.error("%d events are lost, for the database takes nothing: %s", len(self._waiting), reason)
                error = DatabaseAwayError(f"the event is lost: this process ends before the database is back: {reason}")
                self._answer(self._waiting, error)

    def _answer(self, events: Sequence[_Event], error: Exception | None) -> None:
        """`events` are the first of those that wait, unless all of them have been answered meanwhile."""
        with self._changed:
            answered, self._waiting = self._waiting[: len(events)], self._waiting[len(events) :]
            self._bytes -= sum(event.size for event in answered)
            self._alone = max(self._alone - len(answered), 0)
        for answer in (answer for event in answered for answer in event.answers):
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)


def _each_once(events: Sequence[_Event]) -> list[_Event]:
    """Those that say the same become one, which all who asked wait for; in the order of the first ones."""
    rows: dict[tuple[ProjectName | int, str], _Event] = {}
    for event in events:
        row = rows.setdefault((event.project, event.action), event)
        if row is not event:
            row.size += event.size
            row.answers += event.answers
    return list(rows.values())


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).partition("\n")[0]
