"""Which detections show the same instance twice: box NMS lets through what only the masks tell."""

import numpy as np
from pycocotools import mask as coco_mask

from model.geometry import roi_mask_to_rle
from model.types import BoolArray, Detections

_SAME_IOU = 0.5
_SAME_SHARE = 0.8  # of the smaller mask, inside the larger one


def distinct(detections: Detections, *, mask_threshold: float) -> BoolArray:
    """Which of N detections to keep, (N,): of two of one class whose masks are nearly the same (IoU above 0.5), or
    of which one lies in the other (80 % of the smaller), the one with the lower class score goes."""
    keep = np.zeros(len(detections), dtype=bool)
    meet = _meet(detections)
    rles = {
        i: dict(roi_mask_to_rle(roi, box, detections.image_hw, mask_threshold=mask_threshold))
        for i, (roi, box) in enumerate(zip(detections.roi_masks, detections.boxes_xyxy, strict=True))
        if meet[i].any()  # of a large image, masks take longer than all the rest
    }
    areas = np.zeros(len(detections))
    areas[list(rles)] = coco_mask.area(list(rles.values())) if rles else 0
    for i in np.argsort(-detections.class_scores, kind="stable"):
        rivals = np.flatnonzero(keep & meet[i])
        if len(rivals):
            # For a "crowd" pycocotools divides the intersection by the area of the first mask alone.
            share = coco_mask.iou([rles[i]], [rles[j] for j in rivals], [1] * len(rivals))[0]
            intersection = share * areas[i]
            smaller, union = np.minimum(areas[i], areas[rivals]), areas[i] + areas[rivals] - intersection
            same = (intersection > _SAME_IOU * union) | (intersection > _SAME_SHARE * smaller)
            if bool(same.any()):
                continue
        keep[i] = True
    return keep


def _meet(detections: Detections) -> BoolArray:
    """Whether two detections are of one class and their masks may have a pixel in common, (N, N); none with itself."""
    low, high = detections.boxes_xyxy[:, :2] - 1, detections.boxes_xyxy[:, 2:] + 1  # masks end at whole pixels
    apart = (low[:, None] >= high).any(axis=2)
    meet: BoolArray = ~(apart | apart.T) & (detections.labels[:, None] == detections.labels)
    np.fill_diagonal(meet, False)
    return meet
