"""One cycle of Algorithm 1: snapshot, train, evaluate. Every stage can be repeated: it finds what it had done.

The pool is scored in pool.py, the next batch chosen in batch.py, both published in publish.py; durable_cycles.py makes
the sequence of stages durable.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml_backend.annotations import AnnotatedTasks
from ml_backend.cycle_log import CycleLog
from ml_backend.db import ProjectRow, UsedTaskRow, used_tasks, utc_now
from ml_backend.empty_batch import facts_of_batch
from ml_backend.errors import ImageError, ImageUnavailableError
from ml_backend.frozen import freeze_tasks, frozen_part, repeated_without_damaged, usable_part
from ml_backend.gate import judge_version
from ml_backend.handover import bring_snapshot, share_pseudo_labels, share_snapshot
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import (
    UNKNOWN_LABEL,
    UNKNOWN_NAME,
    Json,
    choose_annotation,
    image_uri,
    instances_from_annotation,
)
from ml_backend.machines import meeting_of
from ml_backend.network_options import network_options
from ml_backend.pool import is_validation, read_scores
from ml_backend.postponed import postpone, postponed_tasks, read_patiently
from ml_backend.pseudo_labels import (
    SeenImage,
    only_masks_are_needed,
    seen_image,
    thresholds_by_class,
    trust_by,
    with_trusted,
)
from ml_backend.service import Service
from ml_backend.stored_checkpoint import CHECKPOINT, SharedCheckpoint, bring_checkpoint
from model.calibration import reliability, true_ious
from model.comparison import compare
from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, load_annotated, write_coco
from model.errors import CheckpointError, DatasetError, TSPError
from model.evaluate import evaluate
from model.files import write_json
from model.network import MaskRCNNWithScores, build_model
from model.predict import detect, rescored
from model.pseudo_labels import with_score_threshold
from model.registry import ModelCard
from model.together import train_in_processes
from model.train import Progress, load_trained, train
from model.types import Detections, FloatArray, LabeledImage

logger = logging.getLogger(__name__)


def snapshot(service: Service, project_key: str, number: int, log: CycleLog) -> str:
    """Freeze the annotations of this moment as two COCO files; returns the version the cycle will make."""
    folder = service.cycle_folder(project_key, number)
    folder.mkdir(parents=True, exist_ok=True)
    # Of a snapshot whose record was lost.
    for stale in ("pseudo.json", "class_thresholds.json", CHECKPOINT):
        (folder / stale).unlink(missing_ok=True)
    log.stage("reading annotations")
    read = _read_annotations(service, project_key, log)
    images = {image.image_id: image for image in read.images.values()}  # the same bytes in two tasks are one image
    split = {
        name: LabeledSet(
            images=tuple(
                i for i in images.values() if is_validation(i.image_id, service.settings.validation_fraction) is wanted
            ),
            class_names=read.class_names,
        )
        for name, wanted in (("training", False), ("validation", True))
    }
    for name, part in split.items():
        write_coco(folder / f"{name}.json", part)
    freeze_tasks(folder, {image.image_id: task for task, image in read.images.items()})
    # A batch that is not full yet counts on when all of it is for validation.
    _mark_used(service, project_key, number, read, may_count_on=not split["training"].images)
    count = len(read.tasks) + len(read.away)
    log.facts(
        {
            "annotated": count,
            "training": len(split["training"].images),
            "validation": len(split["validation"].images),
            "problems": read.problems[:20],
            "problem_count": len(read.problems),
            **facts_of_batch(service.database, project_key, number, read.images),
        }
    )
    if not split["training"].images:
        raise TSPError(
            f"none of the {count} annotated tasks can be trained on ({len(split['validation'].images)} are for "
            f"validation, {len(read.problems)} have problems): annotate more images or lower TSP_VALIDATION_FRACTION."
        )
    version = _freeze_recipe(service, project_key, number, folder, split["training"])
    share_snapshot(service, project_key, number)
    return version


def train_version(service: Service, project_key: str, number: int, log: CycleLog) -> None:
    """Train on D_al and D_semi, from the pretrained weights, into the cycle's folder (eq. 5)."""
    bring_snapshot(service, project_key, number)
    bring_checkpoint(service, project_key, number)
    repeated_without_damaged(partial(_train, service, project_key, number, log))


def _train(service: Service, project_key: str, number: int, log: CycleLog, read_images: bool) -> None:
    folder = service.cycle_folder(project_key, number)
    training = usable_part(service, project_key, number, "training", log, read=read_images)
    network, config, trust = _recipe(service, folder)
    thresholds = _freeze_pseudo_labels(service, project_key, folder, training, config, trust)
    pseudo = usable_part(service, project_key, number, "pseudo", log, read=read_images).images
    _tell_of_pseudo_labels(log, pseudo, thresholds, training.class_names)
    share_pseudo_labels(service, folder)
    shared = SharedCheckpoint(service, folder)
    labeled = sum(len(image.labels) > 0 for image in pseudo)
    log.stage(f"training on {len(training.images)} annotated and {labeled} pseudo-labelled images")

    def on_step(progress: Progress) -> None:
        logger.debug("project %s, cycle %d: step %d of %d", project_key, number, progress.step, progress.steps)
        log.progress(progress.step, progress.steps)
        shared.after_step()

    checkpoint = folder / CHECKPOINT
    run = partial(
        _trainer(service, log),
        network,
        [*training.images, *pseudo],
        config,
        pseudo=trust,
        class_thresholds=thresholds,
        checkpoint=checkpoint,
        device=service.settings.torch_device(),
        on_step=on_step,
    )
    started = time.monotonic()
    progress = _from_the_start_if_unusable(run, checkpoint, shared)
    if progress:  # none when the checkpoint was complete already
        log.facts({"training_seconds": round(time.monotonic() - started, 1), "loss": progress.losses})
    shared.share_finished()


def _trainer(service: Service, log: CycleLog) -> Callable[..., Progress | None]:
    """`train`, by as many processes and machines as the settings say."""
    settings = service.settings
    if settings.processes == settings.machines == 1:
        return train

    def on_wait(reason: str) -> None:
        log.check_wanted()
        log.wait(
            f"{reason}. Start `python -m ml_backend.machine` on the others, with this worker's settings and MODEL_DIR."
        )

    meeting = meeting_of(settings) if settings.machines > 1 else None
    return partial(train_in_processes, processes=settings.processes, meeting=meeting, on_wait=on_wait)


def _tell_of_pseudo_labels(
    log: CycleLog, pseudo: Sequence[LabeledImage], thresholds: FloatArray | None, class_names: Sequence[str]
) -> None:
    labeled = [len(image.labels) for image in pseudo if len(image.labels)]
    log.facts(
        {
            "pseudo_labeled": len(labeled),
            "pseudo_instances": sum(labeled),
            "pseudo_for_teacher": len(pseudo) - len(labeled),
        }
    )
    if thresholds is not None:
        log.facts({"class_thresholds": dict(zip(class_names, thresholds.tolist(), strict=True))})


def _from_the_start_if_unusable(
    run: Callable[[], Progress | None], checkpoint: Path, shared: SharedCheckpoint
) -> Progress | None:
    """Train on from a checkpoint, or anew when it is of no use; the last step, None when it was complete already."""
    try:
        return run()
    except CheckpointError as error:
        # The snapshot is frozen, so no other run can have written it: an older release did, or the disk has damaged it.
        logger.warning("a training begins from the start: %s", error)
        shared.drop()
        checkpoint.unlink()
        return run()


def evaluate_version(service: Service, project_key: str, number: int, version: str, log: CycleLog) -> bool:
    """Measure the trained network on the frozen validation split and put it into the registry; whether it may take the
    place of the active version. Trains it again when what the training had come to is lost."""
    bring_snapshot(service, project_key, number)
    if not bring_checkpoint(service, project_key, number):
        train_version(service, project_key, number, log)  # what it had come to is damaged, or gone
    return repeated_without_damaged(partial(_evaluate, service, project_key, number, version, log))


def _evaluate(service: Service, project_key: str, number: int, version: str, log: CycleLog, read_images: bool) -> bool:
    folder = service.cycle_folder(project_key, number)
    training = frozen_part(folder, "training")
    validation = usable_part(service, project_key, number, "validation", log, read=read_images)
    log.stage("evaluating", total=len(validation.images))
    network = _trained_network(service, folder)
    found: dict[str, Detections] = {}
    for image in validation.images:
        found[image.image_id] = next(detect(network, [load_annotated(image)]))
        log.progress(len(found), len(validation.images))
    metrics = _measured(found, validation, mask_threshold=network.config.mask_threshold)
    recipe = json.loads((folder / "recipe.json").read_text())
    compared = compare(
        found, validation.images, len(validation.class_names), mask_threshold=network.config.mask_threshold
    )
    by_precision = PseudoLabelConfig(rule="precision", precision=service.settings.pseudo_precision)
    metrics["pseudo_score_threshold"] = with_score_threshold(by_precision, compared).score_threshold
    log.facts({"metrics": metrics})
    card = ModelCard(
        version=version,
        network=network.config.to_json(),
        class_names=training.class_names,
        created_at=utc_now(),
        parent=service.registry.active(project_key),
        data_fingerprint=_sha256((folder / "training.json").read_bytes()),
        metrics=metrics,
        training=recipe["training"],
        strategy=recipe.get("strategy", "tsp"),  # older releases knew no other
    )
    service.registry.add(project_key, card, network)
    verdict = judge_version(
        service, project_key, found, validation, mask_threshold=network.config.mask_threshold, log=log
    )
    return verdict.accepted


def _measured(found: Mapping[str, Detections], truth: LabeledSet, *, mask_threshold: float) -> dict[str, Any]:
    """The average precisions, ranked by c and by c x m as Mask Scoring R-CNN does, and how far both IoU branches can be
    trusted."""
    result = evaluate(found, truth.images, truth.class_names, mask_threshold=mask_threshold)
    by_product = evaluate(
        {image_id: rescored(detections) for image_id, detections in found.items()},
        truth.images,
        truth.class_names,
        mask_threshold=mask_threshold,
    )
    pairs = true_ious(found, truth.images, mask_threshold=mask_threshold)
    return {
        **asdict(result),
        "images_with_instances": sum(len(image.labels) > 0 for image in truth.images),  # which the gate counts
        "rescored_map_50": by_product.map_50,
        "rescored_map_50_95": by_product.map_50_95,
        "box_reliability": asdict(reliability(pairs["box_scores"], pairs["box_ious"])),
        "mask_reliability": asdict(reliability(pairs["mask_scores"], pairs["mask_ious"])),
    }


@dataclass(frozen=True, kw_only=True)
class _Annotations:
    """What people said about the images at one moment. `images` is by task, in the order of their numbers; `tasks` have
    been read, with an image or a problem; those that are `away` wait for their images."""

    class_names: tuple[str, ...]
    images: dict[int, LabeledImage]
    tasks: list[int]
    away: list[int]
    problems: list[str]


def _read_annotations(service: Service, project_key: str, log: CycleLog) -> _Annotations:
    project = service.project(project_key)
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    annotated = AnnotatedTasks(service.label_studio, project.id, service.annotations_file(project_key))
    tasks: list[int] = []  # those that still are when they are read
    images: dict[int, LabeledImage] = {}
    problems: list[str] = []

    def read(task: Json) -> None:
        try:
            images[task["id"]] = _annotated_image(service, project_key, task, config)
        except ImageUnavailableError:
            raise
        except (ImageError, DatasetError) as error:
            problems.append(str(error))
        tasks.append(task["id"])
        log.progress(len(tasks), len(annotated))

    away = read_patiently(annotated, read, config, log, in_vain=postponed_tasks(service.database, project_key))
    return _Annotations(
        class_names=config.labels,
        images=dict(sorted(images.items())),
        tasks=tasks,
        away=[one.task["id"] for one in away],
        problems=problems + [f"{one.reason}; it counts for the next batch once it is there" for one in away],
    )


def _annotated_image(service: Service, project_key: str, task: Mapping[str, Any], config: LabelConfig) -> LabeledImage:
    fetched = service.images.fetch(task_id=task["id"], uri=image_uri(task, config), project_key=project_key)
    annotation = choose_annotation(task) or {}
    instances = instances_from_annotation(annotation, config, fetched.image_hw)
    outdated = [reason for reason in instances.ignored if reason.startswith((UNKNOWN_LABEL, UNKNOWN_NAME))]
    if outdated or (instances.ignored and not len(instances.labels)):
        # To train on the rest would teach that what was drawn there is background.
        reasons = ", ".join(f"{count} x {reason}" for reason, count in instances.ignored.items())
        raise DatasetError(
            f"task {task['id']}: nothing of its annotation is learnt, because not all of it can be: {reasons}. "
            + (_MEND_OUTDATED.format(config.from_name, ", ".join(config.labels)) if outdated else _MEND_SHAPES)
        )
    return LabeledImage(
        image_id=fetched.sha256,
        path=fetched.path,
        image_hw=fetched.image_hw,
        labels=instances.labels,
        rles=instances.rles,
    )


_MEND_OUTDATED = (
    "Open the task and give these regions one of the labels that the control {!r} has now ({}), or put the old names "
    "back into the labelling configuration."
)
_MEND_SHAPES = "Open the task and draw polygons. (Submitted without any region, it would teach that nothing is there.)"


def _mark_used(service: Service, project_key: str, number: int, read: _Annotations, *, may_count_on: bool) -> None:
    """`may_count_on`: fewer tasks than a batch are left as they are, but for those with problems."""
    known, now = used_tasks(service.database, project_key), service.database.now()
    new = [task_id for task_id in read.tasks if task_id not in known]
    if may_count_on and len(new) < service.settings.batch_size:
        new = [task_id for task_id in new if task_id not in read.images]
    with service.database.session() as session:
        session.add_all(UsedTaskRow(project_key=project_key, task_id=t, first_cycle=number) for t in new)
        postpone(session, project_key, read.away, now=now)
        session.get_one(ProjectRow, project_key).new_annotated = 0  # until the next look counts those that came since


def _freeze_recipe(service: Service, project_key: str, number: int, folder: Path, training: LabeledSet) -> str:
    """Write down how this cycle trains, so that settings changed in mid-cycle count from the next one; the version.

    No other training run has its name: Label Studio may still hold predictions of an earlier installation.
    """
    settings = service.settings
    active = service.registry.active(project_key)
    metrics = service.registry.card(project_key, active).metrics if active else {}
    recipe = {
        "profile": settings.profile,
        "num_classes": len(training.class_names) + 1,
        "weights": settings.weights,
        "strategy": settings.strategy,
        "options": network_options(settings, training.images),
        "training": asdict(settings.training()),
        "pseudo_labels": _trust(service, metrics),
    }
    write_json(folder / "recipe.json", recipe)
    digest = _sha256((folder / "training.json").read_bytes() + (folder / "recipe.json").read_bytes())
    return f"tsp-{number}-{digest[:8]}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _freeze_pseudo_labels(
    service: Service,
    project_key: str,
    folder: Path,
    training: LabeledSet,
    config: TrainingConfig,
    trust: PseudoLabelConfig | None,
) -> FloatArray | None:
    """Write D_semi as a part of the snapshot, once, when training first starts; returns sigma_c by class (None: one for
    all), always the same.

    With a teacher, which looks again, also the images in which nothing is trusted.
    """
    if not (folder / "pseudo.json").exists():
        chosen: list[LabeledImage] = []
        adapted = None
        if trust:
            seen = list(_seen_unlabelled(service, project_key, folder, training, config, trust))
            adapted = thresholds_by_class(seen, trust, num_classes=len(training.class_names))
            images = (with_trusted(image, trust, adapted) for image in seen)
            chosen = [image for image in images if len(image.labels) or config.ema_decay]
        write_json(folder / "class_thresholds.json", None if adapted is None else adapted.tolist())
        write_coco(folder / "pseudo.json", LabeledSet(images=tuple(chosen), class_names=training.class_names))
    path = folder / "class_thresholds.json"  # older releases knew none
    thresholds = json.loads(path.read_text()) if path.exists() else None
    return None if thresholds is None else np.array(thresholds)


def _seen_unlabelled(
    service: Service,
    project_key: str,
    folder: Path,
    training: LabeledSet,
    config: TrainingConfig,
    trust: PseudoLabelConfig,
) -> Iterator[SeenImage]:
    """What the active version saw in images that nobody has annotated and that do not measure, each image once.

    Images of tasks that were deleted or annotated since, and those missing from the cache, are left out.
    """
    version = service.registry.active(project_key)
    if version is None:
        return
    taken = {image.image_id for image in (*training.images, *frozen_part(folder, "validation").images)}
    open_tasks = {t.id for t in service.label_studio.tasks(service.project(project_key).id) if not t.is_annotated}
    only_masks = only_masks_are_needed(trust, config)
    service.bring_lines(service.scores_file(project_key, version))
    for line in read_scores(service.scores_file(project_key, version)):
        if "problem" in line or line["task"] not in open_tasks:
            continue
        if not service.images.may_be_had(Path(line["path"])):
            continue
        if line["image"] in taken or is_validation(line["image"], service.settings.validation_fraction):
            continue
        taken.add(line["image"])
        yield seen_image(line, training.class_names, only_masks=only_masks)


def _recipe(service: Service, folder: Path) -> tuple[MaskRCNNWithScores, TrainingConfig, PseudoLabelConfig | None]:
    """The untrained network, how it trains and what is trusted (None: no pseudo labels), as the snapshot froze them."""
    recipe = json.loads((folder / "recipe.json").read_text())
    training = TrainingConfig(**{**recipe["training"], "milestones": tuple(recipe["training"]["milestones"])})
    torch.manual_seed(training.seed)
    network = build_model(recipe["profile"], recipe["num_classes"], weights=recipe["weights"], **recipe["options"])
    # Older releases did not freeze it: what holds now, held then.
    trust = recipe["pseudo_labels"] if "pseudo_labels" in recipe else _trust(service, {})
    return network, training, None if trust is None else PseudoLabelConfig(**trust)


def _trust(service: Service, metrics: Json) -> dict[str, Any] | None:
    """What is trusted of what the version with these metrics saw; None: nothing is learnt from pseudo labels."""
    if not service.settings.semi_supervised:
        return None
    return asdict(trust_by(service.settings.pseudo_labels(), metrics))


def _trained_network(service: Service, folder: Path) -> MaskRCNNWithScores:
    network, *_ = _recipe(service, folder)
    load_trained(network, folder / CHECKPOINT)
    return network.to(service.settings.torch_device())
