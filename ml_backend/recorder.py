"""Events that come at the same time are kept in one transaction: a commit waits for the disk, so they wait together."""

import asyncio
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from queue import SimpleQueue

from ml_backend import inbox
from ml_backend.db import Database
from ml_backend.inbox import ProjectName

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 500

_Waiting = tuple[ProjectName, str, Future[None]]


class EventRecorder:
    """One thread that writes; any number of requests wait for it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="event recorder", daemon=True)
        self._thread.start()

    async def record(self, name: ProjectName, action: str) -> None:
        """Remember the project and keep the hint that something happened; returns when it is on the disk, raises what
        the database raises."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # from now on a caller that goes away cannot cancel what is written
        self._waiting.put((name, action, done))
        # Whoever asked may hang up: the event is kept all the same, and the thread must find a future to answer.
        await asyncio.shield(asyncio.wrap_future(done))

    def close(self) -> None:
        """Write what waits, then end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            group = [self._waiting.get()]
            while len(group) < _MOST_AT_ONCE and not self._waiting.empty():
                group.append(self._waiting.get())
            is_open = None not in group
            events = [event for event in group if event is not None]
            try:
                self._write(events)
            except Exception:  # of one event or of the database: each then gets its own answer
                logger.warning("%d events could not be kept together, each is tried alone", len(events), exc_info=True)
                for event in events:
                    self._write_one(event)

    def _write_one(self, event: _Waiting) -> None:
        try:
            self._write([event])
        except Exception as error:
            event[2].set_exception(error)

    def _write(self, events: Iterable[_Waiting]) -> None:
        events = list(events)
        for name in {name for name, _, _ in events}:
            inbox.remember_project(self._database, name)
        inbox.record_all(self._database, [(name.key, action) for name, action, _ in events])
        for _, _, done in events:
            done.set_result(None)
