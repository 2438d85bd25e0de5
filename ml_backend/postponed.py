"""Annotated images whose host is away. A snapshot waits some minutes for them; the tasks of those that stay away are
postponed: no cycle counts them as learnt, and none starts for them before their images are there."""

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from ml_backend.cycle_log import CycleLog
from ml_backend.db import Database, PostponedTaskRow, unfinished_work
from ml_backend.errors import ImageError, ImageHostSilentError, ImageUnavailableError
from ml_backend.foreign_hosts import host_of
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import Json, image_uri
from ml_backend.ls_types import Project
from ml_backend.service import Service

_PATIENCE_SECONDS = 600.0  # of a snapshot: people wait for the cycle
_ASK_AGAIN_SECONDS = 15.0  # in a snapshot that waits
_LOOK_AGAIN_SECONDS = 60.0  # between cycles
_LOOK_SECONDS = 20.0  # how long other projects wait meanwhile
_LOOKED_AT_ONCE = 200  # tasks
_FAILURES = 5  # in a row, after which a host is taken to be silent


@dataclass(frozen=True)
class Away:
    """A task whose image cannot be had at the moment, and why."""

    task: Json
    reason: str


def read_patiently(
    tasks: Iterable[Json], read: Callable[[Json], None], config: LabelConfig, log: CycleLog, *, in_vain: Collection[int]
) -> list[Away]:
    """`read` every task, which may raise ImageUnavailableError; those that stay away when patience has ended.

    In the tasks `in_vain` another snapshot has put its patience already: they are read if that is possible now.
    """
    away = _read(tasks, read, config)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    pause = _ASK_AGAIN_SECONDS
    has_waited = False
    while any(one.task["id"] not in in_vain for one in away) and time.monotonic() < deadline:
        log.stage(f"waiting for {len(away)} annotated images whose hosts are away")
        log.wait(away[-1].reason)
        has_waited = True
        time.sleep(pause)
        left = _read([one.task for one in away], read, config)
        pause = _ASK_AGAIN_SECONDS if len(left) == len(away) else 0.0
        away = left
    if has_waited:
        log.go_on()
    return away


def postponed_tasks(database: Database, project_key: str) -> set[int]:
    """The tasks whose images were away when somebody last asked for them."""
    with database.session() as session:
        query = select(PostponedTaskRow.task_id).where(PostponedTaskRow.project_key == project_key)
        return set(session.scalars(query))


def postpone(session: Session, project_key: str, task_ids: Iterable[int], *, now: str) -> None:
    """From now on these tasks are the postponed ones."""
    session.execute(delete(PostponedTaskRow).where(PostponedTaskRow.project_key == project_key))
    session.add_all(PostponedTaskRow(project_key=project_key, task_id=t, tried_at=now) for t in task_ids)


def still_postponed(service: Service, project_key: str, project: Project) -> set[int]:
    """The postponed tasks, after asking for their images once more. Those that are in the cache now will be learnt by
    the next cycle; those that turn out to be broken it will name.

    Nobody is asked while a cycle runs, nor within a minute after the last time; what takes long is for the next look.
    """
    known = postponed_tasks(service.database, project_key)
    is_busy = unfinished_work(service.database, project_key) is not None
    if not known or is_busy or _was_asked_just_now(service.database, project_key):
        return known
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    deadline = time.monotonic() + _LOOK_SECONDS

    def fetch(task: Json) -> None:
        if time.monotonic() > deadline:
            raise ImageUnavailableError(f"image of task {task['id']}: the next look asks for it")
        try:
            service.images.fetch(task_id=task["id"], uri=image_uri(task, config), project_key=project_key)
        except ImageUnavailableError:
            raise
        except ImageError:
            return

    ids = random.sample(sorted(known), len(known))  # what a host never gives does not stand before the others for ever
    away: set[int] = set()
    for start in range(0, len(ids), _LOOKED_AT_ONCE):
        part = ids[start : start + _LOOKED_AT_ONCE]
        if start and time.monotonic() > deadline:
            away |= set(ids[start:])
            break
        tasks = service.label_studio.annotated_tasks(project.id, part)
        away |= {one.task["id"] for one in _read(tasks, fetch, config)}
    now = service.database.now()
    with service.database.session() as session:
        postpone(session, project_key, away, now=now)
    return away


def _was_asked_just_now(database: Database, project_key: str) -> bool:
    with database.session() as session:
        query = select(func.max(PostponedTaskRow.tried_at)).where(PostponedTaskRow.project_key == project_key)
        tried_at = session.scalar(query)
    if tried_at is None:
        return False
    age = datetime.fromisoformat(database.now()) - datetime.fromisoformat(tried_at)
    return 0 <= age.total_seconds() < _LOOK_AGAIN_SECONDS


def _read(tasks: Iterable[Json], read: Callable[[Json], None], config: LabelConfig) -> list[Away]:
    """Read each task once; those that are away. A host that is silent is asked for one image only, one that answers
    with errors for some: its others come first in the result, so that they are asked for first the next time."""
    silent: set[str] = set()
    failures: Counter[str] = Counter()
    left_out: list[Away] = []
    asked: list[Away] = []
    for task in tasks:
        host = _host_of(task, config)
        if host in silent:
            left_out.append(Away(task, f"image of task {task['id']}: {host} gives no answer"))
            continue
        try:
            read(task)
            failures[host] = 0
        except ImageUnavailableError as error:
            asked.append(Away(task, str(error)))
            failures[host] += 1
            if host and (isinstance(error, ImageHostSilentError) or failures[host] == _FAILURES):
                silent.add(host)
    return [*left_out, *asked]


def _host_of(task: Json, config: LabelConfig) -> str:
    with suppress(ImageError):  # which reading says better
        return host_of(image_uri(task, config))
    return ""
