"""Several workers look at one pool: its chunks are durable workflows, and who has nothing else to do takes the next.

As with projects (docs/decisions/051), whoever has a chunk's claim has the chunk, and moves it to a queue of its own.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from dbos import DBOS, DBOSConfiguredInstance, SetWorkflowID, WorkflowStatus

from ml_backend.chunks import CutPool, open_cut
from ml_backend.claims import Claims
from ml_backend.db import is_forgotten
from ml_backend.logs import in_words, speaks_for_itself
from ml_backend.ls_format import Json
from ml_backend.pool import Viewer
from ml_backend.service import Service
from model.errors import TSPError

logger = logging.getLogger(__name__)

STILL_GOING = ("PENDING", "ENQUEUED", "DELAYED")  # of a workflow
_WAITING = "chunks"  # the queue of chunks that nobody has taken; the workflow engine does not serve it
_POLL_SECONDS = 0.2
_IDLE_SECONDS = 1.0
_AFTER_TROUBLE_SECONDS = 15.0
_LOOK_AT = 50  # of the chunks that wait, the oldest; more workers than that rarely try at once
_MOST_DEATHS = 10  # of workers at one chunk
_DELETED_AT_ONCE = 1000

P = ParamSpec("P")
R = TypeVar("R")


@DBOS.dbos_class()
class ScoringTeam(DBOSConfiguredInstance):
    """This process as one of the workers that share a database and files, and as one that has a pool looked at."""

    def __init__(self, service: Service, claims: Claims, *, process: str) -> None:
        self._service, self._claims = service, claims
        self.queue = f"chunks-{process}"  # of this process alone
        self._guard = threading.Lock()
        self._looking = threading.Lock()
        self._chunk: str | None = None  # that this process has taken
        self._is_paused = False
        self._rests_until = 0.0
        self._viewer: tuple[CutPool, Viewer] | None = None
        self._apart = ThreadPoolExecutor(thread_name_prefix="team")
        super().__init__(config_name="team")

    def start(self) -> None:
        """Take chunks from now on; the workflow engine runs and listens to `queue`."""
        DBOS.register_queue(self.queue, worker_concurrency=1, polling_interval_sec=_POLL_SECONDS)
        threading.Thread(target=self._take_part, name="chunks", daemon=True).start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no chunks within the block, which begins when the last one is finished."""
        with self._guard:
            self._is_paused = True
        try:
            while self._chunk is not None:
                time.sleep(_POLL_SECONDS)
            self._viewer = None
            yield
        finally:
            self._is_paused = False

    def see(self, pool: CutPool) -> Iterator[Json | None]:
        """What is found in each task, in the order of the tasks, as the chunks are finished; None in between.

        A chunk whose worker died waits again. One that failed is looked at here, so that its error is raised here.
        TSPError when the project was forgotten, or worker after worker dies at a chunk.
        """
        self._without_context(self._enqueue, pool)
        deaths: Counter[int] = Counter()
        for number in range(pool.chunks):
            while not self._without_context(self._is_over, pool, number, deaths):
                yield None
                time.sleep(_POLL_SECONDS)
            yield from pool.lines(number)

    def forget(self, pool: CutPool) -> None:
        """Remove workflows and files: the others take no more of them, also while the files cannot be removed."""
        self._without_context(self._delete, [_name(pool, number) for number in range(pool.chunks)])
        pool.remove()

    def forget_project(self, project_key: str) -> None:
        """Remove the workflows of all its pools, also of those whose scoring has failed."""
        self._without_context(self._delete_all, f"chunk-{project_key}-")

    def _delete_all(self, prefix: str) -> None:
        known = DBOS.list_workflows(workflow_id_prefix=prefix, load_input=False, load_output=False)
        self._delete([workflow.workflow_id for workflow in known])

    def _delete(self, names: list[str]) -> None:
        for start in range(0, len(names), _DELETED_AT_ONCE):
            DBOS.delete_workflows(names[start : start + _DELETED_AT_ONCE])

    @DBOS.workflow()
    def look(self, project_key: str, version: str, name: str, number: int) -> None:
        """Look at a chunk. When it fails, whoever waits for it finds no lines."""
        if is_forgotten(self._service.database, project_key):
            return
        try:
            folder = self._service.chunks_folder(project_key, version)
            self._look(open_cut(folder, project_key, version, name, store=self._service.store), number)
        except Exception as error:
            logger.warning(
                "project %s: chunk %d of %s failed here: %s",
                *(project_key, number, version, in_words(error)),
                exc_info=not speaks_for_itself(error),
            )
            self._rests_until = time.monotonic() + _AFTER_TROUBLE_SECONDS

    def _look(self, pool: CutPool, number: int) -> None:
        with self._looking:
            if pool.is_seen(number):
                return
            logger.debug("project %s: looking at chunk %d of %s", pool.project_key, number, pool.version)
            lines = list(self._viewer_of(pool).lines(pool.tasks(number)))
            self._claims.confirm()
            pool.keep(number, lines)
            logger.debug("project %s: chunk %d of %s is seen", pool.project_key, number, pool.version)

    def _viewer_of(self, pool: CutPool) -> Viewer:
        """One for all chunks of a pool."""
        kept = self._viewer
        if kept is None or kept[0] != pool:
            self._viewer = kept = None  # two networks may not fit into the memory
            self._viewer = kept = pool, Viewer.of_project(self._service, pool.project_key, pool.version)
        return kept[1]

    def _check_wanted(self, pool: CutPool) -> None:
        if is_forgotten(self._service.database, pool.project_key):
            raise TSPError("people have asked to forget this project.")

    def _enqueue(self, pool: CutPool) -> None:
        """Every chunk that is neither under way nor seen; those of the project's other pools no longer wait."""
        waiting = DBOS.list_workflows(
            workflow_id_prefix=f"chunk-{pool.project_key}-",
            queue_name=_WAITING,
            status="ENQUEUED",
            load_input=False,
            load_output=False,
        )
        self._delete([w.workflow_id for w in waiting if not w.workflow_id.startswith(_prefix(pool))])
        known = DBOS.list_workflows(workflow_id_prefix=_prefix(pool), load_input=False, load_output=False)
        status = {workflow.workflow_id: workflow.status for workflow in known}
        for number in range(pool.chunks):
            name = _name(pool, number)
            if status.get(name) in STILL_GOING or (name in status and pool.is_seen(number)):
                continue
            if name in status:
                DBOS.delete_workflow(name)  # it failed; nothing runs twice under one name
            with SetWorkflowID(name):
                DBOS.enqueue_workflow(_WAITING, self.look, pool.project_key, pool.version, pool.folder.name, number)

    def _is_over(self, pool: CutPool, number: int, deaths: Counter[int]) -> bool:
        """Whether a chunk has been looked at; it is done here if nobody else does it any more."""
        name = _name(pool, number)
        status = DBOS.get_workflow_status(name)
        if status is not None and status.status in STILL_GOING:
            self._check_wanted(pool)
            if self._is_paused and status.queue_name == _WAITING and self._claims.take(name):
                try:  # a training must not keep those waiting who want an older model back
                    self._look(pool, number)
                finally:
                    self._claims.release(name)
                return True
            if self._has_lost_its_worker(name, status):
                self._give_back(pool, number, deaths)
            return False
        if not pool.is_seen(number):
            logger.info(
                "project %s: chunk %d of %s failed, it is repeated here", pool.project_key, number, pool.version
            )
            self._look(pool, number)
        return True

    def _has_lost_its_worker(self, name: str, status: WorkflowStatus) -> bool:
        return status.queue_name not in (_WAITING, self.queue) and self._claims.take(name)

    def _give_back(self, pool: CutPool, number: int, deaths: Counter[int]) -> None:
        """Let others have a chunk whose claim is ours: its worker is dead, unless it has finished just now."""
        name = _name(pool, number)
        try:
            status = DBOS.get_workflow_status(name)
            if status is None or status.status not in STILL_GOING:
                return
            deaths[number] += 1
            logger.warning("project %s: the worker at chunk %d of %s died", pool.project_key, number, pool.version)
            if deaths[number] < _MOST_DEATHS:
                DBOS.resume_workflow(name, queue_name=_WAITING)
                return
        finally:
            self._claims.release(name)
        tasks = pool.tasks(number)
        self.forget(pool)
        raise TSPError(
            f"{_MOST_DEATHS} workers died while they looked at the tasks {tasks[0]['id']} to {tasks[-1]['id']}; the "
            "workers' logs, or the system's, may say why (out of memory?)."
        )

    def _take_part(self) -> None:
        while True:
            try:
                pause = self._turn()
            except Exception as error:  # the database is away, as for everybody
                told = not speaks_for_itself(error)
                logger.warning("no look at the chunks this time: %s", in_words(error), exc_info=told)
                pause = _AFTER_TROUBLE_SECONDS
            time.sleep(pause)

    def _turn(self) -> float:
        """Take a chunk, or see to the one that was taken; returns the seconds until the next turn."""
        if self._chunk is not None:
            status = DBOS.get_workflow_status(self._chunk)
            if status is not None and status.status in STILL_GOING and status.queue_name == self.queue:
                return _POLL_SECONDS
            self._claims.release(self._chunk)
            self._chunk = None
        if time.monotonic() < self._rests_until:
            return _IDLE_SECONDS
        waiting = DBOS.list_workflows(
            queue_name=_WAITING, status="ENQUEUED", limit=_LOOK_AT, load_input=False, load_output=False
        )
        if not waiting:
            self._viewer = None
            return _IDLE_SECONDS
        return _POLL_SECONDS if any(self._take(chunk.workflow_id) for chunk in waiting) else _IDLE_SECONDS

    def _take(self, name: str) -> bool:
        """Whether the chunk is ours now, and handed to the workflow engine of this process."""
        with self._guard:
            if self._is_paused or not self._claims.take(name):
                return False
            self._chunk = name  # until the next turn finds that it is over, or was another's already
        status = DBOS.get_workflow_status(name)
        if status is None or status.status != "ENQUEUED" or status.queue_name != _WAITING:
            self._claims.release(name)
            self._chunk = None
            return False
        DBOS.resume_workflow(name, queue_name=self.queue)
        return True

    def _without_context(self, do: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do it in a thread that is in no workflow, where nothing is recorded as a part of one."""
        return self._apart.submit(do, *args, **kwargs).result()


def _prefix(pool: CutPool) -> str:
    return f"chunk-{pool.project_key}-{pool.version}-{pool.folder.name}-"


def _name(pool: CutPool, number: int) -> str:
    """Of the workflow that looks at a chunk."""
    return f"{_prefix(pool)}{number}"
