"""Measures the active version on a new version's validation images, for `model.gate` to judge between the two."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ml_backend.cycle_log import CycleLog
from ml_backend.handover import bring_snapshot
from ml_backend.publication import cycle_of
from ml_backend.service import Service
from model.comparison import compare
from model.dataset import LabeledSet, load_annotated, read_coco
from model.errors import RegistryError
from model.gate import Verdict, judge
from model.predict import detect
from model.types import Detections, IntArray, LabeledImage


def judge_version(
    service: Service,
    project_key: str,
    found: Mapping[str, Detections],
    validation: LabeledSet,
    *,
    mask_threshold: float,
    log: CycleLog,
) -> Verdict:
    """Whether the version that sees `found` (by image_id) in the validation images may become the active one.

    Both versions are held to the classes that they share and that people still draw.
    """
    active = service.registry.active(project_key)
    verdict = _verdict(service, project_key, active, found, validation, mask_threshold, log)
    log.facts({"gate": {"active": active, **asdict(verdict)}})
    return verdict


def _verdict(
    service: Service,
    project_key: str,
    active: str | None,
    found: Mapping[str, Detections],
    validation: LabeledSet,
    mask_threshold: float,
    log: CycleLog,
) -> Verdict:
    if active is None:
        return Verdict(accepted=True, reason="accepted: the first version")
    if not service.settings.gate:
        return Verdict(accepted=True, reason="accepted without judgement: TSP_GATE is off")
    try:
        network, card = service.registry.load(project_key, active)
    except RegistryError as error:
        return Verdict(accepted=True, reason=f"accepted without judgement: {error}")
    names = [name for name in validation.class_names if name in card.class_names]
    if not names:
        return Verdict(
            accepted=True,
            reason=f"accepted without judgement: {active} knows none of the present labels "
            f"{', '.join(validation.class_names)}, only {', '.join(card.class_names)}",
        )
    known = _trained_on(service, project_key, active)
    images = [image for image in validation.images if image.image_id not in known]
    log.stage(f"measuring {active} on the same images", total=len(images))
    network.to(service.settings.torch_device())
    of_active: dict[str, Detections] = {}
    for image in images:
        of_active[image.image_id] = next(detect(network, [load_annotated(image)]))
        log.progress(len(of_active), len(images))
    truth = [_truth_of(image, validation.class_names, names) for image in images]
    new, old = (
        compare(
            {image_id: _detections_of(d, classes, names) for image_id, d in seen.items()},
            truth,
            len(names),
            mask_threshold=threshold,
        )
        for seen, classes, threshold in (
            (found, validation.class_names, mask_threshold),
            (of_active, card.class_names, network.config.mask_threshold),
        )
    )
    return judge(new, old, names, images=len(truth), margin=service.settings.gate_margin)


def _trained_on(service: Service, project_key: str, version: str) -> set[str]:
    """The images that taught a version: they may measure now, when TSP_VALIDATION_FRACTION has risen since."""
    bring_snapshot(service, project_key, cycle_of(version))
    snapshot = service.cycle_folder(project_key, cycle_of(version)) / "training.json"
    return {image.image_id for image in read_coco(snapshot, Path("/")).images} if snapshot.exists() else set()


def _detections_of(detections: Detections, class_names: Sequence[str], names: Sequence[str]) -> Detections:
    """Those of the classes `names`, numbered as there."""
    labels = _renumbered(detections.labels, class_names, names)
    return replace(detections, labels=labels).select(labels > 0)


def _truth_of(image: LabeledImage, class_names: Sequence[str], names: Sequence[str]) -> LabeledImage:
    """The instances of the classes `names`, numbered as there."""
    labels = _renumbered(image.labels, class_names, names)
    rles = tuple(rle for rle, label in zip(image.rles, labels, strict=True) if label)
    return replace(image, labels=labels[labels > 0], rles=rles)


def _renumbered(labels: IntArray, class_names: Sequence[str], names: Sequence[str]) -> IntArray:
    """Classes 1..C of `class_names` as those of `names`, 0 for one that is not among these."""
    number = [0, *(names.index(name) + 1 if name in names else 0 for name in class_names)]
    renumbered: IntArray = np.array(number, dtype=np.int64)[labels]
    return renumbered
