"""The worker process: watches the projects and runs their cycles as durable workflows. `python -m ml_backend.worker`

Any number of workers may share a database. Each takes what is to be done in a project and is not another's at this
moment (claims.py), and runs one cycle at a time. Every step of a cycle is recorded when it ends; when a worker was
killed, the next one goes on at the step it was in. That is why stopping needs no care: Ctrl-C and SIGTERM end the
process at once.
"""

import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # the imports below take seconds; what is wrong with the settings is told before
    from ml_backend.settings import exit_if_unusable

    exit_if_unusable()

import torch
from dbos import DBOS, DBOSConfig, DBOSConfiguredInstance, DBOSPortableJSONSerializer, SetWorkflowID
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from ml_backend import cycle, inbox
from ml_backend.activation import activate_version, end_refused_cycle
from ml_backend.batch import choose_batch
from ml_backend.claims import Claims, free_name, open_claims
from ml_backend.cold_start import prepare_first_batch
from ml_backend.cycle_log import ActivationLog, CycleLog, PoolLookLog
from ml_backend.db import ForgottenRow, ProjectRow, UnfinishedWork, unfinished_work, unfinished_works
from ml_backend.ended_checkpoints import EndedCheckpoints
from ml_backend.errors import (
    LabelConfigError,
    LabelStudioAuthError,
    LabelStudioUnavailableError,
    ProjectGoneError,
    SettingsError,
    StoreUnavailableError,
)
from ml_backend.forget import forgotten_projects, remove_forgotten_data
from ml_backend.logs import start_logging
from ml_backend.pool import score_pool, score_pool_in_steps
from ml_backend.publication import POOL, publication_of
from ml_backend.publish import import_missing, publish
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.sign_of_life import SignOfLife
from ml_backend.team import STILL_GOING, ScoringTeam
from model.bfloat16 import check_bfloat16
from model.device import check_device
from model.errors import DiskFullError, InvalidInputError, TSPError

logger = logging.getLogger(__name__)

_QUEUES = ("cycle", "activation")  # two: nobody who wants an older model back waits for a training
_LOOK_EVERY_SECONDS = 1.0
_WAIT_FOR_LABEL_STUDIO_SECONDS = 15.0
_WAIT_FOR_PEOPLE_SECONDS = 60.0  # who have to mend a labelling configuration
_MOST_POOL_LOOKS = 2  # at once: each has a network in the memory
_SLICE_SECONDS = 5.0  # how long a project's new tasks are worked on before the others have their turn
_MOST_RESTARTS = 100  # of a cycle whose worker died
_FAREWELL_SECONDS = 2.0
_CHANGE_THE_POOL = {"TASKS_CREATED", "ANNOTATIONS_DELETED"}  # what may leave a task without a prediction
_TRY_AGAIN = "Press Start Training in Label Studio to try again."
_GOES_ON = " Then start web process and worker again: this goes on where it was."


def _is_worth_waiting(error: BaseException) -> bool:
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
    interval_seconds=_WAIT_FOR_LABEL_STUDIO_SECONDS,
    backoff_rate=1.0,
    max_attempts=1_000_000,
    should_retry=_is_worth_waiting,
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
            self.finish(project_key, number, "failed", _with_advice(error, _TRY_AGAIN))
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
        CycleLog(self._service.database, project_key, number, confirm=self._claims.confirm).finish(status, error=error)

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
            if _is_worth_waiting(error):
                logger.warning("project %s, number %d waits: %s", project_key, number, error)
                with suppress(OperationalError):  # the database may be what is waited for
                    log.wait(_as_sentence(error) + (_GOES_ON if isinstance(error, LabelStudioAuthError) else ""))
                free_frames(error)
            raise
        log.go_on()


class Worker:
    """Looks after the known projects, beside the other workers, until the process ends."""

    def __init__(self, service: Service, claims: Claims, *, name: str) -> None:
        self._service, self._claims, self._name = service, claims, name
        self._process = f"{name}-{secrets.token_hex(4)}"
        # Queues of this process alone: who has a project's claim, does its work.
        self._queues = {what: f"{what}s-{self._process}" for what in _QUEUES}
        is_shared = not service.settings.database.startswith("sqlite")
        self._team = ScoringTeam(service, claims, process=self._process) if is_shared else None
        self._cycles = DurableCycles(service, claims, self._team)
        self._busy_with: dict[str, str | None] = dict.fromkeys(_QUEUES)  # the project whose cycle or activation runs
        self._next_look: dict[str, float] = {}
        self._pause_until: dict[str, float] = {}  # after trouble, so that it is not asked for every second
        self._pool_looked_at: dict[str, float] = {}  # when the last whole look at each began; missing: it is due
        self._pool_changed: set[str] = set()  # projects of which an event said so since the last look began
        self._pool_looks: dict[str, Generator[object, None, None]] = {}  # those that go on, a slice at each turn
        self._ended = EndedCheckpoints(service)
        self.sign_of_life = SignOfLife(
            service.database,
            service.label_studio,
            name=name,
            ask_every_seconds=service.settings.reconcile_seconds,
            busy_with=lambda: self._busy_with["cycle"],
            alive_file=service.settings.alive_file,
        )

    def run(self) -> None:
        """Never returns."""
        self.start()
        self.sign_of_life.start()
        logger.info("the worker is ready as %s; it looks after %s", self._name, self._service.settings.label_studio_url)
        while True:
            try:
                self.round()
            except Exception:  # the database is away or locked; cycles that run wait for it, too
                logger.exception("no look at the projects this time")
            time.sleep(_LOOK_EVERY_SECONDS)

    def start(self) -> None:
        """Make this process able to run what is to be done in the rounds."""
        DBOS(config=_workflow_engine(self._service.settings, self._process))
        DBOS.listen_queues([*self._queues.values(), *([self._team.queue] if self._team else [])])
        DBOS.launch()
        for queue in DBOS.list_queues():
            if any(queue.name.startswith(f"{what}s-{self._name}-") for what in (*_QUEUES, "chunk")):
                DBOS.delete_queue(queue.name)  # of a dead worker that had this name
        for name in self._queues.values():
            DBOS.register_queue(name, worker_concurrency=1)
        if self._team:
            self._team.start()

    def round(self) -> None:
        """Every project's turn."""
        for project_key in forgotten_projects(self._service):
            self._forget(project_key)
        for project_key in self._projects():
            self._look_after(project_key)

    def _forget(self, project_key: str) -> None:
        """Let unfinished work of a forgotten project end, which it does when it finds that; then remove the data.

        Trouble with that does not reach the other projects.
        """
        if self._is_pausing(project_key):
            return
        try:
            self._end_pool_look(project_key)
            self._note_finished_work(project_key)
            if self._claims.take(project_key):
                self._go_on_with_work(project_key)
                remove_forgotten_data(self._service, project_key, partial(self._delete_workflows, project_key))
        except (StoreUnavailableError, OSError) as error:
            logger.warning("project %s: its data is not removed yet: %s", project_key, error)
            self._pause_until[project_key] = time.monotonic() + _WAIT_FOR_LABEL_STUDIO_SECONDS
        if project_key not in self._busy_with.values():
            self._claims.release(project_key)

    def _delete_workflows(self, project_key: str, names: list[str]) -> None:
        """Of a project's cycles and activations, which have these names and are over, and of its chunks."""
        self._note_finished_work(project_key)  # the last chance: nobody looks after the project from now on
        DBOS.delete_workflows(names)
        if self._team:
            self._team.forget_project(project_key)

    def _look_after(self, project_key: str) -> None:
        """One project's turn, if there is something to do that no other worker is at.

        Trouble with it is shown on the dashboard and does not reach the others.
        """
        try:
            self._note_finished_work(project_key)
            if self._is_waiting(project_key) and self._claims.take(project_key):
                self._go_on_with_work(project_key)
                if not self._is_pausing(project_key):
                    self._turn(project_key)
        except Exception as error:  # whatever it was, people must see it, and the other projects have their turn
            logger.warning("project %s: %s", project_key, error, exc_info=not isinstance(error, TSPError))
            pause = _WAIT_FOR_PEOPLE_SECONDS if isinstance(error, LabelConfigError) else _WAIT_FOR_LABEL_STUDIO_SECONDS
            self._pause_until[project_key] = time.monotonic() + pause
            with self._service.database.session() as session:
                session.get_one(ProjectRow, project_key).problem = _in_words(error)
        # Whoever is free may do what comes next; work, a look at the pool and a pause stay with the one who has them.
        is_kept = (
            project_key in self._busy_with.values() or project_key in self._pool_looks or self._is_pausing(project_key)
        )
        if not is_kept:
            self._claims.release(project_key)

    def _turn(self, project_key: str) -> None:
        if self._is_due(project_key) or inbox.has_new(self._service.database, project_key):
            self._look(project_key)
        self._go_on_with_pool_look(project_key)

    def _is_waiting(self, project_key: str) -> bool:
        """Whether there is something to do, here and now."""
        database = self._service.database
        return (
            any(self._busy_with[work.what] in (None, project_key) for work in unfinished_works(database, project_key))
            or project_key in self._pool_looks
            or self._is_due(project_key)
            or inbox.has_new(database, project_key)
        )

    def _is_due(self, project_key: str) -> bool:
        """Whether nobody has looked at the project for TSP_RECONCILE_SECONDS."""
        if time.monotonic() < self._next_look.get(project_key, 0.0):
            return False
        with self._service.database.session() as session:
            checked_at = session.get_one(ProjectRow, project_key).checked_at
        if not checked_at:
            return True
        age = datetime.fromisoformat(self._service.database.now()) - datetime.fromisoformat(checked_at)
        return not 0 <= age.total_seconds() < self._service.settings.reconcile_seconds

    def _is_pausing(self, project_key: str) -> bool:
        return time.monotonic() < self._pause_until.get(project_key, 0.0)

    def _note_finished_work(self, project_key: str) -> None:
        unfinished = {work.what for work in unfinished_works(self._service.database, project_key)}
        for what in _QUEUES:
            if self._busy_with[what] == project_key and what not in unfinished:
                self._busy_with[what] = None

    def _look(self, project_key: str) -> None:
        """Compare with Label Studio, and do what follows from it."""
        events, now = inbox.unhandled(self._service.database, project_key), time.monotonic()
        if _CHANGE_THE_POOL & {action for _, action in events}:  # a cycle, or a look, may have listed its pool before
            self._pool_changed.add(project_key)
        self._next_look[project_key] = now + self._service.settings.reconcile_seconds
        decision = reconcile(self._service, project_key, events)
        logger.debug("project %s: %s", project_key, decision.reason)
        self._ended.remove(project_key)
        self._go_on_with_work(project_key)
        is_busy = unfinished_work(self._service.database, project_key) is not None
        has_room = project_key not in self._pool_looks and len(self._pool_looks) < _MOST_POOL_LOOKS
        if has_room and not is_busy and self._is_pool_due(project_key, now):
            self._pool_looks[project_key] = self._look_at_pool(project_key, began=now)

    def _is_pool_due(self, project_key: str, now: float) -> bool:
        """Whether this worker has to look at the pool: it has a clock of its own, for events keep `_is_due` from ever
        being true while people annotate."""
        age = now - self._pool_looked_at.get(project_key, -math.inf)
        return project_key in self._pool_changed or age >= self._service.settings.reconcile_seconds

    def _go_on_with_work(self, project_key: str) -> None:
        """Hand the project's unfinished cycle or activation to the workflow engine of this process, which runs one of
        each at a time.

        Also one that another worker left unfinished: it is dead, for its claim is ours. What this process runs already
        is left alone, and work that waits while this process is busy is left to the others. A look at the pool ends:
        the work makes it needless, or writes into the same files.
        """
        works = unfinished_works(self._service.database, project_key)
        if works:
            self._end_pool_look(project_key)
        for work in works:
            if self._busy_with[work.what] in (None, project_key):
                self._busy_with[work.what] = project_key
                self._hand_over(project_key, work)

    def _hand_over(self, project_key: str, work: UnfinishedWork) -> None:
        queue, name = self._queues[work.what], f"{work.what}-{project_key}-{work.number}"
        run, log_of = {
            "cycle": (self._cycles.run, CycleLog),
            "activation": (self._cycles.activate, ActivationLog),
        }[work.what]
        log = log_of(self._service.database, project_key, work.number)
        status = DBOS.get_workflow_status(name)
        if status is None:
            with SetWorkflowID(name):
                DBOS.enqueue_workflow(queue, run, project_key, work.number)
        elif status.status not in STILL_GOING:
            # It ended without a word in the row: the disk was full.
            log.abandon(
                f"the {work.what} ended unexpectedly ({status.status}); the worker's log says more. {_TRY_AGAIN}"
            )
        elif status.queue_name != queue:
            if log.count_restart() <= _MOST_RESTARTS:
                DBOS.resume_workflow(name, queue_name=queue)
            else:
                DBOS.cancel_workflow(name)
                log.abandon(f"the worker died {_MOST_RESTARTS} times at it; its log may say why. {_TRY_AGAIN}")

    def _look_at_pool(self, project_key: str, *, began: float) -> Generator[object, None, None]:
        """In steps: tasks that were imported, or lost their annotation, since the last cycle join the queue of its
        version; before the first version, a first batch is prepared."""
        self._pool_looked_at.pop(project_key, None)
        self._pool_changed.discard(project_key)
        version = self._service.registry.active(project_key)
        if version is not None:
            yield from self._predict_new_tasks(project_key, version)
        elif self._service.settings.cold_start == "spread":
            yield from prepare_first_batch(self._service, project_key)
        self._pool_looked_at[project_key] = began

    def _predict_new_tasks(self, project_key: str, version: str) -> Generator[object, None, None]:
        """Also those whose predictions somebody has deleted in Label Studio, which sends no event for that."""
        log = PoolLookLog(self._service.database, project_key, 1, confirm=self._claims.confirm)
        try:
            seen = yield from score_pool_in_steps(self._service, project_key, version, log, team=self._team)
            if self._count_published(project_key, version) < seen:
                import_missing(self._service, project_key, version, log)
        finally:
            log.end()

    def _count_published(self, project_key: str, version: str) -> int:
        """How many predictions of the version Label Studio has; each task that the version has seen has one."""
        publication = publication_of(self._service, project_key, version)
        name = publication.name if publication else version
        counts = self._service.label_studio.model_versions(inbox.label_studio_id(project_key))
        return counts.get(name, 0) + counts.get(name + POOL, 0)

    def _go_on_with_pool_look(self, project_key: str) -> None:
        """A few seconds' work, so that annotations are noticed meanwhile, and the other projects."""
        steps = self._pool_looks.pop(project_key, None)
        if steps is None:
            return
        deadline = time.monotonic() + _SLICE_SECONDS
        for _ in steps:
            if time.monotonic() >= deadline:
                self._pool_looks[project_key] = steps
                return

    def _end_pool_look(self, project_key: str) -> None:
        """What it has read is kept, and the next look goes on there."""
        if steps := self._pool_looks.pop(project_key, None):
            steps.close()

    def _projects(self) -> list[str]:
        """Those that nobody has asked to forget."""
        with self._service.database.session() as session:
            forgotten = select(ForgottenRow.project_key)
            query = select(ProjectRow.key).where(ProjectRow.key.not_in(forgotten)).order_by(ProjectRow.key)
            return list(session.scalars(query))


def free_frames(error: BaseException) -> None:
    """Let go of what the functions that have failed hold, a whole network among it: the workflow engine keeps the
    errors of all tries of a step, and there may be thousands."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _log_failure(error: Exception, project_key: str, what: str) -> None:
    """With the way to it, unless it is one of ours: these say what to do."""
    is_ours = isinstance(error, TSPError)
    logger.error("project %s: %s failed: %s", project_key, what, _in_words(error), exc_info=not is_ours)


def _with_advice(error: Exception, advice: str) -> str:
    """For people; nobody can follow it in a project that Label Studio does not show."""
    return _as_sentence(error) if isinstance(error, ProjectGoneError) else f"{_as_sentence(error)} {advice}"


def _as_sentence(error: Exception) -> str:
    """In words that others may follow."""
    words = _in_words(error)
    return words if words.endswith((".", "!", "?")) else f"{words}."


def _in_words(error: Exception) -> str:
    if isinstance(error, OperationalError):  # without the statement and its parameters
        return f"the database does not take what is to be recorded: {error.orig}"
    return str(error) if isinstance(error, TSPError) else f"{type(error).__name__}: {error}"


def check_torch(settings: Settings) -> None:
    """SettingsError when torch cannot use TSP_DEVICE or TSP_PRECISION here: a cycle would find out only after its
    snapshot, or its training."""
    device = settings.torch_device()
    try:
        check_device(device)
    except InvalidInputError as error:
        raise SettingsError(f"settings: TSP_DEVICE: {error} Set it to auto or cpu.") from error
    if settings.precision == "bfloat16":
        try:
            check_bfloat16(torch.device(device))
        except InvalidInputError as error:
            raise SettingsError(f"settings: TSP_PRECISION: {error}") from error


def check_weights(settings: Settings) -> None:
    """SettingsError when the file of TSP_WEIGHTS is not there."""
    weights = settings.weights
    if weights.endswith(".safetensors") and not Path(weights).is_file():
        raise SettingsError(f"settings: TSP_WEIGHTS: expected a file, got {Path(weights).resolve()}, which is none")


def main() -> None:
    """Run a worker with the settings of the environment."""
    try:
        settings = Settings.from_environment()
        check_torch(settings)
        check_weights(settings)
        service = Service.connect(settings)
        claims = open_claims(settings)
    except TSPError as error:
        sys.exit(str(error))
    start_logging(settings)
    os.nice(settings.niceness)  # annotators wait for the web process, nobody waits for this one
    torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
    worker = Worker(service, claims, name=free_name(claims))

    def stop(number: int, frame: FrameType | None) -> None:
        logger.info("stopping; an unfinished cycle goes on when a worker is there again")
        # Whatever the interrupted thread holds, the end comes.
        farewell = threading.Thread(target=worker.sign_of_life.take_leave, daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_SECONDS)
        logging.shutdown()
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    worker.run()


def _workflow_engine(settings: Settings, executor: str) -> DBOSConfig:
    return {
        "name": "tsp-worker",
        "executor_id": executor,
        "system_database_url": settings.workflow_database,
        "application_version": "1",  # a cycle that an older release began is finished by the newer one
        "serializer": DBOSPortableJSONSerializer(),  # the default would pickle
        "log_level": "WARNING",
    }


if __name__ == "__main__":
    main()
