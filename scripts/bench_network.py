"""The network alone, on phantoms: steps of training against torchvision's, and inference with both IoU branches against
inference without. Each result has those options that it depends on."""

from argparse import Namespace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from model.config import TrainingConfig
from model.errors import InvalidInputError
from model.inference import for_inference
from model.losses import total_loss
from model.network import MaskRCNNWithScores, build_model
from scripts.bench_compare import compare
from scripts.make_phantoms import CLASS_NAMES, phantom

TRAINING = TrainingConfig()  # the paper's: a step has two annotated images, and one with pseudo labels


def train_step(options: Namespace) -> dict[str, Any]:
    """A training step on annotated images, against torchvision's with the same body, heads and weights."""
    network = _network(options)
    theirs = torchvision_network(network)
    batch = _batch(options.size, TRAINING.batch_size)
    measured = compare(partial(_step, network, *batch), partial(_step, theirs, *batch), rounds=options.rounds)
    return {**measured, **_setting(options, "profile", "size")}


def ssl_step(options: Namespace) -> dict[str, Any]:
    """A training step on annotated and pseudo-labelled images (eq. 5), against torchvision's on the annotated ones;
    `as_many_images` against torchvision's on all of them, as if all were annotated."""
    network = _network(options)
    theirs = torchvision_network(network)
    annotated = _batch(options.size, TRAINING.batch_size)
    both = _batch(options.size, TRAINING.batch_size, pseudo=TRAINING.pseudo_batch_size)
    ours = partial(_step, network, *both)
    return {
        **compare(ours, partial(_step, theirs, *annotated), rounds=options.rounds),
        "as_many_images": compare(ours, partial(_step, theirs, *both), rounds=options.rounds),
        "annotated": TRAINING.batch_size,
        "pseudo_labelled": TRAINING.pseudo_batch_size,
        **_setting(options, "profile", "size"),
    }


def branches(options: Namespace) -> dict[str, Any]:
    """Inference with both IoU branches, against inference that leaves them out; both are made quick, as predictions and
    the look at the pool have them, and the masks stay in their boxes. InvalidInputError unless both find as many as
    asked.

    A score threshold of 0 lets an untrained network, too, fill its detections, for which the branches work.
    """
    sides = [_network(options, score_threshold=0.0, detections_per_image=options.detections) for _ in range(2)]
    ours, without = map(for_inference, sides)  # the seed gives both the same weights
    heads: Any = without.roi_heads
    heads.box_iou_branch = heads.mask_iou_branch = _Nothing()
    heads.box_roi_pool = _ForProposalsOnly(heads.box_roi_pool, without.rpn)
    images, _ = _batch(options.size, 1)
    for network in (ours, without):
        if (found := _look(network, images)) != options.detections:
            raise InvalidInputError(f"expected {options.detections} detections, got {found}: lower --detections")
    measured = compare(partial(_look, ours, images), partial(_look, without, images), rounds=options.rounds)
    return {**measured, **_setting(options, "profile", "size", "detections")}


def torchvision_network(ours: MaskRCNNWithScores) -> MaskRCNN:
    """torchvision's own Mask R-CNN around the same body, with heads of the same sizes and the same weights."""
    config = ours.config
    network = MaskRCNN(
        _Body(ours.backbone, config.fpn_channels),
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=ours.transform.image_mean,
        image_std=ours.transform.image_std,
        rpn_anchor_generator=ours.rpn.anchor_generator,
        rpn_pre_nms_top_n_train=config.proposals_training,
        rpn_pre_nms_top_n_test=config.proposals_inference,
        rpn_post_nms_top_n_train=config.proposals_training,
        rpn_post_nms_top_n_test=config.proposals_inference,
        box_head=ours.roi_heads.box_head,
        box_predictor=ours.roi_heads.box_predictor,
        box_batch_size_per_image=config.rois_per_image,
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_threshold,
        box_detections_per_img=config.detections_per_image,
        mask_head=ours.roi_heads.mask_head,
        mask_predictor=ours.roi_heads.mask_predictor,
    )
    network.rpn.head = ours.rpn.head
    return network


class _Body(nn.Module):
    def __init__(self, backbone: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels

    def forward(self, images: Tensor) -> Any:
        return self.backbone(images)


class _Nothing(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.new_zeros(len(features))


class _ForProposalsOnly(nn.Module):
    """Pools what the RPN proposes. Afterwards come the final boxes, whose features only the box IoU branch needs."""

    def __init__(self, pool: nn.Module, rpn: nn.Module) -> None:
        super().__init__()
        self.pool, self.proposed = pool, False
        rpn.register_forward_hook(self._has_proposed)

    def _has_proposed(self, *_: object) -> None:
        self.proposed = True

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> Tensor:
        if not self.proposed:
            return torch.cat(boxes)
        self.proposed = False
        return self.pool(features, boxes, image_sizes)  # type: ignore[no-any-return]


def _network(options: Namespace, **others: Any) -> MaskRCNNWithScores:
    torch.manual_seed(0)
    sides: dict[str, Any] = {"min_size": options.size, "max_size": options.size}
    return build_model(options.profile, len(CLASS_NAMES) + 1, **sides, **others).train()


def _batch(size: int, annotated: int, *, pseudo: int = 0) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Phantoms with lesions, as training gets them: the annotated ones, then those with pseudo labels, which are those
    of the ground truth."""
    images: list[Tensor] = []
    targets: list[dict[str, Any]] = []
    for number in range(annotated + pseudo):
        drawn = phantom(number, size, empty_fraction=0.0)
        masks = torch.from_numpy(drawn.masks.astype(np.uint8))
        where = [mask.nonzero() for mask in masks]
        corners = [torch.cat([yx.min(0).values.flip(0), yx.max(0).values.flip(0) + 1]) for yx in where]
        images.append(torch.from_numpy(drawn.image).float().expand(3, -1, -1) / 255)
        targets.append(
            {
                "boxes": torch.stack(corners).float(),
                "labels": torch.from_numpy(drawn.labels),
                "masks": masks,
                "pseudo": number >= annotated,  # torchvision does not read it
            }
        )
    return images, targets


def _step(network: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> None:
    """Forward, backward, and the gradients away: what both have in common after that is left out."""
    torch.manual_seed(0)
    loss = total_loss(network(images, targets), beta=TRAINING.beta, iou_weight=TRAINING.iou_loss_weight)
    torch.autograd.backward(loss)
    network.zero_grad(set_to_none=True)


def _look(network: nn.Module, images: list[Tensor]) -> int:
    """The number of detections in all images."""
    with torch.inference_mode():
        return sum(len(found["boxes"]) for found in network(images))


def _setting(options: Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in (*names, "rounds", "threads")}
