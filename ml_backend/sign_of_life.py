"""A worker says that it is alive, what it is at, and whether Label Studio and the object store let it in; the web
process asks the former, too."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import delete

from ml_backend.db import Database, WorkerRow
from ml_backend.errors import StoreUnavailableError
from ml_backend.logs import in_words, speaks_for_itself
from ml_backend.ls_client import LabelStudioClient
from ml_backend.store import Store
from model.errors import TSPError

logger = logging.getLogger(__name__)

SILENT_SECONDS = 10.0  # without a sign of life, a worker counts as dead
_EVERY_SECONDS = 2.0
_FORGOTTEN = timedelta(hours=1)  # after which nobody is told any more that a worker died, while others live


class SignOfLife:
    """Two threads of its own: the worker may be busy with one project for long, and Label Studio may never answer."""

    def __init__(
        self,
        database: Database,
        client: LabelStudioClient,
        store: Store | None = None,
        *,
        name: str,
        ask_every_seconds: float,
        busy_with: Callable[[], str | None] = lambda: None,
        alive_file: Path | None = None,
    ) -> None:
        self._database, self._name = database, name
        self._token = TokenCheck(client)
        self._unsure_of, self._told_of_store = store, ""
        self._ask_every_seconds, self._busy_with = ask_every_seconds, busy_with
        self._alive_file = alive_file

    def start(self) -> None:
        """Until the process ends. The first sign is given when this returns."""
        self.give()
        for name, action, pause_seconds in (
            ("sign of life", self.give, _EVERY_SECONDS),
            ("question to Label Studio and the store", self.ask, self._ask_every_seconds),
        ):
            threading.Thread(target=_repeat, args=(name, action, pause_seconds), name=name, daemon=True).start()

    def give(self) -> None:
        """One sign."""
        now = self._database.now()
        long_ago = (datetime.fromisoformat(now) - _FORGOTTEN).isoformat(timespec="microseconds")
        with self._database.session() as session:
            session.merge(WorkerRow(name=self._name, seen_at=now, project_key=self._busy_with()))
            session.execute(delete(WorkerRow).where(WorkerRow.seen_at < long_ago))
        if self._alive_file is not None:  # for health checks on this machine
            self._alive_file.touch()

    def take_leave(self) -> None:
        """This worker ends because somebody wants it to: nobody needs to miss it."""
        with self._database.session() as session:
            session.execute(delete(WorkerRow).where(WorkerRow.name == self._name))

    def ask(self) -> None:
        """Ask Label Studio whom it takes our token for, and the store whether we may use it."""
        problems = [self._token.ask(), self._ask_store()]
        with self._database.session() as session:
            session.merge(WorkerRow(name=self._name, problem="\n".join(filter(None, problems))))

    def _ask_store(self) -> str:
        """The problem. Once the store has let us in, it is not asked again: what needs it tells of trouble with it."""
        if self._unsure_of is None:
            return ""
        try:
            self._unsure_of.check(self._name)
        except StoreUnavailableError as error:
            if str(error) != self._told_of_store:
                self._told_of_store = str(error)
                logger.error("%s", error)
            return str(error)
        self._unsure_of = None
        return ""


class TokenCheck:
    """Asks Label Studio whom it takes our token for. What changes is logged; whose token it is stays in the log."""

    def __init__(self, client: LabelStudioClient) -> None:
        self._client = client
        self._told: tuple[str, str] | None = None
        self._stopped = threading.Event()

    @property
    def problem(self) -> str:
        """What the last answer was; "" for a token that is taken, and before there is an answer."""
        return self._told[1] if self._told else ""

    def start(self, *, every_seconds: float) -> None:
        """Ask at once and again and again, in a thread of its own, until `stop`."""
        threading.Thread(
            target=self._go_on, args=(every_seconds,), name="question to Label Studio", daemon=True
        ).start()

    def stop(self) -> None:
        """Ask no more. An answer that is waited for is not told."""
        self._stopped.set()

    def ask(self) -> str:
        """Ask once; returns the problem."""
        answer = self._whoami()
        if answer != self._told and not self._stopped.is_set():
            user, problem = self._told = answer
            if problem:
                logger.error("%s", problem)
            else:
                logger.info("Label Studio at %s knows us as %s", self._client.url, user)
        return answer[1]

    def _go_on(self, every_seconds: float) -> None:
        while not self._stopped.is_set():
            try:
                self.ask()
            except Exception:  # after the stop, the connection is closed under it
                if not self._stopped.is_set():
                    logger.warning("the question to Label Studio did not work this time", exc_info=True)
            self._stopped.wait(every_seconds)

    def _whoami(self) -> tuple[str, str]:
        try:
            return self._client.whoami(), ""
        except TSPError as error:
            return "", str(error)


def _repeat(name: str, action: Callable[[], None], pause_seconds: float) -> None:
    while True:
        try:
            action()
        except Exception as error:  # a database that is away for a while must not end the thread
            told = not speaks_for_itself(error)
            logger.warning("%s: it did not work this time: %s", name, in_words(error), exc_info=told)
        time.sleep(pause_seconds)
