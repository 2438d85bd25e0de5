"""Detections against ground truth, image by image: each mask is pasted and compared once, for all rankings and for test
sets that are drawn anew from the same images.

The average precisions are those of `model.evaluate` (COCO's), which pastes all masks anew for each ranking.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.geometry import roi_mask_to_rle
from model.types import BoolArray, Detections, FloatArray, LabeledImage, found_in

_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The D detections of one class in one image and its G instances: the triplets (D,), and their IoUs (D, G)."""

    image: int
    label: int
    instances: int
    class_scores: FloatArray
    box_scores: FloatArray
    mask_scores: FloatArray
    box_ious: FloatArray
    mask_ious: FloatArray


Ranking = Callable[[Compared], FloatArray]
Matches = tuple[NDArray[np.int64], BoolArray]  # of one class: by rank, the number of the image and whether it is a hit


def compare(
    found: Mapping[str, Detections], images: Sequence[LabeledImage], class_count: int, *, mask_threshold: float
) -> list[Compared]:
    """Compare the detections of each image with its ground truth, class by class; images are numbered in order.

    Raises InvalidInputError for an image without detections or with detections for another size.
    """
    result = []
    for number, image in enumerate(images):
        detections = found_in(found, image)
        for label in range(1, class_count + 1):
            chosen = detections.select(np.flatnonzero(detections.labels == label))
            truth = [dict(rle) for rle, other in zip(image.rles, image.labels, strict=True) if other == label]
            if len(chosen) or truth:
                result.append(_compared(number, label, chosen, truth, mask_threshold))
    return result


def average_precisions(compared: Sequence[Compared], class_count: int, ranking: Ranking) -> FloatArray:
    """COCO's average precision by class and IoU threshold (C, 10); nan for a class without ground truth."""
    result = np.full((class_count, len(_IOUS)), np.nan)
    for label in range(1, class_count + 1):
        of_class = [pair for pair in compared if pair.label == label]
        instances = sum(pair.instances for pair in of_class)
        if instances:
            scores = [ranking(pair) for pair in of_class]
            hits = [matched(pair.mask_ious, s, _IOUS) for pair, s in zip(of_class, scores, strict=True)]
            order = np.argsort(-np.concatenate(scores), kind="stable")
            result[label - 1] = [
                average_precision(row, instances) for row in np.concatenate(hits, axis=1)[:, order].astype(np.float64)
            ]
    return result


def matched(ious: FloatArray, scores: FloatArray, thresholds: FloatArray) -> BoolArray:
    """Which of D detections are hits at T thresholds, (T, D): the best first, each takes the best instance left."""
    thresholds = np.minimum(thresholds, 1 - 1e-10)
    hits = np.zeros((len(thresholds), len(scores)), dtype=np.bool_)
    left = np.ones((len(thresholds), ious.shape[1]), dtype=np.bool_)
    rows = np.arange(len(thresholds))
    order = np.argsort(-scores, kind="stable")
    for d in order[ious.max(axis=1, initial=-1.0)[order] >= thresholds.min()]:
        free = np.where(left, ious[d], -1.0)
        best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)  # of equal ones the last, as in COCO's evaluation
        hits[:, d] = free[rows, best] >= thresholds
        left[rows[hits[:, d]], best[hits[:, d]]] = False
    return hits


def average_precision(hits: FloatArray, instances: float, weights: FloatArray | None = None) -> float:
    """Interpolated at 101 recalls, of detections in the order of their rank: 1 for a hit, 0 for none, (D,).

    `weights` (D,) count detections several times, as a resampled test set does; `instances` are counted alike.
    """
    weights = np.ones(len(hits)) if weights is None else weights
    true = (hits * weights).cumsum()
    precision = true / np.maximum((weights.cumsum()), np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(true / instances, _RECALLS, side="left")
    return float(np.append(envelope, 0.0)[at].mean())


def mean_precision(values: FloatArray) -> float | None:
    """The mean over classes (and IoU thresholds), without those that have no ground truth (nan); None without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def ranked_hits(compared: Sequence[Compared], label: int) -> Matches:
    """Of one class, by rank: the number of each detection's image (D,), and whether it is a hit at IoU 0.5 (D,)."""
    of_class = [pair for pair in compared if pair.label == label]
    scores = np.concatenate([pair.class_scores for pair in of_class] or [np.zeros(0)])
    hits = [matched(pair.mask_ious, pair.class_scores, _IOUS[:1])[0] for pair in of_class]
    images = np.repeat([pair.image for pair in of_class], [len(pair.class_scores) for pair in of_class])
    order = np.argsort(-scores, kind="stable")
    return images[order].astype(np.int64), np.concatenate([*hits, np.zeros(0, dtype=np.bool_)])[order]


def resampled_map_50(
    matches: Mapping[str, Matches], instances: Mapping[str, Sequence[int]], resamples: int
) -> FloatArray:
    """mAP@0.5 on so many resampled test sets, (resamples,); the same sets each time, so that lines are paired.

    `instances` are those of each test image, by class. A class that a resampled set lacks is left out of its mean.
    """
    images = len(next(iter(instances.values())))
    draws = np.random.default_rng(0).integers(images, size=(resamples, images))
    weights = np.stack([np.bincount(draw, minlength=images) for draw in draws]).astype(np.float64)
    by_class = np.full((len(instances), resamples), np.nan)
    for row, (name, counts) in enumerate(instances.items()):
        image, hit = matches[name]
        totals = weights @ np.array(counts, dtype=np.float64)
        for n in np.flatnonzero(totals > 0):
            by_class[row, n] = average_precision(hit.astype(np.float64), totals[n], weights[n, image])
    known = ~np.isnan(by_class)
    means: FloatArray = np.where(known, by_class, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return means


def _compared(
    number: int, label: int, chosen: Detections, truth: list[dict[str, Any]], mask_threshold: float
) -> Compared:
    boxes = chosen.boxes_xyxy.astype(np.float64)
    boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    box_ious = mask_ious = np.zeros((len(chosen), len(truth)))
    if len(chosen) and truth:
        rles = [
            dict(roi_mask_to_rle(mask, box, chosen.image_hw, mask_threshold=mask_threshold))
            for mask, box in zip(chosen.roi_masks, chosen.boxes_xyxy, strict=True)
        ]
        box_ious = coco_mask.iou(boxes_xywh, coco_mask.toBbox(truth), [0] * len(truth))
        mask_ious = coco_mask.iou(rles, truth, [0] * len(truth))
    return Compared(
        image=number,
        label=label,
        instances=len(truth),
        class_scores=chosen.class_scores,
        box_scores=chosen.box_scores,
        mask_scores=chosen.mask_scores,
        box_ious=box_ious,
        mask_ious=mask_ious,
    )
