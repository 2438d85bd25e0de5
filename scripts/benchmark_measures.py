"""What is measured of a network on the test images; each mask is pasted and compared once, for all rankings.

The average precisions are those of `model.evaluate` (COCO's), which pastes all masks anew for each ranking.
"""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from model.calibration import reliability
from model.comparison import Compared, average_precisions, mean_precision, ranked_hits
from model.types import BoolArray, FloatArray, LabeledImage

_LARGEST_MATCHES = 30_000  # characters; what is longer is not kept


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
        calibrated = {
            "calibrated_map_50": mean_precision(by_calibrated[:, 0]),
            "calibrated_map_50_95": mean_precision(by_calibrated),
        }
    return {
        "map_50": mean_precision(by_class_score[:, 0]),
        "map_50_95": mean_precision(by_class_score),
        "ap_50_by_class": _named(by_class_score[:, :1], class_names),
        "ap_50_95_by_class": _named(by_class_score, class_names),
        "rescored_map_50": mean_precision(by_product[:, 0]),
        "rescored_map_50_95": mean_precision(by_product),
        **calibrated,
        "box_reliability": asdict(reliability(pairs["box_scores"], pairs["box_ious"])),
        "mask_reliability": asdict(reliability(pairs["mask_scores"], pairs["mask_ious"])),
        "matches": matches(compared, class_names),
    }


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
        image, hit = ranked_hits(compared, label)
        end = int(np.flatnonzero(hit)[-1]) + 1 if hit.any() else 0
        codes = (image.astype("<u4") * 2 + hit)[:end].astype("<u4")
        packed[name] = base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()
    return packed if sum(map(len, packed.values())) < _LARGEST_MATCHES else None


def unpacked(text: str) -> tuple[NDArray[np.int64], BoolArray]:
    """What `matches` packed for one class: by rank, the number of each detection's image and whether it is a hit."""
    codes = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4").astype(np.int64)
    return codes // 2, codes % 2 == 1


def pseudo_quality(pseudo: Sequence[LabeledImage], truth: Mapping[str, LabeledImage]) -> dict[str, Any]:
    """Precision and recall of the pseudo labels against the hidden ground truth, at mask IoU 0.5 and equal class, and
    the precision at 0.75.

    `truth` are all images that are still unlabelled, by id: also those without pseudo labels count in the recall.
    """
    made = sum(len(image.labels) for image in pseudo)
    hits, close_hits = (sum(_hits(image, truth[image.image_id], iou) for image in pseudo) for iou in (0.5, 0.75))
    hidden = sum(len(image.labels) for image in truth.values())
    return {
        "instances": made,
        "hidden_instances": hidden,
        "precision": hits / made if made else None,
        "precision_75": close_hits / made if made else None,
        "recall": hits / hidden if hidden else None,
    }


def _hits(pseudo: LabeledImage, true: LabeledImage, iou: float) -> int:
    """How many pseudo labels have an instance of their own, of their class and with at least this mask IoU."""
    hits, free = 0, set(range(len(true.labels)))
    ious = coco_mask.iou([dict(r) for r in pseudo.rles], [dict(r) for r in true.rles], [0] * len(true.rles))
    for i, label in enumerate(pseudo.labels):
        fitting = [j for j in free if true.labels[j] == label and ious[i][j] >= iou]
        if fitting:
            hits += 1
            free.remove(max(fitting, key=lambda j: ious[i][j]))
    return hits


def _named(by_class: FloatArray, class_names: Sequence[str]) -> dict[str, float | None]:
    return {name: mean_precision(row) for name, row in zip(class_names, by_class, strict=True)}
