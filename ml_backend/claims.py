"""Who looks after a project: any number of workers share the projects, and each is one worker's at a time.

A claim is a lock that dies with its process, so nobody waits for a dead worker and no clock decides who is dead.
"""

import fcntl
import hashlib
import logging
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from itertools import count
from pathlib import Path
from typing import IO

import psycopg
from sqlalchemy import make_url

from ml_backend.errors import SettingsError
from ml_backend.settings import Settings

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0
_UNSURE_SECONDS = 15.0  # without an answer of the database this worker ends itself ...
_SERVER_SECONDS = 30  # ... long before the database gives its claims to others


class Claims(ABC):
    """The projects that this process has to itself. Safe to share between threads."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self._guard = threading.RLock()

    def take(self, project_key: str) -> bool:
        """Whether the project is this process's now; taking what it has already changes nothing."""
        with self._guard:
            if project_key not in self._held and self._lock(project_key):
                self._held.add(project_key)
            return project_key in self._held

    def release(self, project_key: str) -> None:
        """Leave the project to whoever comes next; harmless when it is not this process's."""
        with self._guard:
            if project_key in self._held:
                self._unlock(project_key)
                self._held.remove(project_key)

    @abstractmethod
    def confirm(self) -> None:
        """Returns only while the claims are beyond doubt; else the process ends here and now."""

    @abstractmethod
    def _lock(self, project_key: str) -> bool: ...

    @abstractmethod
    def _unlock(self, project_key: str) -> None: ...


def open_claims(settings: Settings) -> Claims:
    """Those that fit the database: every worker of a database must come to the same."""
    if settings.database.startswith("sqlite"):
        return FileClaims(settings.model_dir / "claims")
    url = make_url(settings.database).set(drivername="postgresql")
    return PostgresClaims(url.render_as_string(hide_password=False))


def free_name(claims: Claims) -> str:
    """A name for this worker that no living one has, and that a dead one on this host may have had."""
    return next(name for number in count(1) if claims.take(name := f"{socket.gethostname()}-{number}"))


class FileClaims(Claims):
    """For SQLite, whose workers are on one machine: a locked file for each project."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def confirm(self) -> None:
        """The kernel takes a file's lock from nobody who lives."""

    def _lock(self, project_key: str) -> bool:
        file = (self._folder / f"{project_key}.lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._files[project_key] = file
        return True

    def _unlock(self, project_key: str) -> None:
        self._files.pop(project_key).close()


class PostgresClaims(Claims):
    """For PostgreSQL, whose workers may be anywhere: advisory locks of one connection.

    The server frees them when the connection ends, at once when the process dies. When the network dies, or the whole
    machine stands still, the server hears nothing for `_SERVER_SECONDS` and ends the connection; by then this process,
    if it runs at all, has ended itself, since it had no answer for `_UNSURE_SECONDS`.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        try:
            self._connection = psycopg.connect(url, autocommit=True, connect_timeout=10, application_name="tsp-claims")
            self._connection.execute(f"SET idle_session_timeout = '{_SERVER_SECONDS}s'")
        except psycopg.Error as error:
            raise SettingsError(
                f"DATABASE_URL: expected a PostgreSQL 14 or later that answers, got: {error}"
            ) from error
        self._sure_at = _now()
        for action in (self._beat, self._watch):
            threading.Thread(target=action, name=f"claims {action.__name__}", daemon=True).start()

    def confirm(self) -> None:
        if _now() - self._sure_at > _UNSURE_SECONDS:
            _end("no answer from the database")

    def _lock(self, project_key: str) -> bool:
        row = self._ask("SELECT pg_try_advisory_lock(%s)", project_key)
        return bool(row[0])

    def _unlock(self, project_key: str) -> None:
        self._ask("SELECT pg_advisory_unlock(%s)", project_key)

    def _ask(self, question: str, project_key: str | None = None) -> tuple[bool]:
        asked_at = _now()
        try:
            answer = self._connection.execute(question, None if project_key is None else [_number(project_key)])
            row = answer.fetchone()
        except psycopg.Error as error:
            _end(str(error))
        self._sure_at = asked_at
        return (bool(row and row[0]),)

    def _beat(self) -> None:
        while True:
            self._ask("SELECT true")
            time.sleep(_BEAT_SECONDS)

    def _watch(self) -> None:
        """In a thread of its own: a question that gets no answer never ends."""
        while True:
            self.confirm()
            time.sleep(_BEAT_SECONDS / 2)


def _number(project_key: str) -> int:
    """A lock's number: 64 bits with a sign."""
    return int.from_bytes(hashlib.sha256(f"tsp {project_key}".encode()).digest()[:8], signed=True)


def _now() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _end(reason: str) -> None:
    """The claims may be lost: from now on every step could be somebody else's."""
    logger.critical(
        "the worker ends, for others may take its projects: its connection to the database is lost (%s). "
        "Start it again; unfinished cycles go on from their last checkpoint.",
        reason.strip(),
    )
    logging.shutdown()
    os._exit(1)
