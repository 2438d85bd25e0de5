"""The worker process: watches the projects and runs their cycles as durable workflows. `python -m ml_backend.worker`

Every step of a cycle is recorded when it ends; a worker that was killed goes on at the step it was in. That is why
stopping needs no care: Ctrl-C and SIGTERM end the process at once.
"""

import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO

import torch
from dbos import DBOS, DBOSConfig, DBOSConfiguredInstance, DBOSPortableJSONSerializer, SetWorkflowID
from sqlalchemy import select

from ml_backend import cycle, inbox
from ml_backend.batch import choose_batch
from ml_backend.cold_start import prepare_first_batch
from ml_backend.cycle_log import CycleLog
from ml_backend.db import UNFINISHED, CycleRow, ProjectRow
from ml_backend.errors import LabelStudioUnavailableError, SettingsError
from ml_backend.pool import score_pool
from ml_backend.publish import import_missing, publish
from ml_backend.reconcile import reconcile, unfinished_cycle
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.sign_of_life import SignOfLife
from model.errors import TSPError

logger = logging.getLogger(__name__)

QUEUE = "cycles"
_LOOK_EVERY_SECONDS = 1.0
_WAIT_FOR_LABEL_STUDIO_SECONDS = 15.0
_FIRST_BATCH_SECONDS = 5.0  # how long a project without a version is worked on before the others have their turn
_STILL_GOING = ("PENDING", "ENQUEUED", "DELAYED")  # of a workflow
_CHANGE_THE_POOL = {"TASKS_CREATED", "ANNOTATIONS_DELETED"}  # what may leave a task without a prediction
_TRY_AGAIN = "Press Start Training in Label Studio to try again."


def _is_worth_waiting(error: BaseException) -> bool:
    return isinstance(error, LabelStudioUnavailableError)


# However long Label Studio is away: a cycle waits and goes on.
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

    def __init__(self, service: Service) -> None:
        self._service = service
        super().__init__(config_name="cycles")

    @DBOS.workflow()
    def run(self, project_key: str, number: int) -> None:
        """One cycle from snapshot to queue; a failure is recorded with its reason and leaves the old model in place."""
        try:
            version = self.snapshot(project_key, number)
            self.train(project_key, number)
            self.evaluate(project_key, number, version)
            self.score(project_key, number, version)
            self.choose(project_key, number, version)
            self.publish(project_key, number, version)
        except Exception as error:  # whatever it was, people must see it
            logger.exception("project %s: cycle %d failed", project_key, number)
            self._log(project_key, number).finish("failed", error=f"{_in_words(error)} {_TRY_AGAIN}")
        else:
            self._log(project_key, number).finish("done")

    @_durable_step
    def snapshot(self, project_key: str, number: int) -> str:
        log = self._log(project_key, number)
        log.begin()
        version = cycle.snapshot(self._service, project_key, number, log)
        log.name_version(version)
        return version

    @_durable_step
    def train(self, project_key: str, number: int) -> None:
        cycle.train_version(self._service, project_key, number, self._log(project_key, number))

    @_durable_step
    def evaluate(self, project_key: str, number: int, version: str) -> None:
        cycle.evaluate_version(self._service, project_key, number, version, self._log(project_key, number))

    @_durable_step
    def score(self, project_key: str, number: int, version: str) -> None:
        score_pool(self._service, project_key, version, self._log(project_key, number))

    @_durable_step
    def choose(self, project_key: str, number: int, version: str) -> None:
        choose_batch(self._service, project_key, number, version, self._log(project_key, number))

    @_durable_step
    def publish(self, project_key: str, number: int, version: str) -> None:
        publish(self._service, project_key, version, self._log(project_key, number))

    def _log(self, project_key: str, number: int) -> CycleLog:
        return CycleLog(self._service.database, project_key, number)


class Worker:
    """Looks after every known project until the process ends."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._cycles = DurableCycles(service)
        self._next_look: dict[str, float] = {}
        self._pause_until: dict[str, float] = {}  # after trouble, so that it is not asked for every second
        self._published: set[str] = set()  # projects in which every task that was scored has its prediction
        self._first_batches: dict[str, Iterator[None]] = {}  # those that are being prepared

    def run(self) -> None:
        """Never returns."""
        DBOS.launch()
        DBOS.register_queue(QUEUE, worker_concurrency=1)
        settings = self._service.settings
        SignOfLife(
            self._service.database,
            self._service.label_studio,
            ask_every_seconds=settings.reconcile_seconds,
            alive_file=settings.alive_file,
        ).start()
        logger.info("the worker is ready; it looks after %s", settings.label_studio_url)
        while True:
            for project_key in self._projects():
                self._look_after(project_key)
            time.sleep(_LOOK_EVERY_SECONDS)

    def _look_after(self, project_key: str) -> None:
        """One project's turn; trouble with it is shown on the dashboard and does not reach the others."""
        self._resume_cycles(project_key)
        if time.monotonic() < self._pause_until.get(project_key, 0.0):
            return
        try:
            due = time.monotonic() >= self._next_look.get(project_key, 0.0)
            if due or inbox.has_new(self._service.database, project_key):
                self._look(project_key, due=due)
            self._go_on_with_first_batch(project_key)
        except Exception as error:  # whatever it was, people must see it, and the other projects have their turn
            logger.warning("project %s: %s", project_key, error, exc_info=not isinstance(error, TSPError))
            with self._service.database.session() as session:
                session.get_one(ProjectRow, project_key).problem = _in_words(error)
            self._pause_until[project_key] = time.monotonic() + _WAIT_FOR_LABEL_STUDIO_SECONDS

    def _look(self, project_key: str, *, due: bool) -> None:
        """Compare with Label Studio, and do what follows from it."""
        actions = {action for _, action in inbox.unhandled(self._service.database, project_key)}
        self._next_look[project_key] = time.monotonic() + self._service.settings.reconcile_seconds
        decision = reconcile(self._service, project_key)
        logger.debug("project %s: %s", project_key, decision.reason)
        self._resume_cycles(project_key)
        if unfinished_cycle(self._service.database, project_key) is None and (due or actions & _CHANGE_THE_POOL):
            self._predict_new_tasks(project_key)

    def _resume_cycles(self, project_key: str) -> None:
        """Hand unfinished cycles to the workflow engine, which runs each once by its id, however often this is done.

        Running ones too, if the engine has lost its records of them.
        """
        with self._service.database.session() as session:
            query = select(CycleRow.number).where(CycleRow.project_key == project_key, CycleRow.status.in_(UNFINISHED))
            numbers = session.scalars(query).all()
        for number in numbers:
            workflow = f"cycle-{project_key}-{number}"
            status = DBOS.get_workflow_status(workflow)
            if status is None:
                with SetWorkflowID(workflow):
                    DBOS.enqueue_workflow(QUEUE, self._cycles.run, project_key, number)
            elif status.status not in _STILL_GOING:
                # It ended without a word in the row: the disk was full, or it was tried too often.
                CycleLog(self._service.database, project_key, number).abandon(
                    f"the cycle ended unexpectedly ({status.status}); the worker's log says more. {_TRY_AGAIN}"
                )

    def _predict_new_tasks(self, project_key: str) -> None:
        """Tasks that were imported, or lost their annotation, since the last cycle join the queue of its version."""
        version = self._service.registry.active(project_key)
        if version is None:
            if self._service.settings.cold_start == "spread" and project_key not in self._first_batches:
                self._first_batches[project_key] = prepare_first_batch(self._service, project_key)
            return
        if score_pool(self._service, project_key, version):
            self._published.discard(project_key)
        if project_key not in self._published:  # scored just now, or before an import that broke off
            import_missing(self._service, project_key, version)
            self._published.add(project_key)

    def _go_on_with_first_batch(self, project_key: str) -> None:
        """A few seconds' work, so that annotations are noticed meanwhile; the first cycle makes the rest needless."""
        steps = self._first_batches.pop(project_key, None)
        if steps is None or unfinished_cycle(self._service.database, project_key) is not None:
            return
        if self._service.registry.active(project_key) is not None:
            return
        deadline = time.monotonic() + _FIRST_BATCH_SECONDS
        for _ in steps:
            if time.monotonic() >= deadline:
                self._first_batches[project_key] = steps
                return

    def _projects(self) -> list[str]:
        with self._service.database.session() as session:
            return list(session.scalars(select(ProjectRow.key).order_by(ProjectRow.key)))


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, TSPError) else f"{type(error).__name__}: {error}"


def main() -> None:
    """Run the worker with the settings of the environment."""
    try:
        settings = Settings.from_environment()
        service = Service.connect(settings)
        lock = _only_worker(settings)
    except TSPError as error:
        sys.exit(str(error))
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if unknown := Settings.unknown_names():
        logger.warning("there are no settings %s: misspelt? The README lists every setting.", ", ".join(unknown))
    os.nice(settings.niceness)  # annotators wait for the web process, nobody waits for this one
    torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    DBOS(config=_workflow_engine(settings))
    with lock:
        Worker(service).run()


def _only_worker(settings: Settings) -> IO[bytes]:
    """The open lock file; a second worker would train the same cycle on the same checkpoint."""
    path = settings.model_dir / "worker.lock"
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise SettingsError(
            f"a worker runs on {settings.model_dir} already: stop it (`fuser {path}` names the process) "
            "or give this one another MODEL_DIR and DATABASE_URL"
        ) from error
    return file


def _workflow_engine(settings: Settings) -> DBOSConfig:
    return {
        "name": "tsp-worker",
        "system_database_url": settings.workflow_database,
        "application_version": "1",  # a cycle that an older release began is finished by the newer one
        "serializer": DBOSPortableJSONSerializer(),  # the default would pickle
        "log_level": "WARNING",
    }


def _stop(number: int, frame: FrameType | None) -> None:
    logger.info("stopping; an unfinished cycle goes on when the worker starts again")
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
