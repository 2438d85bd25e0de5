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
    rles = [
        dict(roi_mask_to_rle(mask, box, detections.image_hw, mask_threshold=mask_threshold))
        for mask, box in zip(detections.roi_masks, detections.boxes_xyxy, strict=True)
    ]
    keep = np.zeros(len(detections), dtype=bool)
    areas = coco_mask.area(rles) if rles else np.zeros(0)
    for i in np.argsort(-detections.class_scores, kind="stable"):
        rivals = np.flatnonzero(keep & (detections.labels == detections.labels[i]))
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
