"""Gives a version's predictions to Label Studio and makes them the queue: everything first, then one switch."""

import logging
import re
import time
from collections.abc import Mapping
from itertools import islice

from ml_backend.cycle_log import CycleLog
from ml_backend.errors import LabelStudioError, LabelStudioUnavailableError
from ml_backend.ls_client import UNCERTAINTY_SAMPLING
from ml_backend.ls_format import Json, empty_prediction, for_task
from ml_backend.pool import is_validation, read_scores
from ml_backend.service import Service
from model.tsp import empty_image_score

logger = logging.getLogger(__name__)

_OUR_VERSION = re.compile(r"tsp-\d+-[0-9a-f]{8}")  # those of others are left alone
_LINES_AN_IMPORT = 2000
_LAST = 1.0  # the score that is served last


def publish(service: Service, project_key: str, version: str, log: CycleLog) -> None:
    """Publish the version, switch the project's queue to it, and remove the predictions of its predecessors.

    Annotators see the old queue until the switch; whatever fails before it leaves the old version in place.
    """
    import_missing(service, project_key, version, log)
    client, project_id = service.label_studio, service.project(project_key).id
    client.update_project(project_id, sampling=UNCERTAINTY_SAMPLING, show_collab_predictions=True)
    versions = client.model_versions(project_id)
    if version not in versions:
        log.stage("no task is left to predict for")
        service.registry.activate(project_key, version)
        return
    client.set_model_version(project_id, version)
    service.registry.activate(project_key, version)
    for old in sorted(versions):
        if _OUR_VERSION.fullmatch(old) and old != version:
            log.stage(f"removing the predictions of {old}")
            client.delete_model_version(project_id, old)


def import_missing(service: Service, project_key: str, version: str, log: CycleLog | None = None) -> int:
    """Import what Label Studio lacks of the version's predictions, so that each task has exactly one; returns how many.

    LabelStudioError when Label Studio did not take all of them.
    """
    client, project_id = service.label_studio, service.project(project_key).id
    path = service.scores_file(project_key, version)
    have = _settled_task_ids(service, project_id, version)
    there = {task.id for task in client.tasks(project_id)}
    wanted = {line["task"] for line in read_scores(path)} & there
    missing = wanted - have
    if log:
        log.stage("publishing predictions", total=len(missing))
    when_empty = score_when_empty(service, project_key, version)
    done, scores = 0, dict[int, float]()
    pending = (line for line in read_scores(path) if line["task"] in missing)
    while chunk := list(islice(pending, _LINES_AN_IMPORT)):
        predictions = [_prediction(service, line, version, when_empty) for line in chunk]
        scores |= {prediction["task"]: prediction["score"] for prediction in predictions}
        created = _import_existing(service, project_id, predictions)
        if created != len(predictions):
            logger.warning("project %s: Label Studio took %d of %d predictions", project_id, created, len(predictions))
        done += len(chunk)
        if log:
            log.progress(done, len(missing))
    if missing:
        _replace_refused(service, project_id, version, missing, scores)
    if client.model_versions(project_id).get(version, 0) > len(wanted):
        # An import that broke off had gone on in Label Studio unseen, and its tasks have two predictions now.
        logger.warning("project %s: %s was imported twice in part; it is imported anew", project_id, version)
        client.delete_model_version(project_id, version)
        return import_missing(service, project_key, version, log)
    return len(missing)


def queue_score(line: Json, *, validation_fraction: float, when_empty: float) -> float:
    """The score by which Label Studio serves a task, the lowest first: S of eq. 3.

    Images that will only measure the model, and those that could not be read, come last: they cannot teach it anything.
    """
    if "problem" in line or is_validation(line["image"], validation_fraction):
        return _LAST
    return float(when_empty if line["score"] is None else line["score"])


def score_when_empty(service: Service, project_key: str, version: str) -> float:
    """The score that TSP_EMPTY_POLICY gives an image without detections, among those that the version has scored."""
    lines = read_scores(service.scores_file(project_key, version))
    scored = [line["score"] for line in lines if line.get("score") is not None]
    return empty_image_score(scored, service.settings.empty_policy)


def _prediction(service: Service, line: Json, version: str, when_empty: float) -> Json:
    score = queue_score(line, validation_fraction=service.settings.validation_fraction, when_empty=when_empty)
    if "problem" in line:
        return for_task(empty_prediction(version, score=score), line["task"])
    return for_task({"model_version": version, "score": score, "result": line["result"]}, line["task"])


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


def _settled_task_ids(service: Service, project_id: int, version: str) -> frozenset[int]:
    """The tasks that carry the version, once no import that broke off here is still going on in Label Studio."""
    have = service.label_studio.predicted_task_ids(project_id, version)
    while have:
        time.sleep(2)
        now = service.label_studio.predicted_task_ids(project_id, version)
        if now == have:
            break
        have = now
    return have


def _replace_refused(
    service: Service, project_id: int, version: str, imported: set[int], scores: Mapping[int, float]
) -> None:
    """Label Studio drops what it finds invalid without a word; such a task gets a prediction without regions."""
    client = service.label_studio
    unpredicted = imported - client.predicted_task_ids(project_id, version)
    if not unpredicted:
        return
    refused = sorted(unpredicted & {task.id for task in client.tasks(project_id)})  # the others were deleted meanwhile
    if not refused:
        return
    logger.error("project %s: Label Studio refused the predictions of tasks %s", project_id, _some(refused))
    client.import_predictions(project_id, [for_task(empty_prediction(version, score=scores[t]), t) for t in refused])
    left = set(refused) - client.predicted_task_ids(project_id, version)
    left &= {task.id for task in client.tasks(project_id)}  # a task that was deleted meanwhile needs none
    if left:
        raise LabelStudioError(
            f"project {project_id}: Label Studio stored no prediction of {version} for tasks {_some(sorted(left))}; "
            "the old version stays. Look at Label Studio's log for the reason and start training again."
        )


def _some(task_ids: list[int]) -> str:
    shown = ", ".join(map(str, task_ids[:10]))
    return f"{shown} and {len(task_ids) - 10} more" if len(task_ids) > 10 else shown
