"""What the anchors and RoIs of a pseudo-labelled image count in its losses: eq. 4, and two options beyond the paper."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

# A box counts as lying on an ignored one from this IoU (the RPN's background threshold) or this share of itself on.
_IGNORED_IOU = 0.3
_IGNORED_SHARE = 0.5


def pseudo_weights(boxes_xyxy: Tensor, is_object: Tensor, target: dict[str, Any]) -> Tensor:
    """Weights in the classification, box and mask losses of R anchors or RoIs of one image, (R, 3).

    boxes_xyxy (R, 4); is_object (R,) bool: it is matched with an instance, the one with the largest IoU.
    Eq. 4: an object weighs (1, 1, 1), background (0, ...), the factor p*. If the target has `weights` (N, 3), an object
    weighs what its instance does. If it has `ignored` (K, 4), background weighs 1 too, but where it may be an object
    that was seen without certainty.
    """
    weights = boxes_xyxy.new_ones((len(boxes_xyxy), 3))
    if "weights" in target and bool(is_object.any()):
        matched = box_iou(target["boxes"], boxes_xyxy[is_object]).argmax(dim=0)
        weights[is_object] = target["weights"].to(weights)[matched]
    background = ~is_object
    if "ignored" in target:
        weights[background, 0] = (~_on_any(boxes_xyxy[background], target["ignored"])).to(weights)
    else:
        weights[background, 0] = 0
    return weights


def _on_any(boxes_xyxy: Tensor, ignored_xyxy: Tensor) -> Tensor:
    """Which boxes (R, 4) lie on one of the ignored boxes (K, 4), (R,) bool.

    By IoU, as a label would keep its surroundings from being background, and by the share of the box itself, because an
    uncertain detection is often one box around several objects.
    """
    if len(ignored_xyxy) == 0:
        return torch.zeros(len(boxes_xyxy), dtype=torch.bool, device=boxes_xyxy.device)
    ignored_xyxy = ignored_xyxy.to(boxes_xyxy)
    low = torch.maximum(boxes_xyxy[:, None, :2], ignored_xyxy[None, :, :2])
    high = torch.minimum(boxes_xyxy[:, None, 2:], ignored_xyxy[None, :, 2:])
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)
    share = (high - low).clamp(min=0).prod(dim=2) / areas.clamp(min=1e-6)[:, None]
    iou: Tensor = box_iou(boxes_xyxy, ignored_xyxy)
    return ((iou >= _IGNORED_IOU) | (share >= _IGNORED_SHARE)).any(dim=1)
