"""One cycle of Algorithm 1: snapshot, train, evaluate. Every stage can be repeated: it finds what it had done.

The pool is scored in pool.py, the next batch chosen in batch.py, both published in publish.py; worker.py makes the
sequence of stages durable.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy import select

from ml_backend.cycle_log import CycleLog
from ml_backend.db import UsedTaskRow, utc_now
from ml_backend.errors import ImageError
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import choose_annotation, image_uri, instances_from_annotation
from ml_backend.pool import is_validation, read_scores
from ml_backend.service import Service
from model.config import TrainingConfig
from model.dataset import LabeledSet, load_image, read_coco, write_coco
from model.errors import DatasetError, TSPError
from model.evaluate import evaluate
from model.files import write_json
from model.network import MaskRCNNWithScores, build_model
from model.predict import detect
from model.registry import ModelCard
from model.train import Progress, load_trained, train
from model.types import Detections, LabeledImage


def snapshot(service: Service, project_key: str, number: int, log: CycleLog) -> str:
    """Freeze the annotations of this moment as two COCO files; returns the version the cycle will make."""
    folder = service.cycle_folder(project_key, number)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("pseudo.json", "checkpoint.safetensors"):  # of a snapshot whose record was lost
        (folder / stale).unlink(missing_ok=True)
    project = service.project(project_key)
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    log.stage("reading annotations")
    task_ids = sorted(service.label_studio.annotated_task_ids(project.id))
    images: dict[str, LabeledImage] = {}
    problems: list[str] = []
    for done, task in enumerate(service.label_studio.annotated_tasks(project.id, task_ids), start=1):
        try:
            image = _annotated_image(service, task, config)
            images[image.image_id] = image  # the same bytes in two tasks are one image
        except (ImageError, DatasetError) as error:
            problems.append(str(error))
        log.progress(done, len(task_ids))
    split = {
        name: LabeledSet(
            images=tuple(
                i for i in images.values() if is_validation(i.image_id, service.settings.validation_fraction) is wanted
            ),
            class_names=config.labels,
        )
        for name, wanted in (("training", False), ("validation", True))
    }
    for name, part in split.items():
        write_coco(folder / f"{name}.json", part)
    _mark_used(service, project_key, number, task_ids)
    log.facts(
        {
            "annotated": len(task_ids),
            "training": len(split["training"].images),
            "validation": len(split["validation"].images),
            "problems": problems[:20],
            "problem_count": len(problems),
        }
    )
    if not split["training"].images:
        raise TSPError(
            f"none of the {len(task_ids)} annotated tasks can be trained on ({len(split['validation'].images)} are for "
            f"validation, {len(problems)} have problems): annotate more images or lower TSP_VALIDATION_FRACTION"
        )
    return _freeze_recipe(service, number, folder, split["training"])


def train_version(service: Service, project_key: str, number: int, log: CycleLog) -> None:
    """Train on D_al and D_semi, from the pretrained weights, into the cycle's folder (eq. 5)."""
    folder = service.cycle_folder(project_key, number)
    training = _frozen(folder, "training")
    pseudo = _frozen_pseudo_labels(service, project_key, folder, training)
    log.facts({"pseudo_labeled": len(pseudo), "pseudo_instances": sum(len(image.labels) for image in pseudo)})
    log.stage(f"training on {len(training.images)} annotated and {len(pseudo)} pseudo-labelled images")

    def on_step(progress: Progress) -> None:
        log.progress(progress.step, progress.steps)

    started = time.monotonic()
    network, config = _recipe(folder)
    progress = train(
        network,
        [*training.images, *pseudo],
        config,
        checkpoint=folder / "checkpoint.safetensors",
        device=service.settings.torch_device(),
        on_step=on_step,
    )
    if progress:  # none when the checkpoint was complete already
        log.facts({"training_seconds": round(time.monotonic() - started, 1), "loss": progress.losses})


def evaluate_version(service: Service, project_key: str, number: int, version: str, log: CycleLog) -> None:
    """Measure the trained network on the frozen validation split and put it into the registry."""
    folder = service.cycle_folder(project_key, number)
    training, validation = _frozen(folder, "training"), _frozen(folder, "validation")
    log.stage("evaluating", total=len(validation.images))
    network = _trained_network(service, folder)
    found: dict[str, Detections] = {}
    for image in validation.images:
        found[image.image_id] = next(detect(network, [load_image(image.path)]))
        log.progress(len(found), len(validation.images))
    result = evaluate(found, validation.images, training.class_names, mask_threshold=network.config.mask_threshold)
    log.facts({"metrics": asdict(result)})
    recipe = json.loads((folder / "recipe.json").read_text())
    card = ModelCard(
        version=version,
        network=network.config.to_json(),
        class_names=training.class_names,
        created_at=utc_now(),
        parent=service.registry.active(project_key),
        data_fingerprint=_sha256((folder / "training.json").read_bytes()),
        metrics=asdict(result),
        training=recipe["training"],
        strategy=recipe.get("strategy", "tsp"),  # older releases knew no other
    )
    service.registry.add(project_key, card, network)


def _annotated_image(service: Service, task: Mapping[str, Any], config: LabelConfig) -> LabeledImage:
    fetched = service.images.fetch(task_id=task["id"], uri=image_uri(task, config))
    annotation = choose_annotation(task) or {}
    instances = instances_from_annotation(annotation, config, fetched.image_hw)
    unknown = [reason for reason in instances.ignored if reason.startswith("unknown label")]
    if unknown or (instances.ignored and not len(instances.labels)):
        # To train on the rest would teach that what was drawn there is background.
        raise DatasetError(f"task {task['id']}: not all of its annotation can be learnt: {dict(instances.ignored)}")
    return LabeledImage(
        image_id=fetched.sha256,
        path=fetched.path,
        image_hw=fetched.image_hw,
        labels=instances.labels,
        rles=instances.rles,
    )


def _mark_used(service: Service, project_key: str, number: int, task_ids: list[int]) -> None:
    with service.database.session() as session:
        known = set(session.scalars(select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == project_key)))
        new = [task_id for task_id in task_ids if task_id not in known]
        session.add_all(UsedTaskRow(project_key=project_key, task_id=t, first_cycle=number) for t in new)


def _freeze_recipe(service: Service, number: int, folder: Path, training: LabeledSet) -> str:
    """Write down how this cycle trains, so that settings changed in mid-cycle count from the next one; the version.

    No other training run has its name: Label Studio may still hold predictions of an earlier installation.
    """
    settings = service.settings
    recipe = {
        "profile": settings.profile,
        "num_classes": len(training.class_names) + 1,
        "weights": settings.weights,
        "strategy": settings.strategy,
        "options": settings.network_options(training.images),
        "training": asdict(settings.training()),
    }
    write_json(folder / "recipe.json", recipe)
    digest = _sha256((folder / "training.json").read_bytes() + (folder / "recipe.json").read_bytes())
    return f"tsp-{number}-{digest[:8]}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _frozen(folder: Path, name: str) -> LabeledSet:
    """A part of the snapshot; its images lie in the cache, under absolute paths."""
    return read_coco(folder / f"{name}.json", Path("/"))


def _frozen_pseudo_labels(
    service: Service, project_key: str, folder: Path, training: LabeledSet
) -> tuple[LabeledImage, ...]:
    """D_semi, chosen when training first starts and the same whenever it goes on."""
    if not (folder / "pseudo.json").exists():
        measured = {image.image_id for image in _frozen(folder, "validation").images}
        chosen = tuple(_pseudo_labeled(service, project_key, training, measured))
        write_coco(folder / "pseudo.json", LabeledSet(images=chosen, class_names=training.class_names))
    return _frozen(folder, "pseudo").images


def _pseudo_labeled(
    service: Service, project_key: str, training: LabeledSet, measured: set[str]
) -> Iterator[LabeledImage]:
    """D_semi: what the active version trusted in images that nobody has annotated and that do not measure.

    Images of tasks that were deleted or annotated since, and those missing from the cache, are left out.
    """
    version = service.registry.active(project_key)
    if version is None or not service.settings.semi_supervised:
        return
    taken = measured | {image.image_id for image in training.images}
    open_tasks = {t.id for t in service.label_studio.tasks(service.project(project_key).id) if not t.is_annotated}
    for line in read_scores(service.scores_file(project_key, version)):
        pseudo = line.get("pseudo")
        if not pseudo or line["task"] not in open_tasks or not Path(line["path"]).exists():
            continue
        if line["image"] in taken or is_validation(line["image"], service.settings.validation_fraction):
            continue
        taken.add(line["image"])
        known = [i for i, name in enumerate(pseudo["labels"]) if name in training.class_names]
        if known:
            yield LabeledImage(
                image_id=line["image"],
                path=Path(line["path"]),
                image_hw=(line["image_hw"][0], line["image_hw"][1]),
                labels=np.array([training.class_names.index(pseudo["labels"][i]) + 1 for i in known]),
                rles=tuple(pseudo["rles"][i] for i in known),
                pseudo=True,
            )


def _recipe(folder: Path) -> tuple[MaskRCNNWithScores, TrainingConfig]:
    """The untrained network and the training configuration that the snapshot froze."""
    recipe = json.loads((folder / "recipe.json").read_text())
    training = TrainingConfig(**{**recipe["training"], "milestones": tuple(recipe["training"]["milestones"])})
    torch.manual_seed(training.seed)
    network = build_model(recipe["profile"], recipe["num_classes"], weights=recipe["weights"], **recipe["options"])
    return network, training


def _trained_network(service: Service, folder: Path) -> MaskRCNNWithScores:
    network, _ = _recipe(folder)
    load_trained(network, folder / "checkpoint.safetensors")
    return network.to(service.settings.torch_device())
