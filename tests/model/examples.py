"""Tiny networks, pictures and labels that the tests of the learning core share."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from model.geometry import mask_to_rle
from model.network import MaskRCNNWithScores, build_model
from model.types import BoolArray, Detections, LabeledImage

HW = (64, 64)
TINY: dict[str, Any] = {
    "min_size": 64,
    "max_size": 96,
    "anchor_sizes": (8, 16, 32, 48, 64),
    "fpn_channels": 16,
    "box_head_width": 32,
    "mask_head_widths": (16,),
    "proposals_training": 60,
    "proposals_inference": 20,
    "rois_per_image": 16,
}


def tiny_network(num_classes: int = 3, *, weights: str = "none", seed: int = 0, **options: Any) -> MaskRCNNWithScores:
    torch.manual_seed(seed)
    return build_model("efficientnet_lite0_fpn", num_classes, weights=weights, **{**TINY, **options})


def image(hw: tuple[int, int] = HW, *, seed: int = 0) -> torch.Tensor:
    return torch.rand((3, *hw), generator=torch.Generator().manual_seed(seed))


def rectangle(x0: int, y0: int, x1: int, y1: int, hw: tuple[int, int] = HW) -> BoolArray:
    mask = np.zeros(hw, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def ellipse(x0: int, y0: int, x1: int, y1: int, hw: tuple[int, int] = HW) -> BoolArray:
    """The ellipse that fills a box."""
    y, x = np.mgrid[: hw[0], : hw[1]] + 0.5
    distance = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2
    return np.asarray(distance <= 0.25, dtype=np.bool_)


def target(
    *instances: tuple[int, BoolArray], pseudo: bool = False, hw: tuple[int, int] = HW
) -> dict[str, torch.Tensor | bool]:
    """A training target from (label, mask) pairs."""
    masks = np.array([mask for _, mask in instances], dtype=np.uint8).reshape(-1, *hw)
    boxes = [[m.any(0).argmax(), m.any(1).argmax(), np.flatnonzero(m.any(0))[-1] + 1, np.flatnonzero(m.any(1))[-1] + 1]
             for m in masks]  # fmt: skip
    return {
        "boxes": torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        "labels": torch.tensor([label for label, _ in instances], dtype=torch.int64),
        "masks": torch.from_numpy(masks),
        "pseudo": pseudo,
    }


def labeled_image(folder: Path, image_id: str, *instances: tuple[int, BoolArray], pseudo: bool = False) -> LabeledImage:
    """A picture on disk, bright even shapes on dark noise, and its labels; each class has a colour of its own."""
    hw = instances[0][1].shape if instances else HW
    pixels = np.random.default_rng(len(image_id)).integers(0, 40, (*hw, 3), dtype=np.uint8)
    for label, mask in instances:
        pixels[mask] = (255, 230, 200) if label == 1 else (60, 120, 255)
    path = folder / f"{image_id}.png"
    cv2.imwrite(str(path), pixels[:, :, ::-1])
    return LabeledImage(
        image_id=image_id,
        path=path,
        image_hw=(hw[0], hw[1]),
        labels=np.array([label for label, _ in instances], dtype=np.int64),
        rles=tuple(mask_to_rle(mask) for _, mask in instances),
        pseudo=pseudo,
    )


def detections(
    boxes_xyxy: list[list[float]],
    *,
    labels: list[int] | None = None,
    class_scores: list[float] | None = None,
    box_scores: list[float] | None = None,
    mask_scores: list[float] | None = None,
    roi_masks: Any = None,
    image_hw: tuple[int, int] = HW,
) -> Detections:
    """Detections whose masks fill their boxes, unless `roi_masks` says otherwise."""
    count = len(boxes_xyxy)

    def scores(values: list[float] | None) -> Any:
        return np.array(values if values is not None else [0.95] * count, dtype=np.float64)

    return Detections(
        image_hw=image_hw,
        boxes_xyxy=np.array(boxes_xyxy, dtype=np.float32).reshape(count, 4),
        labels=np.array(labels if labels is not None else [1] * count, dtype=np.int64),
        class_scores=scores(class_scores),
        box_scores=scores(box_scores),
        mask_scores=scores(mask_scores),
        roi_masks=np.ones((count, 28, 28), dtype=np.float32) if roi_masks is None else np.asarray(roi_masks),
    )
