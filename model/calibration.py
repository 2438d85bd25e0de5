"""How far the predicted IoUs can be trusted: predicted against true box and mask IoU on images with ground truth,
and maps that bring the predicted closer to the true ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.errors import InvalidInputError
from model.geometry import roi_mask_to_rle
from model.types import Detections, FloatArray, LabeledImage, found_in

_BINS = 10
_LEAST_SLOPE = 0.05  # of a calibration: a branch that is wrong in its order is flattened, not turned round


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """One IoU branch over N detections: rank correlation, expected calibration error, and the reliability plot's bins
    (mean predicted, mean true, count), the empty ones left out."""

    spearman: float | None
    calibration_error: float | None
    bins: tuple[tuple[float, float, int], ...]
    count: int


def true_ious(
    detections: Mapping[str, Detections], images: Sequence[LabeledImage], *, mask_threshold: float
) -> dict[str, FloatArray]:
    """For all detections that overlap an instance of their class by a box IoU of at least 0.5, columns (N,):

    `box_scores`, `mask_scores` (predicted) and `box_ious`, `mask_ious` (true, with the instance of the best box IoU).
    The branches learn from such RoIs only (section 3.1). Raises InvalidInputError as `model.comparison` does.
    """
    columns: dict[str, list[float]] = {"box_scores": [], "mask_scores": [], "box_ious": [], "mask_ious": []}
    for image in images:
        found = found_in(detections, image)
        for i, label in enumerate(found.labels):
            truth = [dict(rle) for rle, other in zip(image.rles, image.labels, strict=True) if other == label]
            if not truth:
                continue
            box = found.boxes_xyxy[i].astype(np.float64)
            box_xywh = np.concatenate([box[:2], box[2:] - box[:2]])[None]
            box_ious = coco_mask.iou(box_xywh, coco_mask.toBbox(truth), [0] * len(truth))[0]
            best = int(box_ious.argmax())
            if box_ious[best] < 0.5:
                continue
            rle = roi_mask_to_rle(
                found.roi_masks[i], found.boxes_xyxy[i], found.image_hw, mask_threshold=mask_threshold
            )
            columns["box_scores"].append(float(found.box_scores[i]))
            columns["mask_scores"].append(float(found.mask_scores[i]))
            columns["box_ious"].append(float(box_ious[best]))
            columns["mask_ious"].append(float(coco_mask.iou([dict(rle)], [truth[best]], [0])[0, 0]))
    return {name: np.array(values) for name, values in columns.items()}


def reliability(predicted: FloatArray, true: FloatArray) -> Reliability:
    """Compare predicted with true IoUs, (N,) and (N,) in [0, 1]. Spearman needs two different values on each side."""
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise InvalidInputError(f"expected two arrays of the same shape (N,), got {predicted.shape} and {true.shape}")
    if len(predicted) == 0:
        return Reliability(spearman=None, calibration_error=None, bins=(), count=0)
    index = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    bins = tuple(
        (float(predicted[index == b].mean()), float(true[index == b].mean()), int((index == b).sum()))
        for b in np.unique(index)
    )
    error = sum(count * abs(p - t) for p, t, count in bins) / len(predicted)
    return Reliability(spearman=_spearman(predicted, true), calibration_error=error, bins=bins, count=len(predicted))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A rising map of predicted IoUs, `sigmoid(slope * logit(p) + intercept)`; the default changes nothing.

    Two parameters rather than an isotonic regression: a validation split has a few dozen pairs, and its steps would
    make equal what the branch had told apart, so that c * m would order less than before.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, predicted: FloatArray) -> FloatArray:
        """Predicted IoUs (N,) in [0, 1] -> calibrated ones, in the same order."""
        return _sigmoid(self.slope * _logit(predicted) + self.intercept)


def fit_calibration(predicted: FloatArray, true: FloatArray, *, prior: float = 1.0) -> Calibration:
    """The map with the least cross entropy of calibrated `predicted` (N,) against `true` (N,), on held-out images.

    `prior` pulls towards the map that changes nothing, `prior / 2 ((slope - 1)^2 + intercept^2)`, so that few pairs
    change little and none nothing. The slope stays positive.
    """
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise InvalidInputError(f"expected two arrays of the same shape (N,), got {predicted.shape} and {true.shape}")
    design = np.stack([_logit(predicted), np.ones(len(predicted))], axis=1)
    best = _least_loss(design, true, prior, at=np.array([1.0, 0.0]), free=np.array([True, True]))
    if best[0] < _LEAST_SLOPE:  # the loss is convex, so the best allowed map has just that slope
        best = _least_loss(design, true, prior, at=np.array([_LEAST_SLOPE, 0.0]), free=np.array([False, True]))
    return Calibration(slope=float(best[0]), intercept=float(best[1]))


def _least_loss(
    design: FloatArray, true: FloatArray, prior: float, *, at: FloatArray, free: NDArray[np.bool_]
) -> FloatArray:
    """Slope and intercept (2,) of the least loss from `at`, of which only the `free` ones move: Newton's method."""
    no_change = np.array([1.0, 0.0])

    def loss(at: FloatArray) -> float:
        z = design @ at
        return float((np.logaddexp(0, z) - true * z).sum() + prior / 2 * ((at - no_change) ** 2).sum())

    for _ in range(50):
        q = _sigmoid(design @ at)
        gradient = (design.T @ (q - true) + prior * (at - no_change))[free]
        curvature = ((design.T * (q * (1 - q))) @ design + prior * np.eye(2))[np.ix_(free, free)]
        step = np.zeros(2)
        step[free] = np.linalg.solve(curvature, gradient)
        # Halved until it helps: far from the minimum a whole step may overshoot.
        better = next((there for k in range(20) if loss(there := at - step / 2**k) < loss(at) - 1e-10), None)
        if better is None:
            break
        at = better
    return at


def _logit(p: FloatArray) -> FloatArray:
    clipped = np.clip(p.astype(np.float64), 1e-4, 1 - 1e-4)
    logits: FloatArray = np.log(clipped / (1 - clipped))
    return logits


def _sigmoid(z: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-z))


def _spearman(a: FloatArray, b: FloatArray) -> float | None:
    """Rank correlation with mean ranks for ties; None when one side is constant."""
    rank_a, rank_b = _ranks(a), _ranks(b)
    if np.ptp(rank_a) == 0 or np.ptp(rank_b) == 0:
        return None
    return float(np.corrcoef(rank_a, rank_b)[0, 1])


def _ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]
