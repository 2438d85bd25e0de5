"""The worker says that it is alive and whether Label Studio lets it in, also while no project is connected yet."""

import logging
import threading
import time

from ml_backend.db import Database, WorkerRow, utc_now
from ml_backend.ls_client import LabelStudioClient
from model.errors import TSPError

logger = logging.getLogger(__name__)

NAME = "worker"
_EVERY_SECONDS = 5.0


class SignOfLife:
    """Written every few seconds by a thread of its own: the worker may be busy with one project for long."""

    def __init__(self, database: Database, client: LabelStudioClient, *, ask_every_seconds: float) -> None:
        self._database, self._client = database, client
        self._ask_every_seconds = ask_every_seconds
        self._told: tuple[str, str] | None = None

    def start(self) -> None:
        """Until the process ends."""
        threading.Thread(target=self._go_on, name="sign of life", daemon=True).start()

    def give(self, *, ask: bool) -> None:
        """One sign; with `ask`, Label Studio is asked whom it takes our token for. What changes is logged."""
        user_and_problem = self._whoami() if ask else None
        with self._database.session() as session:
            row = session.merge(WorkerRow(name=NAME, seen_at=utc_now()))
            if user_and_problem is not None:
                row.label_studio_user, row.problem = user_and_problem
        if user_and_problem not in (None, self._told):
            self._told = user_and_problem
            user, problem = user_and_problem
            if problem:
                logger.error("%s", problem)
            else:
                logger.info("Label Studio at %s knows us as %s", self._client.url, user)

    def _go_on(self) -> None:
        next_question = 0.0
        while True:
            ask = time.monotonic() >= next_question
            try:
                self.give(ask=ask)
            except Exception:  # a database that is away for a while must not end the thread
                logger.warning("no sign of life could be given", exc_info=True)
            if ask:
                next_question = time.monotonic() + self._ask_every_seconds
            time.sleep(_EVERY_SECONDS)

    def _whoami(self) -> tuple[str, str]:
        try:
            return self._client.whoami(), ""
        except TSPError as error:
            return "", str(error)
