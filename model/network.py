"""Mask R-CNN with a box IoU branch and a mask IoU branch (Fig. 1 and section 3.1 of the paper)."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import (
    MultiScaleRoIAlign,
    batched_nms,
    clip_boxes_to_image,
    remove_small_boxes,
)
from torchvision.ops.poolers import LevelMapper

from model import losses
from model.backbones import Backbone, normalisation
from model.config import NetworkConfig
from model.errors import InvalidInputError
from model.loss_prediction import LossPredictor, ranking_loss
from model.losses import Mean
from model.pretrained import load_pretrained
from model.pseudo_weights import pseudo_weights

Target = dict[str, Any]

_SMALLEST_PX = 1.0  # side of a detection, at the network's input: less is what clipping leaves of a box beyond the edge


def build_model(profile: str, num_classes: int, *, weights: str = "none", **options: Any) -> "MaskRCNNWithScores":
    """A network of a profile (`model.config.PROFILES`) for `num_classes` classes, the background included.

    weights: "none", "imagenet", "coco" or a .safetensors file (`model.pretrained`); options: fields of NetworkConfig.
    """
    if weights != "none":
        options = {"frozen_batch_norm": True, **options}
    network = MaskRCNNWithScores(NetworkConfig.for_profile(profile, num_classes, **options))
    if weights != "none":
        load_pretrained(network, profile=profile, weights=weights)
        network.freeze_stages()
    return network


class MaskRCNNWithScores(nn.Module):
    """Takes what torchvision's detectors take: a list of images (3, H, W) in [0, 1] and, in training, targets.

    Targets: `boxes` (N, 4) xyxy pixels, `labels` (N,) int64 from 1, `masks` (N, H, W) uint8 0/1, and optionally
    `pseudo` (bool): the image was labelled by the model, so that eq. 4 applies to it, with `weights` (N, 3) and
    `ignored` (K, 4) if these are there (`model.pseudo_weights`); and `seed` (int): which anchors and RoIs of the image
    are sampled depends on it alone, otherwise on torch's generator and on the images before it. All have one or none.

    Training returns the losses of eq. 1 by name, those of eq. 4 with the prefix "semi_". Evaluation returns for each
    image `boxes` (N, 4), `labels` (N,), `scores` (N,) = c, `box_scores` (N,) = b, `mask_scores` (N,) = m, and
    `roi_masks` (N, 28, 28), the mask's probabilities inside its box: nothing is pasted into full images here. For the
    strategies there are also `class_probabilities` (N, C), background first, `feature` (F,), the body's top features
    averaged over the image, and with `learning_loss` the `predicted_loss` (1,).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        mean, std = normalisation(config.profile)
        self.transform = GeneralizedRCNNTransform(config.min_size, config.max_size, mean, std)
        self.backbone = Backbone(config)
        self.rpn = _rpn(config)
        self.roi_heads = _roi_heads(config)
        self.loss_predictor = LossPredictor(config.fpn_channels) if config.learning_loss else None

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The losses when training, the detections when evaluating; see the class."""
        if self.training:
            return {name: loss.value for name, loss in self.losses(images, targets).items()}
        _check_images(images)
        original_hw = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(list(images))
        stages = self.backbone.body(batch.tensors)
        pyramid = self.backbone.pyramid(stages)
        detections = self.roi_heads.detect(pyramid, self.rpn(batch, pyramid)[0], batch.image_sizes)
        for image, stage, hw in zip(detections, stages[-1], batch.image_sizes, strict=True):
            image["feature"] = _mean_inside(stage, hw, tuple(batch.tensors.shape[-2:]))
        if self.loss_predictor is not None:
            for image, loss in zip(detections, self.loss_predictor(pyramid), strict=True):
                image["predicted_loss"] = loss[None]
        return self.transform.postprocess(detections, batch.image_sizes, original_hw)  # type: ignore[no-any-return]

    def stochastic_passes(self, image: Tensor, passes: int, *, seed: int) -> list[dict[str, Tensor]]:
        """What the heads find in one image (3, H, W) in each of several passes with dropout, as `forward` tells it.

        Body and proposals, which have no dropout, run once. Boxes are in pixels of the network's input. What is
        dropped depends on the seed alone: another thread may be training with torch's global generator.
        """
        batch, _ = self.transform([image])
        pyramid = self.backbone(batch.tensors)
        proposals, _ = self.rpn(batch, pyramid)
        dropouts = [module for module in self.modules() if isinstance(module, _Dropout)]
        generator = torch.Generator(device=image.device).manual_seed(seed)
        for dropout in dropouts:
            dropout.generator = generator
        try:
            return [self.roi_heads.detect(pyramid, proposals, batch.image_sizes)[0] for _ in range(passes)]
        finally:
            for dropout in dropouts:
                dropout.generator = None

    def freeze_stages(self) -> None:
        """Keep all stages of a pretrained body but the top `trainable_stages` as they are."""
        for prefix in self.backbone.stages[self.config.trainable_stages :]:
            for name, parameter in self.backbone.body.named_parameters():
                if name.startswith(prefix):
                    parameter.requires_grad_(False)

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target] | None) -> dict[str, Mean]:
        """The losses of training by name, each with what it is the mean over: parts of a batch can be put together."""
        _check_images(images)
        return self._losses(images, _checked_targets(images, targets, self.config.num_classes))

    def _losses(self, images: Sequence[Tensor], targets: list[Target]) -> dict[str, Mean]:
        """One pass through the body for all images; then the annotated and the pseudo-labelled ones part ways."""
        batch, targets = self.transform(list(images), targets)
        for image, hw, target in zip(images, batch.image_sizes, targets, strict=True):
            if "ignored" in target:  # torchvision resizes what it knows
                target["ignored"] = resize_boxes(target["ignored"], image.shape[-2:], hw)
        features = self.backbone(batch.tensors)
        pseudo = [i for i, target in enumerate(targets) if target.get("pseudo", False)]
        annotated = [i for i in range(len(targets)) if i not in pseudo]
        result: dict[str, Mean] = {}
        if annotated:
            result = self._group_losses(batch, features, targets, annotated, pseudo=False)
        if pseudo:
            semi = self._group_losses(batch, features, targets, pseudo, pseudo=True)
            result.update({losses.SEMI + name: loss for name, loss in semi.items()})
        if annotated and self.loss_predictor is not None:
            predicted = self.loss_predictor({level: feature[annotated] for level, feature in features.items()})
            true = self._losses_by_image(batch, features, targets, annotated)
            result["loss_ranking"] = Mean(ranking_loss(predicted, true), len(annotated))
        return result

    @torch.no_grad()
    def _losses_by_image(
        self, batch: ImageList, features: dict[str, Tensor], targets: list[Target], chosen: list[int]
    ) -> Tensor:
        """The loss of each image alone, (B,): what the loss predictor ranks. The detector learns from all together, as
        it does without a predictor, and draws the same RoIs."""
        device = batch.tensors.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            each = [self._group_losses(batch, features, targets, [i], pseudo=False) for i in chosen]
        return torch.stack([torch.stack([loss.value for loss in image.values()]).sum() for image in each])

    def _group_losses(
        self,
        batch: ImageList,
        features: dict[str, Tensor],
        targets: list[Target],
        chosen: list[int],
        *,
        pseudo: bool,
    ) -> dict[str, Mean]:
        """The losses of some images of the batch, normalised among themselves."""
        part = ImageList(batch.tensors[chosen], [batch.image_sizes[i] for i in chosen])
        part_features = OrderedDict((level, feature[chosen]) for level, feature in features.items())
        part_targets = [targets[i] for i in chosen]
        for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
            sampler.seeds = [target["seed"] for target in part_targets] if "seed" in part_targets[0] else None
        proposals, rpn = self.rpn(part, part_features, part_targets, pseudo=pseudo)
        heads = self.roi_heads.losses(part_features, proposals, part.image_sizes, part_targets, pseudo=pseudo)
        return {**rpn, **heads}


class IoUBranch(nn.Sequential):
    """Two convolutions (k=3, s=2, p=1), global average pooling, one FC, sigmoid: RoI features -> predicted IoU (R,)."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 1),
            nn.Sigmoid(),
            nn.Flatten(0),
        )


class _Sampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or RoIs; an image with a seed is sampled by that alone."""

    seeds: Sequence[int] | None = None  # of the images of the next calls

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive: list[Tensor] = []
        negative: list[Tensor] = []
        seeds: Sequence[int | None] = self.seeds or [None] * len(matched_idxs)
        for seed, labels in zip(seeds, matched_idxs, strict=True):
            if seed is not None:
                torch.manual_seed(seed)
            chosen = super().__call__([labels])
            positive.extend(chosen[0])
            negative.extend(chosen[1])
        return positive, negative


class _Dropout(nn.Dropout):
    """While it has a `generator` it drops also in evaluation, and draws from that one."""

    generator: torch.Generator | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.generator is None:
            return super().forward(input)
        kept = torch.rand(input.shape, generator=self.generator, device=input.device) >= self.p
        return input * kept / (1 - self.p)


class _ScoringRPN(RegionProposalNetwork):
    """torchvision's region proposal network with the losses of eq. 1 and 4."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self.fg_bg_sampler = _Sampler(settings["batch_size_per_image"], settings["positive_fraction"])

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[Target] | None = None,
        *,
        pseudo: bool = False,
    ) -> tuple[list[Tensor], dict[str, Mean]]:
        objectness_by_level, deltas_by_level = self.head(list(features.values()))
        anchors = self.anchor_generator(images, list(features.values()))
        anchors_by_level = [level[0].numel() for level in objectness_by_level]
        objectness, deltas = concat_box_prediction_layers(objectness_by_level, deltas_by_level)
        boxes = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = self.filter_proposals(boxes, objectness.detach(), images.image_sizes, anchors_by_level)
        if targets is None:
            return proposals, {}
        labels, matched_boxes = self.assign_targets_to_anchors(anchors, targets)
        positive, negative = self.fg_bg_sampler(labels)
        sampled = torch.cat([torch.nonzero(torch.cat(chosen)).squeeze(1) for chosen in (positive, negative)])
        result = losses.rpn_losses(
            objectness.flatten(),
            deltas,
            labels=torch.cat(labels),
            delta_targets=torch.cat(self.box_coder.encode(matched_boxes, anchors)),
            sampled=sampled,
            weights=self._weights(anchors, labels, targets, sampled) if pseudo else None,
        )
        return proposals, {name: Mean(loss, len(sampled)) for name, loss in result.items()}

    def _weights(self, anchors: list[Tensor], labels: list[Tensor], targets: list[Target], sampled: Tensor) -> Tensor:
        """What the sampled anchors, indices (n,) into those of all images, count in eq. 4, (n, 3)."""
        weights = anchors[0].new_ones((len(sampled), 3))
        first = 0
        for boxes, label, target in zip(anchors, labels, targets, strict=True):
            here = (sampled >= first) & (sampled < first + len(boxes))
            index = sampled[here] - first
            weights[here] = pseudo_weights(boxes[index], label[index] == 1, target)
            first += len(boxes)
        return weights


class _ScoringRoIHeads(RoIHeads):
    """torchvision's box and mask heads, each with a branch beside it that predicts how good its result is."""

    def __init__(
        self,
        *,
        box_iou_branch: IoUBranch,
        mask_iou_branch: IoUBranch,
        mask_threshold: float,
        dropout: float,
        **heads: Any,
    ):
        super().__init__(**heads)
        self.fg_bg_sampler = _Sampler(heads["batch_size_per_image"], heads["positive_fraction"])
        self.box_iou_branch = box_iou_branch
        self.mask_iou_branch = mask_iou_branch
        self.mask_threshold = mask_threshold
        self.box_dropout, self.mask_dropout = _Dropout(dropout), _Dropout(dropout)

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
        *,
        pseudo: bool,
    ) -> dict[str, Mean]:
        rois = self.select_training_samples(proposals, targets)
        sampled_count = sum(len(boxes) for boxes in rois[0])
        weights = None
        if pseudo:
            rois, weights = _without_weightless(rois, targets)
        proposals, matched, labels, delta_targets = rois
        box_features = self.box_roi_pool(features, proposals, image_sizes)
        class_logits, deltas = self._box_outputs(box_features)
        positive = [label > 0 for label in labels]
        box = losses.box_head_losses(
            class_logits,
            deltas,
            labels=torch.cat(labels),
            delta_targets=torch.cat(delta_targets),
            weights=weights,
            sampled_count=sampled_count,
        )
        result = {name: Mean(loss, sampled_count) for name, loss in box.items()}
        boxes = [box[keep] for box, keep in zip(proposals, positive, strict=True)]
        matched = [index[keep] for index, keep in zip(matched, positive, strict=True)]
        classes = torch.cat(labels)[torch.cat(positive)]

        mask_features = self.mask_roi_pool(features, boxes, image_sizes)
        mask_logits = self._mask_logits(mask_features, classes)
        coverage = losses.mask_coverage([t["masks"] for t in targets], matched, boxes, mask_logits.shape[-1])
        mask = losses.mask_loss(
            mask_logits, coverage, weights=None if weights is None else weights[torch.cat(positive)]
        )
        result["loss_mask"] = Mean(mask, len(classes))
        if pseudo:
            return result

        box_targets, mask_targets = self._iou_targets(
            deltas[torch.cat(positive)], mask_logits, coverage, boxes, classes, matched, targets, image_sizes
        )
        box_ious = self.box_iou_branch(box_features[torch.cat(positive)])
        result["loss_box_iou"] = Mean(losses.iou_loss(box_ious, box_targets), len(classes))
        result["loss_mask_iou"] = Mean(losses.iou_loss(self.mask_iou_branch(mask_features), mask_targets), len(classes))
        return result

    @torch.no_grad()
    def _iou_targets(
        self,
        deltas: Tensor,
        mask_logits: Tensor,
        coverage: Tensor,
        boxes: list[Tensor],
        classes: Tensor,
        matched: list[Tensor],
        targets: list[Target],
        image_sizes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """What the branches should say of the P positive RoIs: IoU of the predicted boxes, and of the masks, (P,) each.

        deltas (P, 4C), mask_logits and coverage (P, M, M), classes (P,); by image: boxes, matched (indices of targets).
        """
        gt_boxes = torch.cat([t["boxes"][index] for t, index in zip(targets, matched, strict=True)])
        gt_areas = torch.cat(
            [t["masks"].flatten(1).sum(1, dtype=torch.int32)[i] for t, i in zip(targets, matched, strict=True)]
        )
        rows = torch.arange(len(classes), device=classes.device)
        class_deltas = deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)[rows, classes]  # -1 fails for P = 0
        decoded = torch.split(self.box_coder.decode(class_deltas, boxes).reshape(-1, 4), [len(box) for box in boxes])
        # Clipped as in inference: the score is about the box that people get.
        predicted_boxes = torch.cat(
            [clip_boxes_to_image(box, hw) for box, hw in zip(decoded, image_sizes, strict=True)]
        )
        mask_targets = losses.mask_iou_targets(
            mask_logits,
            coverage,
            boxes_xyxy=torch.cat(boxes),
            gt_areas=gt_areas,
            mask_threshold=self.mask_threshold,
        )
        return losses.box_iou_targets(predicted_boxes, gt_boxes), mask_targets

    def detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """NMS first; then both branches see the features of the final boxes only (section 3.1, inference)."""
        class_logits, deltas = self._box_outputs(self.box_roi_pool(features, proposals, image_sizes))
        boxes, scores, labels, probabilities = self._final_boxes(class_logits, deltas, proposals, image_sizes)
        mask_features = self.mask_roi_pool(features, boxes, image_sizes)
        columns = {
            "class_probabilities": torch.cat(probabilities),
            "box_scores": self.box_iou_branch(self.box_roi_pool(features, boxes, image_sizes)),
            "mask_scores": self.mask_iou_branch(mask_features),
            "roi_masks": self._mask_logits(mask_features, torch.cat(labels)).sigmoid(),
        }
        counts = [len(box) for box in boxes]
        result = [{"boxes": b, "labels": n, "scores": c} for b, n, c in zip(boxes, labels, scores, strict=True)]
        for name, column in columns.items():
            for image, values in zip(result, column.split(counts), strict=True):
                image[name] = values
        return result

    def _final_boxes(
        self, class_logits: Tensor, deltas: Tensor, proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], ...]:
        """Threshold and NMS by class; for each image boxes (N, 4), scores (N,), labels (N,), probabilities (N, C)."""
        counts = [len(proposal) for proposal in proposals]
        by_class = self.box_coder.decode(deltas, proposals).reshape(len(deltas), deltas.shape[1] // 4, 4)  # also R = 0
        decoded = torch.split(by_class, counts)
        results = []
        for boxes, probabilities, hw in zip(
            decoded, torch.split(class_logits.softmax(dim=1), counts), image_sizes, strict=True
        ):
            roi, label = torch.nonzero(probabilities[:, 1:] > self.score_thresh).unbind(1)
            label = label + 1
            box, score = clip_boxes_to_image(boxes[roi, label], hw), probabilities[roi, label]
            large = remove_small_boxes(box, min_size=_SMALLEST_PX)
            keep = large[
                batched_nms(box[large], score[large], label[large], self.nms_thresh)[: self.detections_per_img]
            ]
            results.append((box[keep], score[keep], label[keep], probabilities[roi[keep]]))
        return tuple(list(column) for column in zip(*results, strict=True))

    def _box_outputs(self, box_features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, C) and box deltas (R, 4C)."""
        class_logits, deltas = self.box_predictor(self.box_dropout(self.box_head(box_features)))
        return class_logits, deltas

    def _mask_logits(self, mask_features: Tensor, classes: Tensor) -> Tensor:
        """The mask logits of each RoI's own class, (R, 28, 28)."""
        logits: Tensor = self.mask_predictor(self.mask_dropout(self.mask_head(mask_features)))
        return logits[torch.arange(len(classes), device=classes.device), classes]


def _rpn(config: NetworkConfig) -> _ScoringRPN:
    ratios = (0.5, 1.0, 2.0)
    return _ScoringRPN(
        AnchorGenerator(tuple((size,) for size in config.anchor_sizes), (ratios,) * len(config.anchor_sizes)),
        RPNHead(config.fpn_channels, len(ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": config.proposals_training, "testing": config.proposals_inference},
        post_nms_top_n={"training": config.proposals_training, "testing": config.proposals_inference},
        nms_thresh=0.7,
    )


def _roi_heads(config: NetworkConfig) -> _ScoringRoIHeads:
    channels, mask_channels = config.fpn_channels, config.mask_head_widths[-1]
    return _ScoringRoIHeads(
        box_roi_pool=_roi_pool(7),
        box_head=TwoMLPHead(channels * 7 * 7, config.box_head_width),
        box_predictor=FastRCNNPredictor(config.box_head_width, config.num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score_threshold,
        nms_thresh=config.nms_threshold,
        detections_per_img=config.detections_per_image,
        mask_roi_pool=_roi_pool(14),
        mask_head=MaskRCNNHeads(channels, config.mask_head_widths, 1),
        mask_predictor=MaskRCNNPredictor(mask_channels, mask_channels, config.num_classes),
        box_iou_branch=IoUBranch(channels),
        mask_iou_branch=IoUBranch(channels),
        mask_threshold=config.mask_threshold,
        dropout=config.dropout,
    )


def _without_weightless(
    rois: tuple[list[Tensor], ...], targets: list[Target]
) -> tuple[tuple[list[Tensor], ...], Tensor]:
    """The RoIs of pseudo-labelled images without background that weighs 0, and what these R weigh in eq. 4, (R, 3).

    No gradient comes from background that weighs 0, in eq. 4 all of it, so that the heads need not see it.
    rois: boxes, matched instances, labels and box targets, each a list by image.
    """
    boxes, _, labels, _ = rois
    weights = [pseudo_weights(*image) for image in zip(boxes, [label > 0 for label in labels], targets, strict=True)]
    keep = [(label > 0) | (weight[:, 0] > 0) for label, weight in zip(labels, weights, strict=True)]
    *kept, kept_weights = (
        [rows[index] for rows, index in zip(column, keep, strict=True)] for column in (*rois, weights)
    )
    return tuple(kept), torch.cat(kept_weights)


def _roi_pool(output_size: int) -> MultiScaleRoIAlign:
    """RoIAlign over the four stages of a body, with their strides. Left alone, torchvision guesses them from the first
    batch and keeps them: after one of 65 pixels in height, padded to 96, all would be taken for half as large."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=output_size, sampling_ratio=2)
    pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    pool.map_levels = LevelMapper(2, 5)
    return pool


def _mean_inside(stage: Tensor, image_hw: tuple[int, int], padded_hw: tuple[int, ...]) -> Tensor:
    """The mean of a stage (F, h, w) over the cells that its image reaches, not those that only pad the batch, (F,)."""
    rows, columns = (
        math.ceil(side * cells / padded)
        for side, cells, padded in zip(image_hw, stage.shape[1:], padded_hw, strict=True)
    )
    return stage[:, :rows, :columns].mean(dim=(1, 2))


def _check_images(images: Sequence[Tensor]) -> None:
    if not images:
        raise InvalidInputError("expected at least one image, got none")
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise InvalidInputError(
                f"image {i}: expected a float tensor (3, H, W) in [0, 1], got {image.dtype} {tuple(image.shape)}"
            )


def _checked_targets(images: Sequence[Tensor], targets: Sequence[Target] | None, num_classes: int) -> list[Target]:
    if targets is None or len(targets) != len(images):
        got = "none" if targets is None else len(targets)
        raise InvalidInputError(f"training needs one target for each of the {len(images)} images, got {got}")
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        if missing := {"boxes", "labels", "masks"} - set(target):
            raise InvalidInputError(f"target {i} lacks {sorted(missing)}; it has {sorted(target)}")
        count = len(target["labels"])
        for key, shape in (("boxes", (count, 4)), ("masks", (count, *image.shape[-2:]))):
            if tuple(target[key].shape) != shape:
                raise InvalidInputError(f"target {i}, {key}: expected shape {shape}, got {tuple(target[key].shape)}")
        if count and int(target["masks"].max()) > 1:
            raise InvalidInputError(f"target {i}, masks: expected 0 and 1, got up to {int(target['masks'].max())}")
        if not bool((target["boxes"][:, 2:] > target["boxes"][:, :2]).all()):
            raise InvalidInputError(f"target {i}: every box needs x0 < x1 and y0 < y1")
        if outside := [label for label in target["labels"].tolist() if not 1 <= label < num_classes]:
            raise InvalidInputError(f"target {i}: expected labels in 1..{num_classes - 1}, got {outside[0]}")
    return list(targets)
