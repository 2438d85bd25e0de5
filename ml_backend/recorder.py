"""Events that come at the same time are kept in one transaction: a commit waits for the disk, so they wait together.

While the database is locked, away or out of space, they wait here: Label Studio never sends an event again.
"""

import asyncio
import logging
import threading
from concurrent.futures import Future
from queue import SimpleQueue

from sqlalchemy.exc import DBAPIError, OperationalError

from ml_backend import inbox
from ml_backend.db import Database, utc_now
from ml_backend.inbox import ProjectName
from model.errors import TSPError

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 500
_MOST_WAITING = 20_000  # each holds a request open
_PAUSE_SECONDS = 1.0

_Waiting = tuple[ProjectName, str, Future[None]]


class EventRecorder:
    """One thread that writes; any number of requests wait for it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._closing = threading.Event()
        self._trouble: tuple[str, str] | None = None  # since when, and what the database says
        self._thread = threading.Thread(target=self._run, name="event recorder", daemon=True)
        self._thread.start()

    async def record(self, name: ProjectName, action: str) -> None:
        """Remember the project and keep the hint that something happened; returns when it is on the disk, raises what
        the database raises, unless that may pass, and TSPError when too many wait for it."""
        if self._waiting.qsize() >= _MOST_WAITING:
            raise TSPError(f"{_MOST_WAITING} events wait for the database already. {self.problem}")
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # from now on a caller that goes away cannot cancel what is written
        self._waiting.put((name, action, done))
        # Whoever asked may hang up: the event is kept all the same, and the thread must find a future to answer.
        await asyncio.shield(asyncio.wrap_future(done))

    @property
    def problem(self) -> str:
        """Why events wait, for people; "" when none has to."""
        if self._trouble is None:
            return ""
        since, reason = self._trouble
        return (
            f"Label Studio's events wait since {since[:19]} UTC, for the database does not take them: {reason}. They "
            "are kept as soon as it does; do not restart this process before."
        )

    def close(self) -> None:
        """Write what waits, then end; while the database takes nothing, those who wait get its error."""
        self._closing.set()
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            group = [self._waiting.get()]
            while len(group) < _MOST_AT_ONCE and not self._waiting.empty():
                group.append(self._waiting.get())
            is_open = None not in group
            self._keep([event for event in group if event is not None])

    def _keep(self, events: list[_Waiting]) -> None:
        """Returns when each of the events has its answer."""
        while True:
            try:
                self._write(events)
            except DBAPIError as error:
                if not _may_pass(error):
                    self._answer_each(events, error)
                else:
                    self._trouble = (self._trouble or (utc_now(), ""))[0], str(error.orig).partition("\n")[0]
                    logger.warning("%d events wait for the database: %s", len(events), error.orig)
                    if not self._closing.wait(_PAUSE_SECONDS):
                        continue
                    for event in events:
                        event[2].set_exception(error)
            except Exception as error:
                self._answer_each(events, error)
            return

    def _answer_each(self, events: list[_Waiting], error: Exception) -> None:
        """One of several is at fault: each is tried alone, so that nobody gets another's error."""
        if len(events) == 1:
            events[0][2].set_exception(error)
            return
        logger.warning("%d events could not be kept together, each is tried alone", len(events), exc_info=error)
        for event in events:
            self._keep([event])

    def _write(self, events: list[_Waiting]) -> None:
        for name in {name for name, _, _ in events}:
            inbox.remember_project(self._database, name)
        inbox.record_all(self._database, [(name.key, action) for name, action, _ in events])
        self._trouble = None
        for _, _, done in events:
            done.set_result(None)


def _may_pass(error: DBAPIError) -> bool:
    """Whether it is the database's trouble and not the event's: locked, away, restarted or out of space."""
    return isinstance(error, OperationalError) or error.connection_invalidated
