"""MC dropout: how much the detections change between passes with dropout; what changes most is annotated first."""

import hashlib
from typing import ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_iou

from model.errors import InvalidInputError
from model.strategies.base import Observation, Sight, Strategy, confident, mean_or_none


class MCDropout(Strategy):
    """The score is the mean agreement with the first pass: of class, box and mask of each of its detections that count.

    All detections of the other passes are looked at: a class score that falls just below the threshold in one of
    them is a small change, not a loss. The seed comes from the image, so that a model gives an image the same score
    whenever it looks at it.
    """

    name = "mc_dropout"
    network_options: ClassVar[dict[str, float]] = {"dropout": 0.2}
    passes = 5

    def observe(self, sight: Sight) -> Observation:
        if not sight.network.config.dropout:
            raise InvalidInputError(
                f"{self.name}: expected a network with dropout, without which all passes are one: build it with the "
                f"strategy's network_options, {self.network_options}"
            )
        with torch.inference_mode():
            first, *others = sight.network.stochastic_passes(sight.image, self.passes, seed=_seed(sight.image))
        first = confident(first, sight.queue_threshold)
        agreement = torch.stack([_agreement(first, other, sight.network.config.mask_threshold) for other in others])
        return Observation(score=mean_or_none(agreement.mean(dim=0)), feature=sight.feature)


def _seed(image: Tensor) -> int:
    return int.from_bytes(hashlib.sha256(image.cpu().numpy().tobytes()).digest()[:7])


def _agreement(first: dict[str, Tensor], other: dict[str, Tensor], mask_threshold: float) -> Tensor:
    """For each detection of the first pass, (N,) in [0, 1]: the mean over class, box and mask of how well the
    best-overlapping detection of the other pass agrees; 0 where nothing overlaps."""
    if len(first["boxes"]) == 0 or len(other["boxes"]) == 0:
        return torch.zeros_like(first["scores"])
    box_overlap, match = box_iou(first["boxes"], other["boxes"]).max(dim=1)
    # The overlap of two softmax vectors: 1 minus their total variation distance.
    class_overlap = torch.minimum(first["class_probabilities"], other["class_probabilities"][match]).sum(dim=1)
    masks = first["roi_masks"] > mask_threshold, other["roi_masks"][match] > mask_threshold
    union = (masks[0] | masks[1]).sum(dim=(1, 2)).clamp(min=1)
    mask_overlap = (masks[0] & masks[1]).sum(dim=(1, 2)) / union
    return torch.where(box_overlap > 0, (class_overlap + box_overlap + mask_overlap) / 3, 0.0)
