"""The worker process: watches the projects and runs their cycles as durable workflows. `python -m ml_backend.worker`

Any number of workers may share a database. Each takes what is to be done in a project and is not another's at this
moment (claims.py), and runs one cycle at a time. Every step of a cycle is recorded when it ends; when a worker was
killed, the next one goes on at the step it was in. That is why stopping needs no care: Ctrl-C and SIGTERM end the
process at once.
"""

import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType

if __name__ == "__main__":  # the imports below take seconds; what is wrong with the settings is told before
    from ml_backend.settings import exit_if_unusable

    exit_if_unusable()

import torch
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, SetWorkflowID
from sqlalchemy import select
from sqlalchemy.exc import OperationalError, ProgrammingError

from ml_backend import inbox
from ml_backend.claims import Claims, free_name, open_claims
from ml_backend.cycle_log import ActivationLog, CycleLog
from ml_backend.db import ForgottenRow, ProjectRow, UnfinishedWork, unfinished_work, unfinished_works
from ml_backend.durable_cycles import (
    TRY_AGAIN,
    WAIT_FOR_LABEL_STUDIO_SECONDS,
    DurableCycles,
    log_waiting_in_one_line,
)
from ml_backend.ended_checkpoints import EndedCheckpoints
from ml_backend.errors import LabelConfigError, SettingsError, StoreUnavailableError
from ml_backend.forget import forgotten_projects, remove_forgotten_data
from ml_backend.import_turns import ImportTurns
from ml_backend.logs import in_words, speaks_for_itself, start_logging
from ml_backend.pool_looks import PoolLooks
from ml_backend.reconcile import reconcile
from ml_backend.service import Service, unusable_database
from ml_backend.settings import Settings
from ml_backend.sign_of_life import SignOfLife
from ml_backend.team import STILL_GOING, ScoringTeam
from model.bfloat16 import check_bfloat16
from model.device import check_device
from model.errors import InvalidInputError, TSPError

logger = logging.getLogger(__name__)

_QUEUES = ("cycle", "activation")  # two: nobody who wants an older model back waits for a training
_LOOK_EVERY_SECONDS = 1.0
_WAIT_FOR_PEOPLE_SECONDS = 60.0  # who have to mend a labelling configuration
_MOST_RESTARTS = 100  # of a cycle whose worker died
_FAREWELL_SECONDS = 2.0
_ROOM_FOR_RECORDS = (
    "a role that may make the schema dbos for the records of the workflow engine (GRANT CREATE ON DATABASE, or an "
    "administrator's CREATE SCHEMA dbos AUTHORIZATION of that role)"
)
_CHANGE_THE_POOL = {"TASKS_CREATED", "ANNOTATIONS_DELETED"}  # what may leave a task without a prediction


class Worker:
    """Looks after the known projects, beside the other workers, until the process ends."""

    def __init__(self, service: Service, claims: Claims, *, name: str) -> None:
        service = replace(service, import_turns=ImportTurns(claims))
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
        self._pool_looks = PoolLooks(service, claims, self._team)
        self._ended = EndedCheckpoints(service)
        self.sign_of_life = SignOfLife(
            service.database,
            service.label_studio,
            service.store,
            name=name,
            ask_every_seconds=service.settings.reconcile_seconds,
            busy_with=lambda: self._busy_with["cycle"],
            alive_file=service.settings.alive_file,
        )

    def run(self) -> None:
        """Never returns; `start` comes first."""
        self.sign_of_life.start()
        logger.info("the worker is ready as %s; it looks after %s", self._name, self._service.settings.label_studio_url)
        while True:
            try:
                self.round()
            except Exception as error:  # the database is away or locked; cycles that run wait for it, too
                told = not speaks_for_itself(error)
                logger.warning("no look at the projects this time: %s", in_words(error), exc_info=told)
            time.sleep(_LOOK_EVERY_SECONDS)

    def start(self) -> None:
        """Make this process able to run what is to be done in the rounds. SettingsError where the database does not let
        the workflow engine make its tables."""
        DBOS(config=_workflow_engine(self._service.settings, self._process))
        DBOS.listen_queues([*self._queues.values(), *([self._team.queue] if self._team else [])])
        try:
            DBOS.launch()
        except ProgrammingError as error:
            raise unusable_database(self._service.settings, error, expected=_ROOM_FOR_RECORDS) from error
        except OperationalError as error:
            raise unusable_database(self._service.settings, error, expected="a database that answers") from error
        for queue in DBOS.list_queues():
            if is_queue_of(self._name, queue.name):
                DBOS.delete_queue(queue.name)  # of a dead worker that had this name
        for name in self._queues.values():
            DBOS.register_queue(name, worker_concurrency=1)
        if self._team:
            self._team.start()

    def round(self) -> None:
        """Every project's turn."""
        for project_key in forgotten_projects(self._service):
            self._forget(project_key)
        projects = self._projects()
        for project_key in projects:
            self._look_after(project_key)
        self._pool_looks.keep_only(projects)
        self._service.annotated.keep_only(projects)

    def _forget(self, project_key: str) -> None:
        """Let unfinished work of a forgotten project end, which it does when it finds that; then remove the data.

        Trouble with that does not reach the other projects.
        """
        if self._is_pausing(project_key):
            return
        try:
            self._pool_looks.end(project_key)
            self._note_finished_work(project_key)
            if self._claims.take(project_key):
                self._go_on_with_work(project_key)
                remove_forgotten_data(self._service, project_key, partial(self._delete_workflows, project_key))
        except (StoreUnavailableError, OSError) as error:
            logger.warning("project %s: its data is not removed yet: %s", project_key, error)
            self._pause_until[project_key] = time.monotonic() + WAIT_FOR_LABEL_STUDIO_SECONDS
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
            logger.warning("project %s: %s", project_key, in_words(error), exc_info=not speaks_for_itself(error))
            pause = _WAIT_FOR_PEOPLE_SECONDS if isinstance(error, LabelConfigError) else WAIT_FOR_LABEL_STUDIO_SECONDS
            self._pause_until[project_key] = time.monotonic() + pause
            with self._service.database.session() as session:
                session.get_one(ProjectRow, project_key).problem = in_words(error)
        # Whoever is free may do what comes next; work, a look at the pool and a pause stay with the one who has them.
        is_kept = (
            project_key in self._busy_with.values()
            or self._pool_looks.is_going(project_key)
            or self._is_pausing(project_key)
        )
        if not is_kept:
            self._claims.release(project_key)

    def _turn(self, project_key: str) -> None:
        if self._is_due(project_key) or inbox.has_new(self._service.database, project_key):
            self._look(project_key)
        self._pool_looks.go_on(project_key)

    def _is_waiting(self, project_key: str) -> bool:
        """Whether there is something to do, here and now."""
        database = self._service.database
        return (
            any(self._busy_with[work.what] in (None, project_key) for work in unfinished_works(database, project_key))
            or self._pool_looks.is_going(project_key)
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
            self._pool_looks.note_change(project_key)
        self._next_look[project_key] = now + self._service.settings.reconcile_seconds
        decision = reconcile(self._service, project_key, events)
        logger.debug("project %s: %s", project_key, decision.reason)
        self._ended.remove(project_key)
        self._go_on_with_work(project_key)
        if unfinished_work(self._service.database, project_key) is None:
            self._pool_looks.begin_if_due(project_key, now)

    def _go_on_with_work(self, project_key: str) -> None:
        """Hand the project's unfinished cycle or activation to the workflow engine of this process, which runs one of
        each at a time.

        Also one that another worker left unfinished: it is dead, for its claim is ours. What this process runs already
        is left alone, and work that waits while this process is busy is left to the others. A look at the pool ends:
        the work makes it needless, or writes into the same files.
        """
        works = unfinished_works(self._service.database, project_key)
        if works:
            self._pool_looks.end(project_key)
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
                f"the {work.what} ended unexpectedly ({status.status}); the worker's log says more. {TRY_AGAIN}"
            )
        elif status.queue_name != queue:
            if log.count_restart() <= _MOST_RESTARTS:
                DBOS.resume_workflow(name, queue_name=queue)
            else:
                DBOS.cancel_workflow(name)
                log.abandon(f"the worker died {_MOST_RESTARTS} times at it; its log may say why. {TRY_AGAIN}")

    def _projects(self) -> list[str]:
        """Those that nobody has asked to forget."""
        with self._service.database.session() as session:
            forgotten = select(ForgottenRow.project_key)
            query = select(ProjectRow.key).where(ProjectRow.key.not_in(forgotten)).order_by(ProjectRow.key)
            return list(session.scalars(query))


def is_queue_of(worker: str, queue: str) -> bool:
    """Whether a queue was that of a process of a worker with this name; "gpu-1" is another one than "gpu-1-1"."""
    return re.fullmatch(rf"(cycle|activation|chunk)s-{re.escape(worker)}-[0-9a-f]{{8}}", queue) is not None


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
    log_waiting_in_one_line()
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
    try:
        worker.start()
    except SettingsError as error:
        sys.exit(str(error))
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
