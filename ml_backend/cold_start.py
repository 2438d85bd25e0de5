"""Before the first version: a first batch spread out over what the pretrained network sees in all images. No model.

Nothing of it is needed later, so it is no durable workflow: whatever was done lies in files, and is found again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from ml_backend.first_batch import FirstBatch, batch_file, first_batch, progress_file
from ml_backend.label_config import parse_label_config
from ml_backend.ls_client import UNCERTAINTY_SAMPLING
from ml_backend.ls_format import Json
from ml_backend.ls_types import Project, Task
from ml_backend.network_options import network_options
from ml_backend.order import QueueOrder
from ml_backend.pool import (
    OpenedImage,
    TaskImages,
    append_line,
    feature_of,
    go_on_with,
    is_validation,
    open_lines,
    packed,
    read_scores,
)
from ml_backend.publish import import_lines
from ml_backend.service import Service
from model.errors import TooLargeError
from model.files import write_json
from model.network import MaskRCNNWithScores, build_model
from model.strategies import look
from model.strategies.core_set import k_centre_greedy
from model.types import IntArray

logger = logging.getLogger(__name__)

_VERSIONS = "tsp-0-"  # what their names start with; cycles count from 1


def prepare_first_batch(service: Service, project_key: str) -> Iterator[None]:
    """Choose the first batch and publish it; yields after each image, for the caller to stop or to look elsewhere.

    Called again, it goes on where it was, and does nothing once a full batch is published. Unreadable images are left
    out; those whose host is away for the moment are looked at in a later call, unless the batch is full without them.
    """
    batch = first_batch(service, project_key)
    if batch is not None and batch.is_full and batch.is_published:
        return
    project = service.project(project_key)
    if batch is None or not batch.is_full:
        yield from _observe(service, project_key, project, list(service.label_studio.tasks(project.id)))
        lines = list(read_scores(_features_file(service, project_key)))
        if batch is None or len(lines) > batch.looked_at:
            # Looking takes long: people have annotated and skipped tasks meanwhile.
            batch = _choose(service, project_key, list(service.label_studio.tasks(project.id)), lines)
    if not batch.is_published:
        _publish(service, project.id, batch)
        write_json(batch_file(service, project_key), asdict(replace(batch, is_published=True)))


def spread_batch(
    pool: Sequence[Json], annotated: Sequence[Json], count: int, *, validation_fraction: float, seed: int
) -> list[int]:
    """The `count` tasks to annotate first, of lines {"task", "image", "feature"}; pure.

    Images that will train are spread out (k-centre greedy, away from the annotated ones). A share of the batch is
    drawn at random from the images that will measure, since no later batch has any; they come evenly in between.
    """
    teaching = [line for line in pool if not is_validation(line["image"], validation_fraction)]
    measuring = [line for line in pool if is_validation(line["image"], validation_fraction)]
    drawn = np.random.default_rng(seed).permutation(len(measuring))[: round(count * validation_fraction)]
    spread: IntArray = np.array([], dtype=np.int64)
    if teaching:
        centres = np.stack([feature_of(line["feature"]) for line in annotated]) if annotated else None
        features = np.stack([feature_of(line["feature"]) for line in teaching])
        spread = k_centre_greedy(features, centres, count - len(drawn))
    parts = [[teaching[i]["task"] for i in spread], [measuring[i]["task"] for i in drawn]]
    places = [((number + 0.5) / len(part), task) for part in parts for number, task in enumerate(part)]
    return [task for _, task in sorted(places)]


def _observe(service: Service, project_key: str, project: Project, tasks: Sequence[Task]) -> Iterator[None]:
    """Look at the tasks' images, annotated ones too; line by line into a file, so that it can go on in the middle."""
    path = _features_file(service, project_key)
    seen = go_on_with(path, "task")
    waiting = [task for task in tasks if task.id not in seen]
    if not waiting:
        return
    logger.info("project %s: looking at %d images for the first batch", project_key, len(waiting))
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    network = cache(partial(_pretrained, service))
    images = TaskImages(service, project_key, config, network=network)
    told, away = 0.0, []
    with open_lines(path) as lines:
        for done, task in enumerate(waiting, start=len(tasks) - len(waiting) + 1):
            line = _line(images.opened({"id": task.id, "data": task.data}), network)
            if "away" in line:
                away.append(line["away"])
            else:
                append_line(lines, line)
            if "problem" in line:
                logger.warning("%s", line["problem"])
            if done == len(tasks) or time.monotonic() - told >= 1:
                told = time.monotonic()
                write_json(progress_file(service, project_key), {"done": done, "total": len(tasks)})
            yield
    if away:
        logger.warning("project %s: %d images are looked at later, such as: %s", project_key, len(away), away[0])


def _line(image: OpenedImage | Json, network: Callable[[], MaskRCNNWithScores]) -> Json:
    """What is kept of an image; of one that could not be had, the reason is known already."""
    if not isinstance(image, OpenedImage):
        return image
    try:
        sight, _ = look(network(), image.pixels, image_hw=image.fetched.image_hw)
    except TooLargeError as error:
        return {"task": image.task_id, "problem": str(error)}
    return {"task": image.task_id, "image": image.fetched.sha256, "feature": packed(sight.feature)}


def _choose(service: Service, project_key: str, tasks: Sequence[Task], looked_at: Sequence[Json]) -> FirstBatch:
    """Choose and freeze. Tasks that are annotated already count towards the batch; the others keep away from them."""
    settings = service.settings
    annotated_tasks = {task.id for task in tasks if task.is_annotated}
    waiting = {task.id for task in tasks if not task.is_annotated and not task.skip_count}
    lines = [line for line in looked_at if "problem" not in line]
    annotated = [line for line in lines if line["task"] in annotated_tasks]
    known = {line["image"] for line in annotated}
    # The same bytes in two tasks are one image.
    pool = {line["image"]: line for line in lines if line["task"] in waiting and line["image"] not in known}
    count = max(0, settings.batch_size - len(annotated_tasks))
    chosen = spread_batch(
        list(pool.values()), annotated, count, validation_fraction=settings.validation_fraction, seed=settings.seed
    )
    digest = hashlib.sha256(json.dumps([project_key, chosen]).encode()).hexdigest()
    batch = FirstBatch(
        version=f"{_VERSIONS}{digest[:8]}",
        tasks=tuple(chosen),
        looked_at=len(looked_at),
        is_full=len(chosen) == count,
    )
    write_json(batch_file(service, project_key), asdict(batch))
    return batch


def _publish(service: Service, project_id: int, batch: FirstBatch) -> None:
    """Empty predictions whose scores are the order; the other tasks get none, so that they come after the batch."""
    client = service.label_studio
    if not batch.tasks:
        return
    order = QueueOrder(version=batch.version, validation_fraction=0.0, when_empty=0.0, batch=batch.tasks)
    tasks = frozenset(batch.tasks)
    import_lines(service, project_id, order, tasks, lambda: ({"task": task, "result": []} for task in batch.tasks))
    client.update_project(project_id, sampling=UNCERTAINTY_SAMPLING, show_collab_predictions=True)
    versions = client.model_versions(project_id)
    if batch.version not in versions:
        return  # its tasks were deleted
    client.set_model_version(project_id, batch.version)
    logger.info("project %s: the first batch of %d tasks is published", project_id, len(batch.tasks))
    for old in versions:
        if old.startswith(_VERSIONS) and old != batch.version:
            client.delete_model_version(project_id, old)


def _pretrained(service: Service) -> MaskRCNNWithScores:
    """The network as training starts with it. Only its body counts: what its heads would cost is avoided."""
    settings = service.settings
    cheap = {"score_threshold": 1.0, "proposals_inference": 1}
    if settings.weights == "none":  # a body at random, the same after a restart
        torch.manual_seed(settings.seed)
    network = build_model(settings.profile, 2, weights=settings.weights, **{**network_options(settings), **cheap})
    return network.eval().to(settings.torch_device())


def _features_file(service: Service, project_key: str) -> Path:
    """Its name tells what the features depend on, so that other settings do not find them."""
    settings = service.settings
    depends_on = [settings.profile, settings.weights, settings.image_size]
    if settings.weights == "none":
        depends_on.append(settings.seed)
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    return service.scores_folder(project_key) / f"cold-start-{digest[:8]}.jsonl"
