"""Which predictions on unlabelled images are trusted as labels (section 3.2); pure."""

from pathlib import Path

import numpy as np

from model.config import PseudoLabelConfig
from model.geometry import rle_area, roi_mask_to_rle
from model.types import BoolArray, Detections, LabeledImage


def trusted(detections: Detections, config: PseudoLabelConfig) -> BoolArray:
    """Which of the N instances become pseudo labels, (N,) bool.

    Rule "and": c > sigma_c and b > sigma_b and m > sigma_m, the text of section 3.2. Rule "or": Algorithm 1, line 10
    removes an instance only when all three scores are below their thresholds.
    """
    passed = np.stack(
        [
            detections.class_scores > config.class_threshold,
            detections.box_scores > config.box_threshold,
            detections.mask_scores > config.mask_threshold,
        ]
    )
    chosen: BoolArray = np.logical_and.reduce(passed) if config.rule == "and" else np.logical_or.reduce(passed)
    return chosen


def pseudo_labeled_image(
    detections: Detections, config: PseudoLabelConfig, *, image_id: str, path: Path, mask_threshold: float
) -> LabeledImage | None:
    """The image with its trusted instances as labels, or None when none survives: then it is not in D_semi."""
    chosen = detections.select(trusted(detections, config))
    rles = [
        roi_mask_to_rle(mask, box, detections.image_hw, mask_threshold=mask_threshold)
        for mask, box in zip(chosen.roi_masks, chosen.boxes_xyxy, strict=True)
    ]
    visible = [i for i, rle in enumerate(rles) if rle_area(rle) > 0]
    if not visible:
        return None
    return LabeledImage(
        image_id=image_id,
        path=path,
        image_hw=detections.image_hw,
        labels=chosen.labels[visible],
        rles=tuple(rles[i] for i in visible),
        pseudo=True,
    )
