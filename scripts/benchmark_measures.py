"""What is measured of a network on the test images; each mask is pasted and compared once, for all rankings.

The average precisions are those of `model.evaluate` (COCO's), which pastes all masks anew for each ranking.
"""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.calibration import reliability
from model.geometry import roi_mask_to_rle
from model.types import BoolArray, Detections, FloatArray, LabeledImage

_IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_LARGEST_MATCHES = 30_000  # characters; what is longer is not kept


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


def compare(
    found: Mapping[str, Detections], images: Sequence[LabeledImage], class_count: int, *, mask_threshold: float
) -> list[Compared]:
    """Compare the detections of each image with its ground truth, class by class; images are numbered in order."""
    result = []
    for number, image in enumerate(images):
        detections = found[image.image_id]
        for label in range(1, class_count + 1):
            chosen = detections.select(np.flatnonzero(detections.labels == label))
            truth = [dict(rle) for rle, other in zip(image.rles, image.labels, strict=True) if other == label]
            if len(chosen) or truth:
                result.append(_compared(number, label, chosen, truth, mask_threshold))
    return result


def measured(
    compared: Sequence[Compared],
    class_names: Sequence[str],
    calibrate: Callable[[FloatArray], FloatArray] | None = None,
) -> dict[str, Any]:
    """mAP@0.5 and mAP@[.5:.95] ranked by c and by c x m, AP by class, and how far both IoU branches can be trusted.

    With `calibrate`, a map of predicted mask IoUs (N,) -> (N,), also ranked by c x calibrated m.
    """
    by_class_score = average_precisions(compared, len(class_names), lambda pair: pair.class_scores)
    by_product = average_precisions(compared, len(class_names), lambda pair: pair.class_scores * pair.mask_scores)
    pairs = iou_pairs(compared)
    calibrated: dict[str, float | None] = {"calibrated_map_50": None, "calibrated_map_50_95": None}
    if calibrate is not None:
        by_calibrated = average_precisions(
            compared, len(class_names), lambda pair: pair.class_scores * calibrate(pair.mask_scores)
        )
        calibrated = {"calibrated_map_50": _mean(by_calibrated[:, 0]), "calibrated_map_50_95": _mean(by_calibrated)}
    return {
        "map_50": _mean(by_class_score[:, 0]),
        "map_50_95": _mean(by_class_score),
        "ap_50_by_class": _named(by_class_score[:, :1], class_names),
        "ap_50_95_by_class": _named(by_class_score, class_names),
        "rescored_map_50": _mean(by_product[:, 0]),
        "rescored_map_50_95": _mean(by_product),
        **calibrated,
        "box_reliability": asdict(reliability(pairs["box_scores"], pairs["box_ious"])),
        "mask_reliability": asdict(reliability(pairs["mask_scores"], pairs["mask_ious"])),
        "matches": matches(compared, class_names),
    }


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
    hits = np.zeros((len(thresholds), len(scores)), dtype=np.bool_)
    if ious.shape[1] == 0:
        return hits
    taken = np.zeros((len(thresholds), ious.shape[1]), dtype=np.bool_)
    rows = np.arange(len(thresholds))
    for d in np.argsort(-scores, kind="stable"):
        free = np.where(taken, -1.0, ious[d])
        best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)  # of equal ones the last, as in COCO's evaluation
        hits[:, d] = free[rows, best] >= np.minimum(thresholds, 1 - 1e-10)
        taken[rows[hits[:, d]], best[hits[:, d]]] = True
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


def iou_pairs(compared: Sequence[Compared]) -> dict[str, FloatArray]:
    """The columns of `model.calibration.true_ious`, from IoUs that are known already."""
    columns: dict[str, list[FloatArray]] = {"box_scores": [], "mask_scores": [], "box_ious": [], "mask_ious": []}
    for pair in compared:
        if pair.instances and len(pair.class_scores):
            best = pair.box_ious.argmax(axis=1)
            rows = np.flatnonzero(pair.box_ious[np.arange(len(best)), best] >= 0.5)
            columns["box_scores"].append(pair.box_scores[rows])
            columns["mask_scores"].append(pair.mask_scores[rows])
            columns["box_ious"].append(pair.box_ious[rows, best[rows]])
            columns["mask_ious"].append(pair.mask_ious[rows, best[rows]])
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}


def matches(compared: Sequence[Compared], class_names: Sequence[str]) -> dict[str, str] | None:
    """All that AP@0.5 of a resampled test set needs: by class, the image of each detection by rank, and if it is a hit.

    Up to the last hit: what comes after it changes nothing. None when that is too much to keep. `unpacked` reads it.
    """
    packed = {}
    for label, name in enumerate(class_names, start=1):
        of_class = [pair for pair in compared if pair.label == label]
        scores = np.concatenate([pair.class_scores for pair in of_class] or [np.zeros(0)])
        hits = [matched(pair.mask_ious, pair.class_scores, _IOUS[:1])[0] for pair in of_class]
        images = np.repeat([pair.image for pair in of_class], [len(pair.class_scores) for pair in of_class])
        order = np.argsort(-scores, kind="stable")
        hit = np.concatenate([*hits, np.zeros(0, dtype=np.bool_)])[order]
        end = int(np.flatnonzero(hit)[-1]) + 1 if hit.any() else 0
        codes = (images[order].astype("<u4") * 2 + hit)[:end].astype("<u4")
        packed[name] = base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()
    return packed if sum(map(len, packed.values())) < _LARGEST_MATCHES else None


def unpacked(text: str) -> tuple[NDArray[np.int64], BoolArray]:
    """What `matches` packed for one class: by rank, the number of each detection's image and whether it is a hit."""
    codes = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4").astype(np.int64)
    return codes // 2, codes % 2 == 1


def pseudo_quality(pseudo: Sequence[LabeledImage], truth: Mapping[str, LabeledImage]) -> dict[str, Any]:
    """Precision and recall of the pseudo labels against the hidden ground truth, at mask IoU 0.5 and equal class.

    `truth` are all images that are still unlabelled, by id: also those without pseudo labels count in the recall.
    """
    hits = made = 0
    for image in pseudo:
        true = truth[image.image_id]
        made += len(image.labels)
        free = set(range(len(true.labels)))
        ious = coco_mask.iou([dict(r) for r in image.rles], [dict(r) for r in true.rles], [0] * len(true.rles))
        for i, label in enumerate(image.labels):
            fitting = [j for j in free if true.labels[j] == label and ious[i][j] >= 0.5]
            if fitting:
                hits += 1
                free.remove(max(fitting, key=lambda j: ious[i][j]))
    hidden = sum(len(image.labels) for image in truth.values())
    return {
        "instances": made,
        "hidden_instances": hidden,
        "precision": hits / made if made else None,
        "recall": hits / hidden if hidden else None,
    }


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


def _named(by_class: FloatArray, class_names: Sequence[str]) -> dict[str, float | None]:
    return {name: _mean(row) for name, row in zip(class_names, by_class, strict=True)}


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
