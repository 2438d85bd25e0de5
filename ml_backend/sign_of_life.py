"""The worker says that it is alive and whether Label Studio lets it in, also while no project is connected yet."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ml_backend.db import Database, WorkerRow, utc_now
from ml_backend.ls_client import LabelStudioClient
from model.errors import TSPError

logger = logging.getLogger(__name__)

NAME = "worker"
_EVERY_SECONDS = 5.0


class SignOfLife:
    """Two threads of its own: the worker may be busy with one project for long, and Label Studio may never answer."""

    def __init__(
        self,
        database: Database,
        client: LabelStudioClient,
        *,
        ask_every_seconds: float,
        alive_file: Path | None = None,
    ) -> None:
        self._database, self._client, self._alive_file = database, client, alive_file
        self._ask_every_seconds = ask_every_seconds
        self._told: tuple[str, str] | None = None

    def start(self) -> None:
        """Until the process ends. The first sign is given when this returns."""
        self.give()
        for name, action, pause_seconds in (
            ("sign of life", self.give, _EVERY_SECONDS),
            ("question to Label Studio", self.ask, self._ask_every_seconds),
        ):
            threading.Thread(target=_repeat, args=(name, action, pause_seconds), name=name, daemon=True).start()

    def give(self) -> None:
        """One sign."""
        with self._database.session() as session:
            session.merge(WorkerRow(name=NAME, seen_at=utc_now()))
        if self._alive_file is not None:  # for health checks on this machine
            self._alive_file.touch()

    def ask(self) -> None:
        """Ask Label Studio whom it takes our token for. What changes is logged; whose token it is stays in the log."""
        user, problem = self._whoami()
        with self._database.session() as session:
            session.merge(WorkerRow(name=NAME, problem=problem))
        if (user, problem) == self._told:
            return
        self._told = user, problem
        if problem:
            logger.error("%s", problem)
        else:
            logger.info("Label Studio at %s knows us as %s", self._client.url, user)

    def _whoami(self) -> tuple[str, str]:
        try:
            return self._client.whoami(), ""
        except TSPError as error:
            return "", str(error)


def _repeat(name: str, action: Callable[[], None], pause_seconds: float) -> None:
    while True:
        try:
            action()
        except Exception:  # a database that is away for a while must not end the thread
            logger.warning("%s: it did not work this time", name, exc_info=True)
        time.sleep(pause_seconds)
