"""Which predictions on unlabelled images are trusted as labels (section 3.2); pure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from model.comparison import Compared, matched
from model.config import PseudoLabelConfig
from model.errors import InvalidInputError
from model.geometry import rle_area, roi_mask_to_rle
from model.tsp import instance_scores
from model.types import BoolArray, Detections, FloatArray, IntArray, LabeledImage


def trusted(
    detections: Detections, config: PseudoLabelConfig, *, class_thresholds: FloatArray | None = None
) -> BoolArray:
    """Which of the N instances become pseudo labels, (N,) bool.

    Rule "and": c > sigma_c and b > sigma_b and m > sigma_m, the text of section 3.2. Rule "or": Algorithm 1, line 10
    removes an instance only when all three scores are below their thresholds. Rule "precision": s > sigma_s, eq. 2.
    `class_thresholds` (C,) are the sigma_c of each class, for label l at l - 1.
    """
    if config.rule == "precision":
        scores = instance_scores(detections.class_scores, detections.box_scores, detections.mask_scores)
        certain: BoolArray = scores > config.score_threshold
        return certain
    if config.class_wise_thresholds and class_thresholds is None:
        raise InvalidInputError("class_wise_thresholds: expected class_thresholds (C,), got none; see that function")
    if class_thresholds is not None and detections.labels.max(initial=0) > len(class_thresholds):
        raise InvalidInputError(
            f"class_thresholds: expected {detections.labels.max()} or more, one for each label, "
            f"got {len(class_thresholds)}"
        )
    by_instance = config.class_threshold if class_thresholds is None else class_thresholds[detections.labels - 1]
    passed = np.stack(
        [
            detections.class_scores > by_instance,
            detections.box_scores > config.box_threshold,
            detections.mask_scores > config.mask_threshold,
        ]
    )
    chosen: BoolArray = np.logical_and.reduce(passed) if config.rule == "and" else np.logical_or.reduce(passed)
    return chosen


def with_score_threshold(config: PseudoLabelConfig, compared: Sequence[Compared]) -> PseudoLabelConfig:
    """For rule "precision", the same with the lowest sigma_s above which enough of these predictions are right.

    `compared` are a model's detections against ground truth, in images that it has not learnt from: of the correct
    class, with a mask IoU of at least `config.precision_iou`. Other rules have no sigma_s: they stay as they are.
    """
    if config.rule != "precision":
        return config
    scores = [instance_scores(pair.class_scores, pair.box_scores, pair.mask_scores) for pair in compared]
    iou = np.array([config.precision_iou])
    right = [matched(pair.mask_ious, s, iou)[0] for pair, s in zip(compared, scores, strict=True)]
    threshold = score_threshold(
        np.concatenate([np.empty(0), *scores]), np.concatenate([np.empty(0, dtype=np.bool_), *right]), config.precision
    )
    return replace(config, score_threshold=threshold)


def score_threshold(scores: FloatArray, right: BoolArray, precision: float) -> float:
    """The lowest sigma_s for which at least `precision` of the predictions with s >= sigma_s, of N, are right.

    One more wrong one is counted than there is, `hits / (n + 1)`, so that a few lucky ones are not enough: for 0.9 it
    takes nine. 1 if there is no such threshold: nothing is trusted then. Of equal scores, the first ones are counted
    first, wherever the threshold falls among them.
    """
    order = np.argsort(-scores, kind="stable")
    enough = right[order].cumsum() >= precision * (np.arange(len(scores)) + 2)
    last = np.flatnonzero(enough)
    # Just below this score, so that by s > sigma_s what equals it is trusted in float64. Scores in float32 are compared
    # with sigma_s rounded to float32, which is the score itself: what equals it is not trusted then.
    return float(np.nextafter(scores[order[last[-1]]], 0)) if len(last) else 1.0


def class_thresholds(
    class_scores: FloatArray, labels: IntArray, config: PseudoLabelConfig, *, num_classes: int
) -> FloatArray:
    """Sigma_c by class, (C,), from the scores (N,) and labels (N,) in 1..C of all detections of a pool.

    A class of which the model is less sure gets a lower threshold, in proportion (the rule of FreeMatch, which goes
    back to FlexMatch): `sigma_c(k) = max(floor, sigma_c * mean_k / max_j mean_j)`, where mean_k is the mean class score
    of those detections of class k that reach the floor. Means, not counts, so that a rare class is not taken for a
    difficult one. A class without such a detection keeps sigma_c.
    """
    counted = class_scores >= config.class_threshold_floor
    index, scores = labels[counted] - 1, class_scores[counted]
    sums, counts = (np.bincount(index, weights=w, minlength=num_classes) for w in (scores, None))
    means = np.divide(sums, counts, out=np.zeros(num_classes), where=counts > 0)
    thresholds: FloatArray = np.full(num_classes, config.class_threshold)
    adapted = config.class_threshold * means / max(means.max(initial=0), 1e-9)
    thresholds[counts > 0] = np.maximum(config.class_threshold_floor, adapted)[counts > 0]
    return thresholds


def image_with_trusted(
    detections: Detections,
    config: PseudoLabelConfig,
    *,
    image_id: str,
    path: Path,
    mask_threshold: float,
    class_thresholds: FloatArray | None = None,
) -> LabeledImage:
    """The image with its trusted instances as labels. If there are none it is not in D_semi; a teacher may look again.

    What is not trusted, but has a class score above `ignore_threshold`, goes into the ignored boxes.
    """
    chosen = trusted(detections, config, class_thresholds=class_thresholds)
    rles = {
        int(i): roi_mask_to_rle(
            detections.roi_masks[i], detections.boxes_xyxy[i], detections.image_hw, mask_threshold=mask_threshold
        )
        for i in np.flatnonzero(chosen)
    }
    visible = [i for i, rle in rles.items() if rle_area(rle) > 0]
    uncertain = detections.class_scores > config.ignore_threshold
    uncertain[visible] = False
    triplets = np.stack([detections.class_scores, detections.box_scores, detections.mask_scores], axis=1)
    return LabeledImage(
        image_id=image_id,
        path=path,
        image_hw=detections.image_hw,
        labels=detections.labels[visible],
        rles=tuple(rles[i] for i in visible),
        pseudo=True,
        triplets=triplets[visible].astype(np.float64),
        ignored_boxes_xyxy=detections.boxes_xyxy[uncertain].astype(np.float64),
    )
