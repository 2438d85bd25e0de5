"""COCO evaluation of masks: mAP@0.5, the paper's metric, mAP@[.5:.95], and AP by class."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.comparison import matched
from model.errors import InvalidInputError
from model.geometry import rle_area, rle_to_box_xyxy, roi_mask_to_rle
from model.types import BoolArray, Detections, FloatArray, LabeledImage, found_in


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Average precision of masks in [0, 1]; None where there is no ground truth to measure with."""

    map_50: float | None
    map_50_95: float | None
    ap_50_by_class: dict[str, float | None]
    ap_50_95_by_class: dict[str, float | None]
    images: int
    instances: int


def evaluate(
    detections: Mapping[str, Detections],
    images: Sequence[LabeledImage],
    class_names: Sequence[str],
    *,
    mask_threshold: float,
    max_detections: int = 1000,
) -> Evaluation:
    """Compare the detections of each image (by image_id) with its ground truth, at every IoU from .5 to .95.

    Crowd regions are not known here (`read_coco` leaves them out): what is found in one counts as a false alarm, which
    COCO's own evaluation would ignore. Raises InvalidInputError for an image without detections or of another size.
    """
    if missing := [image.image_id for image in images if image.image_id not in detections]:
        raise InvalidInputError(
            f"expected detections for every image, {len(missing)} have none, the first is {missing[0]}"
        )
    truth = ground_truth(images, class_names)
    at = precision(truth, results_of(detections, images, mask_threshold), max_detections)
    return Evaluation(
        map_50=_mean(at[:1]),
        map_50_95=_mean(at),
        ap_50_by_class={name: _mean(at[:1, :, k]) for k, name in enumerate(class_names)},
        ap_50_95_by_class={name: _mean(at[:, :, k]) for k, name in enumerate(class_names)},
        images=len(images),
        instances=len(truth["annotations"]),
    )


def ground_truth(images: Sequence[LabeledImage], class_names: Sequence[str]) -> dict[str, Any]:
    """A COCO dataset; images are numbered from 1."""
    annotations = [
        {"image_id": number, "category_id": int(label), "segmentation": dict(rle), "area": rle_area(rle), "iscrowd": 0}
        for number, image in enumerate(images, start=1)
        for label, rle in zip(image.labels, image.rles, strict=True)
    ]
    return {
        "info": {},
        "images": [{"id": n, "height": i.image_hw[0], "width": i.image_hw[1]} for n, i in enumerate(images, start=1)],
        "annotations": [
            {"id": number, "bbox": _bbox_xywh(annotation), **annotation}
            for number, annotation in enumerate(annotations, start=1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(class_names, start=1)],
    }


def results_of(
    detections: Mapping[str, Detections], images: Sequence[LabeledImage], mask_threshold: float
) -> list[dict[str, Any]]:
    """The detections of these images as COCO's results, by the numbers of `ground_truth`."""
    results: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        found = found_in(detections, image)
        for i in range(len(found)):
            rle = roi_mask_to_rle(
                found.roi_masks[i], found.boxes_xyxy[i], found.image_hw, mask_threshold=mask_threshold
            )
            results.append(
                {
                    "id": len(results) + 1,
                    "image_id": number,
                    "category_id": int(found.labels[i]),
                    "segmentation": dict(rle),
                    "score": float(found.class_scores[i]),
                }
            )
    return results


def precision(truth: dict[str, Any], results: list[dict[str, Any]], max_detections: int) -> FloatArray:
    """Interpolated precision (IoU thresholds, recall points, classes); -1 where a class has no ground truth."""
    if not results:
        return np.where(_has_truth(truth), 0.0, -1.0)[None, None, :].repeat(10, axis=0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by printing
        evaluator = _QuickCOCOeval(_indexed(truth), _indexed({**truth, "annotations": results}), "segm")
        evaluator.params.maxDets = [max_detections]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    table: FloatArray = evaluator.eval["precision"][:, :, :, 0, 0]
    return table


def _indexed(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


class _QuickCOCOeval(COCOeval):
    """The same figures, where no object is a crowd and none is ignored, in half of the time: an image's detections are
    matched at all IoU thresholds at once."""

    def evaluateImg(self, imgId: int, catId: int, aRng: Any, maxDet: int) -> dict[str, Any] | None:  # noqa: N802, N803
        found = self._dts[imgId, catId]
        count = len(self._gts[imgId, catId])
        if not found and not count:
            return None
        scores = np.array([detection["score"] for detection in found])
        scores = scores[np.argsort(-scores, kind="mergesort")][:maxDet]
        ious = np.reshape(self.ious[imgId, catId], (len(scores), count))  # a list where one of both is empty
        matches = matched(ious, scores, self.params.iouThrs)
        return {
            "dtScores": scores.tolist(),
            "dtMatches": matches,
            "dtIgnore": np.zeros_like(matches),
            "gtIgnore": np.zeros(count),
        }


def _has_truth(truth: dict[str, Any]) -> BoolArray:
    present = {annotation["category_id"] for annotation in truth["annotations"]}
    return np.array([category["id"] in present for category in truth["categories"]])


def _mean(precision: FloatArray) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _bbox_xywh(annotation: dict[str, Any]) -> list[float]:
    x0, y0, x1, y1 = rle_to_box_xyxy(annotation["segmentation"]).tolist()
    return [x0, y0, x1 - x0, y1 - y0]
