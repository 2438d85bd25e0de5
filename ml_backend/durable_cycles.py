"""A cycle and an activation as durable workflows of DBOS: every step is recorded when it ends, what makes one wait is
told, and a process that takes an unfinished one over goes on at the step it was in.

The names of the classes, workflows and steps here stand in the records: an unfinished cycle of an older release is
found by them.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

from dbos import DBOS, DBOSConfiguredInstance
from sqlalchemy.exc import DBAPIError, OperationalError

from ml_backend import cycle
from ml_backend.activation import activate_version, end_refused_cycle
from ml_backend.batch import choose_batch
from ml_backend.claims import Claims
from ml_backend.cycle_log import ActivationLog, CycleLog
from ml_backend.errors import (
    LabelStudioAuthError,
    LabelStudioUnavailableError,
    ProjectGoneError,
    StoreUnavailableError,
)
from ml_backend.logs import in_words, speaks_for_itself
from ml_backend.pool import score_pool
from ml_backend.publish import publish
from ml_backend.service import Service
from ml_backend.team import ScoringTeam
from model.errors import DiskFullError

logger = logging.getLogger(__name__)

TRY_AGAIN = "Press Start Training in Label Studio to try again."
WAIT_FOR_LABEL_STUDIO_SECONDS = 15.0
_GOES_ON = " Then start web process and worker again: this goes on where it was."


def is_worth_waiting(error: BaseException) -> bool:
    return isinstance(error, _WORTH_WAITING)


# However long one of these lasts, a cycle waits and goes on.
_WORTH_WAITING = (
    LabelStudioUnavailableError,
    LabelStudioAuthError,
    StoreUnavailableError,
    OperationalError,  # the database is away or locked
    DiskFullError,
)
_durable_step = DBOS.step(
    retries_allowed=True,
    interval_seconds=WAIT_FOR_LABEL_STUDIO_SECONDS,
    backoff_rate=1.0,
    max_attempts=1_000_000,
    should_retry=is_worth_waiting,
)


@DBOS.dbos_class()
class DurableCycles(DBOSConfiguredInstance):
    """The stages of a cycle as recorded steps. The stages themselves know nothing of this."""

    def __init__(self, service: Service, claims: Claims, team: ScoringTeam | None) -> None:
        self._service, self._claims, self._team = service, claims, team
        super().__init__(config_name="cycles")

    @DBOS.workflow()
    def run(self, project_key: str, number: int) -> None:
        """One cycle from snapshot to queue; a failure is recorded with its reason and leaves the old model in place."""
        try:
            version = self.snapshot(project_key, number)
            self.train(project_key, number)
            if self.evaluate(project_key, number, version) is False:  # None in the records of a release without a gate
                return self.refuse(project_key, number)
            self.score(project_key, number, version)
            self.choose(project_key, number, version)
            self.publish(project_key, number, version)
        except Exception as error:  # whatever it was, people must see it
            _log_failure(error, project_key, f"cycle {number}")
            self.finish(project_key, number, "failed", _with_advice(error, TRY_AGAIN))
        else:
            self.finish(project_key, number, "done", "")

    @DBOS.workflow()
    def activate(self, project_key: str, number: int) -> None:
        """Make a version the active one; a failure is recorded with its reason and leaves the queue as it was."""
        try:
            self.switch(project_key, number)
        except Exception as error:  # whatever it was, people must see it
            _log_failure(error, project_key, f"activation {number}")
            message = _with_advice(error, "Choose a version on the dashboard to try again.")
            self.finish_activation(project_key, number, "failed", message)
        else:
            self.finish_activation(project_key, number, "done", "")

    @_durable_step
    def switch(self, project_key: str, number: int) -> None:
        with self._log(project_key, number, ActivationLog) as log:
            activate_version(self._service, project_key, number, log, team=self._team)

    @_durable_step
    def finish_activation(self, project_key: str, number: int, status: str, error: str) -> None:
        self._drop_chunks(project_key, status)
        log = ActivationLog(self._service.database, project_key, number, confirm=self._claims.confirm)
        log.finish(status, error=error)

    @_durable_step
    def snapshot(self, project_key: str, number: int) -> str:
        with self._log(project_key, number) as log:
            log.begin()
            version = cycle.snapshot(self._service, project_key, number, log)
            log.name_version(version)
            return version

    @_durable_step
    def train(self, project_key: str, number: int) -> None:
        with self._log(project_key, number) as log, self._alone():
            cycle.train_version(self._service, project_key, number, log)

    @_durable_step
    def evaluate(self, project_key: str, number: int, version: str) -> bool:
        with self._log(project_key, number) as log, self._alone():
            return cycle.evaluate_version(self._service, project_key, number, version, log)

    @_durable_step
    def score(self, project_key: str, number: int, version: str) -> None:
        with self._log(project_key, number) as log:
            score_pool(self._service, project_key, version, log, team=self._team)

    @_durable_step
    def choose(self, project_key: str, number: int, version: str) -> None:
        with self._log(project_key, number) as log:
            choose_batch(self._service, project_key, number, version, log)

    @_durable_step
    def publish(self, project_key: str, number: int, version: str) -> None:
        with self._log(project_key, number) as log:
            publish(self._service, project_key, version, log)

    @_durable_step
    def refuse(self, project_key: str, number: int) -> None:
        self._claims.confirm()
        end_refused_cycle(self._service, project_key, number)

    @_durable_step
    def finish(self, project_key: str, number: int, status: str, error: str) -> None:
        self._drop_chunks(project_key, status)
        CycleLog(self._service.database, project_key, number, confirm=self._claims.confirm).finish(status, error=error)

    def _drop_chunks(self, project_key: str, status: str) -> None:
        """What failed reads no more of what the other workers would find in its pool."""
        if self._team and status == "failed":
            self._team.forget_project(project_key)

    def _alone(self) -> AbstractContextManager[None]:
        """For the work that the others cannot share: the machine is not taken by their pools meanwhile."""
        return self._team.paused() if self._team else nullcontext()

    @contextmanager
    def _log(self, project_key: str, number: int, kind: type[CycleLog] = CycleLog) -> Iterator[CycleLog]:
        """For one stage; what makes the stage wait is told until it goes on or has failed for good."""
        log = kind(self._service.database, project_key, number, confirm=self._claims.confirm)
        try:
            log.check_wanted()
            self._service.check_space()
            yield log
            self._service.check_space()  # for what the workflow engine records next: it would not try again
        except Exception as error:
            if is_worth_waiting(error):
                logger.warning("project %s, number %d waits: %s", project_key, number, in_words(error))
                with suppress(OperationalError):  # the database may be what is waited for
                    log.wait(_as_sentence(error) + (_GOES_ON if isinstance(error, LabelStudioAuthError) else ""))
                free_frames(error)
            raise
        log.go_on()


def log_waiting_in_one_line() -> None:
    """The workflow engine logs a whole traceback at each try; of what passes by itself, one line says it all. What it
    logs at a failed start is told by whoever starts it."""
    logging.getLogger("dbos").addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    is_start = record.getMessage().startswith("DBOS failed to launch")
    if isinstance(error, Exception) and (is_worth_waiting(error) or (is_start and isinstance(error, DBAPIError))):
        record.msg, record.args = f"{record.getMessage().rstrip(':')}: {in_words(error)}", None
        record.exc_info = record.exc_text = None
    return True


def free_frames(error: BaseException) -> None:
    """Let go of what the functions that have failed hold, a whole network among it: the workflow engine keeps the
    errors of all tries of a step, and there may be thousands."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _log_failure(error: Exception, project_key: str, what: str) -> None:
    """With the way to it, unless it is one of ours: these say what to do."""
    logger.error("project %s: %s failed: %s", project_key, what, in_words(error), exc_info=not speaks_for_itself(error))


def _with_advice(error: Exception, advice: str) -> str:
    """For people; nobody can follow it in a project that Label Studio does not show."""
    return _as_sentence(error) if isinstance(error, ProjectGoneError) else f"{_as_sentence(error)} {advice}"


def _as_sentence(error: Exception) -> str:
    """In words that others may follow."""
    words = in_words(error)
    return words if words.endswith((".", "!", "?")) else f"{words}."
