"""Gives a version's predictions to Label Studio and makes them the queue: everything first, then one switch."""

import logging
import time
from collections.abc import Callable, Iterable, Set
from functools import partial

from ml_backend.cycle_log import CycleLog
from ml_backend.errors import LabelStudioError, LabelStudioUnavailableError
from ml_backend.label_config import parse_label_config
from ml_backend.ls_client import UNCERTAINTY_SAMPLING
from ml_backend.ls_format import Json, empty_prediction, for_task
from ml_backend.order import QueueOrder, frozen_batch, keep_order, order_of
from ml_backend.pool import read_heads, read_scores
from ml_backend.publication import OUR_NAME, POOL, settle
from ml_backend.service import Service

logger = logging.getLogger(__name__)

_SETTLING_SECONDS = 2.0


def publish(service: Service, project_key: str, version: str, log: CycleLog) -> None:
    """Publish the version, switch the project's queue to it, and remove the predictions of its predecessors.

    Annotators see the old queue until the switch; whatever fails before it leaves the old version in place.
    """
    client, project = service.label_studio, service.project(project_key)
    project_id = project.id
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    published = settle(service, project_key, version, config, frozen_batch(service, project_key, version) or ())
    import_missing(service, project_key, version, log)
    client.update_project(project_id, sampling=UNCERTAINTY_SAMPLING, show_collab_predictions=True)
    versions = client.model_versions(project_id)
    if published.name not in versions and published.name + POOL in versions:
        logger.warning("project %s: all tasks of the batch were deleted; the scores order the others", project_key)
        service.keep_json(service.batch_file(project_key, version), {"tasks": []})
        published = settle(service, project_key, version, config)
        import_missing(service, project_key, version, log)
        versions = client.model_versions(project_id)
    if published.name not in versions:
        log.stage("no task is left to predict for")
        service.registry.activate(project_key, version)
        return
    client.set_model_version(project_id, published.name)
    service.registry.activate(project_key, version)
    for old in sorted(versions):
        if OUR_NAME.fullmatch(old) and old not in (published.name, published.name + POOL):
            log.stage(f"removing the predictions of {old}")
            client.delete_model_version(project_id, old)


def import_missing(
    service: Service,
    project_key: str,
    version: str,
    log: CycleLog | None = None,
    *,
    among: Set[int] | None = None,
) -> int:
    """Import what Label Studio lacks of the version's predictions, so that each task has exactly one; returns how many.
    `among` are the tasks that are there, if that is known: one that was deleted makes Label Studio refuse a request.

    LabelStudioError when Label Studio did not take all of them.
    """
    path = service.scores_file(project_key, version)
    order = order_of(service, project_key, version)
    keep_order(service, project_key, version, order)
    tasks = {line["task"] for line in read_heads(path) if among is None or line["task"] in among}
    return import_lines(service, service.project(project_key).id, order, tasks, lambda: read_scores(path), log)


def import_lines(
    service: Service,
    project_id: int,
    order: QueueOrder,
    tasks: Set[int],
    lines: Callable[[], Iterable[Json]],
    log: CycleLog | None = None,
) -> int:
    """`import_missing` for these tasks and their lines, which are asked for anew each time: they may not fit into the
    memory.

    Counts tell whether all went well; the tasks themselves, which Label Studio lists as slowly as it imports, are only
    looked at when these do not add up.
    """
    client = service.label_studio
    have = _settled_task_ids(service, project_id, order.versions)
    missing = tasks - have
    if log:
        log.stage("publishing predictions", total=len(missing))
    pending = (_prediction(order, line) for line in lines() if line["task"] in missing)
    tell = partial(log.progress, total=len(missing)) if log else lambda _: None
    try:
        turn = partial(service.import_turns.turn, log=log)
        created = client.import_predictions(project_id, pending, on_progress=tell, turn=turn)
    except LabelStudioUnavailableError:
        raise
    except LabelStudioError:  # all of a request is refused because a task was deleted since it was scored
        there = {task.id for task in client.tasks(project_id)}
        if missing <= there:
            raise
        return import_lines(service, project_id, order, tasks & there, lines, log)
    stored = sum(client.model_versions(project_id).get(version, 0) for version in order.versions)
    if created == len(missing) and stored == len(have) + len(missing):
        return len(missing)
    logger.warning("project %s: Label Studio took %d of %d predictions", project_id, created, len(missing))
    return _mended(service, project_id, order, tasks, lines, missing, log)


def _mended(
    service: Service,
    project_id: int,
    order: QueueOrder,
    tasks: Set[int],
    lines: Callable[[], Iterable[Json]],
    imported: Set[int],
    log: CycleLog | None,
) -> int:
    """Give each task exactly one prediction where the import did not; returns how many were imported in the end."""
    client = service.label_studio
    if imported:
        _replace_refused(service, project_id, order, lines, imported)
    there = {task.id for task in client.tasks(project_id)}
    surplus = _with_surplus(service, project_id, order, tasks & there)
    if not surplus:
        return len(imported & there)
    logger.warning("project %s: tasks have two predictions; %s is imported anew", project_id, " and ".join(surplus))
    shown = client.project(project_id).model_version
    for version in surplus:
        client.delete_model_version(project_id, version)
    again = import_lines(service, project_id, order, tasks, lines, log)
    if shown in surplus and shown in client.model_versions(project_id):  # Label Studio has forgotten that it showed it
        client.set_model_version(project_id, shown)
    return again


def _with_surplus(service: Service, project_id: int, order: QueueOrder, wanted: Set[int]) -> list[str]:
    """The names under which a task has two predictions, or one that belongs under the other name.

    An import that broke off had gone on in Label Studio unseen, or somebody retrieved predictions of the pool.
    """
    client = service.label_studio
    counts = client.model_versions(project_id)
    stored = [version for version in order.versions if version in counts]
    if sum(counts[version] for version in stored) <= len(wanted):
        return []
    tasks = {version: client.predicted_task_ids(project_id, version) for version in stored}
    return [
        version
        for version in stored
        if counts[version] > len(tasks[version])
        or any(order.version_of(task) != version for task in tasks[version] & wanted)
    ]


def _prediction(order: QueueOrder, line: Json) -> Json:
    version, score = order.version_of(line["task"]), order.score_of(line)
    if "problem" in line:
        return for_task(empty_prediction(version, score=score), line["task"])
    return for_task({"model_version": version, "score": score, "result": order.regions_of(line)}, line["task"])


def _settled_task_ids(service: Service, project_id: int, versions: Iterable[str]) -> frozenset[int]:
    """The tasks that carry a version, once no import that broke off here is still going on in Label Studio."""
    have = _predicted_task_ids(service, project_id, versions)
    while have:
        time.sleep(_SETTLING_SECONDS)
        now = _predicted_task_ids(service, project_id, versions)
        if now == have:
            break
        have = now
    return have


def _predicted_task_ids(service: Service, project_id: int, versions: Iterable[str]) -> frozenset[int]:
    return frozenset().union(*(service.label_studio.predicted_task_ids(project_id, v) for v in versions))


def _replace_refused(
    service: Service, project_id: int, order: QueueOrder, lines: Callable[[], Iterable[Json]], imported: Set[int]
) -> None:
    """Label Studio drops what it finds invalid without a word; such a task gets a prediction without regions."""
    client = service.label_studio
    unpredicted = imported - _predicted_task_ids(service, project_id, order.versions)
    if not unpredicted:
        return
    refused = sorted(unpredicted & {task.id for task in client.tasks(project_id)})  # the others were deleted meanwhile
    if not refused:
        return
    logger.error("project %s: Label Studio refused the predictions of tasks %s", project_id, _some(refused))
    scores = {line["task"]: order.score_of(line) for line in lines() if line["task"] in unpredicted}
    empty = [for_task(empty_prediction(order.version_of(task), score=scores[task]), task) for task in refused]
    client.import_predictions(project_id, empty, turn=service.import_turns.turn)
    left = set(refused) - _predicted_task_ids(service, project_id, order.versions)
    left &= {task.id for task in client.tasks(project_id)}  # a task that was deleted meanwhile needs none
    if left:
        raise LabelStudioError(
            f"project {project_id}: Label Studio stored no prediction of {order.version} for tasks "
            f"{_some(sorted(left))}; the old version stays. Look at Label Studio's log for the reason and start "
            "training again."
        )


def _some(task_ids: list[int]) -> str:
    shown = ", ".join(map(str, task_ids[:10]))
    return f"{shown} and {len(task_ids) - 10} more" if len(task_ids) > 10 else shown
