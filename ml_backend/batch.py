"""The next batch, for strategies that choose a set of images: chosen once for each version, then frozen."""

import hashlib
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path

import numpy as np

from ml_backend.cycle_log import CycleLog
from ml_backend.db import used_tasks
from ml_backend.frozen import frozen_part, repeated_without_damaged, usable_part
from ml_backend.handover import bring_snapshot
from ml_backend.ls_format import Json
from ml_backend.ls_types import Task
from ml_backend.order import frozen_batch
from ml_backend.pool import (
    append_line,
    feature_of,
    go_on_with,
    is_validation,
    load_to_look,
    look_at,
    open_lines,
    packed,
    read_scores,
)
from ml_backend.service import Service
from model.strategies import STRATEGIES, Observation, Observations
from model.types import FloatArray


def choose_batch(
    service: Service, project_key: str, number: int, version: str, log: CycleLog, *, anew_when_used_up: bool = False
) -> None:
    """Choose the TSP_BATCH_SIZE tasks that people get next, and freeze them: a repetition finds what was chosen.
    `number` is the newest cycle with a snapshot. With `anew_when_used_up`, a batch that would not last until the next
    cycle is replaced: of a version that is made active again, or whose successor was refused.

    Nothing is chosen for strategies that rank by score alone: there the score is the queue.
    """
    strategy = STRATEGIES[service.registry.card(project_key, version).strategy]
    log.facts({"strategy": strategy.name})
    if not strategy.chooses_a_set:
        return
    batch = frozen_batch(service, project_key, version)
    if batch is None or (anew_when_used_up and _is_used_up(service, project_key, batch)):
        folder = service.cycle_folder(project_key, number)
        bring_snapshot(service, project_key, number)
        annotated = frozen_part(folder, "training").images if (folder / "training.json").exists() else ()
        labelled: Sequence[Observation] = ()
        if strategy.compares_images and annotated:
            labelled = repeated_without_damaged(partial(_annotated, service, project_key, number, version, log))
        log.stage("choosing the next batch")
        service.bring_lines(service.scores_file(project_key, version))
        task_ids, pool = candidates(
            service.scores_file(project_key, version),
            _waiting(service, project_key),
            {image.image_id for image in annotated},
            validation_fraction=service.settings.validation_fraction,
        )
        chosen = strategy.choose(
            pool,
            labelled,
            service.settings.batch_size,
            seed=_seed(service.settings.seed, version),
            empty_policy=service.settings.empty_policy,
        )
        batch = tuple(task_ids[i] for i in chosen)
        service.keep_json(service.batch_file(project_key, version), {"tasks": batch})
    log.facts({"batch": len(batch)})


def _is_used_up(service: Service, project_key: str, batch: Sequence[int]) -> bool:
    """Whether fewer tasks of the batch wait than the next cycle still needs."""
    tasks = list(service.label_studio.tasks(service.project(project_key).id))
    waiting = {task.id for task in tasks if _waits(task)}
    new = {task.id for task in tasks if task.is_annotated} - used_tasks(service.database, project_key)
    return len(waiting & set(batch)) < service.settings.batch_size - len(new)


def _waiting(service: Service, project_key: str) -> set[int]:
    return {task.id for task in service.label_studio.tasks(service.project(project_key).id) if _waits(task)}


def _waits(task: Task) -> bool:
    """Neither annotated nor skipped."""
    return not task.is_annotated and not task.skip_count


def candidates(
    path: Path, waiting: Set[int], annotated: Set[str], *, validation_fraction: float
) -> tuple[list[int], Observations]:
    """What may be chosen of a scores file, task ids and what was observed: readable images of the tasks that wait; each
    once, no annotated one (by the hash of their bytes), and none that measures, since it can teach nothing."""
    taken = set(annotated)
    task_ids: list[int] = []
    pool = Observations(len(waiting))
    for line in read_scores(path):
        if line["task"] not in waiting or "problem" in line or line["image"] in taken:
            continue
        if not is_validation(line["image"], validation_fraction):
            taken.add(line["image"])
            task_ids.append(line["task"])
            pool.append(line["score"], _feature(line))
    return task_ids, pool


def _annotated(
    service: Service, project_key: str, number: int, version: str, log: CycleLog, read_images: bool
) -> Observations:
    """What the version sees in the images it was trained on; kept line by line, so that it can go on in the middle."""
    told_as = "annotated"  # the training stage has told of its own
    images = usable_part(service, project_key, number, "training", log, read=read_images, told_as=told_as).images
    path = service.annotated_file(project_key, version)
    seen = go_on_with(path, "image")
    waiting = [image for image in images if image.image_id not in seen]
    log.stage("looking at the annotated images", total=len(waiting))
    network, card = load_to_look(service, project_key, version)
    with open_lines(path) as lines:
        for done, image in enumerate(waiting, start=1):
            observation, _ = look_at(service, network, card, image.path, image.image_hw)
            append_line(lines, {"image": image.image_id, "feature": packed(observation.feature)})
            log.progress(done, len(waiting))
    found = Observations(len(seen) + len(waiting))
    for line in read_scores(path):
        found.append(None, _feature(line))
    return found


def _feature(line: Json) -> FloatArray:
    return feature_of(line["feature"]) if "feature" in line else np.empty(0, dtype=np.float32)


def _seed(seed: int, version: str) -> int:
    """Another one for each version: a random batch must not be drawn at the same places each time."""
    return int(hashlib.sha256(f"{seed} {version}".encode()).hexdigest()[:8], 16)
