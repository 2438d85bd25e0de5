"""What of the unlabelled images the model teaches itself: kept when it looks at them, decided when a cycle trains."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ml_backend.ls_format import Json
from model.config import PseudoLabelConfig, TrainingConfig
from model.geometry import rle_area, rle_to_box_xyxy, roi_mask_to_rle
from model.pseudo_labels import class_thresholds, trusted
from model.types import Detections, FloatArray, LabeledImage, Rle


@dataclass(frozen=True, kw_only=True)
class SeenImage:
    """What was kept of an image: its detections, whose RoI masks are gone (N, 0, 0), and the masks at the image's size
    of those that could be trusted (None for the others)."""

    image_id: str
    path: Path
    detections: Detections
    rles: tuple[Rle | None, ...]


def kept_detections(
    detections: Detections, config: PseudoLabelConfig, *, class_names: Sequence[str], mask_threshold: float
) -> Json:
    """For a line of the scores file: the detections that may become pseudo labels or boxes to ignore, or that count in
    the thresholds by class. Masks take most of the space: only those have one that could be trusted."""
    lowest = config.class_threshold_floor if config.class_wise_thresholds else config.class_threshold
    possible = trusted(detections, replace(config, class_wise_thresholds=False, class_threshold=lowest))
    least = min(config.ignore_threshold, config.class_threshold_floor)
    indices = np.flatnonzero(possible | (detections.class_scores >= least)).tolist()
    kept = detections.select(np.array(indices, dtype=np.int64))
    triplets = np.stack([kept.class_scores, kept.box_scores, kept.mask_scores], axis=1).astype(np.float64)
    return {
        "labels": [class_names[label - 1] for label in kept.labels.tolist()],
        "triplets": triplets.round(6).tolist(),
        "boxes_xyxy": kept.boxes_xyxy.astype(np.float64).round(2).tolist(),
        "rles": [_visible_rle(detections, i, mask_threshold) if possible[i] else None for i in indices],
    }


def trust_by(config: PseudoLabelConfig, metrics: Json) -> PseudoLabelConfig:
    """What is trusted of a version, whose `metrics` have the sigma_s of rule "precision": without one, nothing."""
    if config.rule != "precision":
        return config
    return replace(config, score_threshold=metrics.get("pseudo_score_threshold", 1.0))


def seen_image(line: Json, class_names: Sequence[str], *, only_masks: bool) -> SeenImage:
    """What a line of the scores file kept of its image; classes that the project no longer has are left out.

    Lines of older releases hold no more than the labels and masks that were trusted then. Where that is enough
    (`only_masks`) they are trusted still, else they are not read.
    """
    rles: list[Rle | None]
    if "detections" in line:
        seen = line["detections"]
        names, triplets, boxes, rles = seen["labels"], seen["triplets"], seen["boxes_xyxy"], seen["rles"]
    else:
        old = (line.get("pseudo") if only_masks else None) or {"labels": [], "rles": []}
        names, rles = old["labels"], old["rles"]
        triplets, boxes = [[1.0, 1.0, 1.0]] * len(names), [rle_to_box_xyxy(rle).tolist() for rle in old["rles"]]
    known = [i for i, name in enumerate(names) if name in class_names]
    c, b, m = np.array([triplets[i] for i in known], dtype=np.float64).reshape(-1, 3).T
    return SeenImage(
        image_id=line["image"],
        path=Path(line["path"]),
        detections=Detections(
            image_hw=(line["image_hw"][0], line["image_hw"][1]),
            boxes_xyxy=np.array([boxes[i] for i in known], dtype=np.float64).reshape(-1, 4),
            labels=np.array([class_names.index(names[i]) + 1 for i in known], dtype=np.int64),
            class_scores=c,
            box_scores=b,
            mask_scores=m,
            roi_masks=np.empty((len(known), 0, 0)),
        ),
        rles=tuple(rles[i] for i in known),
    )


def only_masks_are_needed(config: PseudoLabelConfig, training: TrainingConfig) -> bool:
    """Whether pseudo labels teach without their scores and without what was seen beside them, as in the paper."""
    return not (
        config.class_wise_thresholds
        or config.rule == "precision"
        or training.soft_weights
        or training.pseudo_negatives != "none"
    )


def thresholds_by_class(seen: Sequence[SeenImage], config: PseudoLabelConfig, *, num_classes: int) -> FloatArray | None:
    """Sigma_c by class, (C,), from all that was seen; None when one sigma_c holds for all."""
    if not config.class_wise_thresholds:
        return None
    scores = np.concatenate([image.detections.class_scores for image in seen] or [np.empty(0)])
    labels = np.concatenate([image.detections.labels for image in seen] or [np.empty(0, dtype=np.int64)])
    return class_thresholds(scores, labels, config, num_classes=num_classes)


def with_trusted(seen: SeenImage, config: PseudoLabelConfig, thresholds: FloatArray | None) -> LabeledImage:
    """The image with its trusted instances as labels, perhaps none, as `model.pseudo_labels.image_with_trusted` does.

    What would be trusted now, but was not when its mask could have been kept, is a box to ignore.
    """
    found = seen.detections
    chosen = trusted(found, config, class_thresholds=thresholds)
    rles = {i: rle for i, rle in enumerate(seen.rles) if chosen[i] and rle is not None}
    labels = list(rles)
    uncertain = found.class_scores > config.ignore_threshold
    uncertain[labels] = False
    return LabeledImage(
        image_id=seen.image_id,
        path=seen.path,
        image_hw=found.image_hw,
        labels=found.labels[labels],
        rles=tuple(rles.values()),
        pseudo=True,
        triplets=np.stack([found.class_scores, found.box_scores, found.mask_scores], axis=1)[labels],
        ignored_boxes_xyxy=found.boxes_xyxy[uncertain],
    )


def _visible_rle(detections: Detections, index: int, mask_threshold: float) -> Rle | None:
    """The mask of one detection at the image's size; None when no pixel is left of it."""
    rle = roi_mask_to_rle(
        detections.roi_masks[index],
        detections.boxes_xyxy[index],
        detections.image_hw,
        mask_threshold=mask_threshold,
    )
    return rle if rle_area(rle) > 0 else None
