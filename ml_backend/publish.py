"""Gives a version's predictions to Label Studio and makes them the queue: everything first, then one switch."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice

from ml_backend.cycle_log import CycleLog
from ml_backend.errors import LabelStudioError, LabelStudioUnavailableError
from ml_backend.label_config import parse_label_config
from ml_backend.ls_client import UNCERTAINTY_SAMPLING
from ml_backend.ls_format import Json, empty_prediction, for_task
from ml_backend.order import QueueOrder, frozen_batch, order_of
from ml_backend.pool import read_scores
from ml_backend.publication import OUR_NAME, POOL, settle
from ml_backend.service import Service

logger = logging.getLogger(__name__)

_LINES_AN_IMPORT = 2000
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


def import_missing(service: Service, project_key: str, version: str, log: CycleLog | None = None) -> int:
    """Import what Label Studio lacks of the version's predictions, so that each task has exactly one; returns how many.

    LabelStudioError when Label Studio did not take all of them.
    """
    path = service.scores_file(project_key, version)
    order = order_of(service, project_key, version)
    return import_lines(service, service.project(project_key).id, order, lambda: read_scores(path), log)


def import_lines(
    service: Service,
    project_id: int,
    order: QueueOrder,
    lines: Callable[[], Iterable[Json]],
    log: CycleLog | None = None,
) -> int:
    """`import_missing` for these lines (asked for several times, since all of them may not fit into the memory)."""
    client = service.label_studio
    have = _settled_task_ids(service, project_id, order.versions)
    there = {task.id for task in client.tasks(project_id)}
    wanted = {line["task"] for line in lines()} & there
    missing = wanted - have
    if log:
        log.stage("publishing predictions", total=len(missing))
    done, scores = 0, dict[int, float]()
    pending = (line for line in lines() if line["task"] in missing)
    while chunk := list(islice(pending, _LINES_AN_IMPORT)):
        predictions = [_prediction(order, line) for line in chunk]
        scores |= {prediction["task"]: prediction["score"] for prediction in predictions}
        created = _import_existing(service, project_id, predictions)
        if created != len(predictions):
            logger.warning("project %s: Label Studio took %d of %d predictions", project_id, created, len(predictions))
        done += len(chunk)
        if log:
            log.progress(done, len(missing))
    if missing:
        _replace_refused(service, project_id, order, missing, scores)
    surplus = _with_surplus(service, project_id, order, wanted)
    if not surplus:
        return len(missing)
    logger.warning("project %s: tasks have two predictions; %s is imported anew", project_id, " and ".join(surplus))
    shown = client.project(project_id).model_version
    for version in surplus:
        client.delete_model_version(project_id, version)
    imported = import_lines(service, project_id, order, lines, log)
    if shown in surplus and shown in client.model_versions(project_id):  # Label Studio has forgotten that it showed it
        client.set_model_version(project_id, shown)
    return imported


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


def _import_existing(service: Service, project_id: int, predictions: list[Json]) -> int:
    """Import; if Label Studio refuses all because a task was deleted in this minute, import the others."""
    client = service.label_studio
    try:
        return client.import_predictions(project_id, predictions)
    except LabelStudioUnavailableError:
        raise
    except LabelStudioError:
        there = {task.id for task in client.tasks(project_id)}
        left = [prediction for prediction in predictions if prediction["task"] in there]
        if len(left) == len(predictions):
            raise
        return client.import_predictions(project_id, left)


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
    service: Service, project_id: int, order: QueueOrder, imported: set[int], scores: Mapping[int, float]
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
    empty = [for_task(empty_prediction(order.version_of(task), score=scores[task]), task) for task in refused]
    client.import_predictions(project_id, empty)
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
