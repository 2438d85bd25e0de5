"""A network made quick for CPUs, to look at images and not to train.

Detections are those of the network as it was, up to the rounding of floats (docs/decisions/071).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from model.bfloat16 import check_bfloat16, to_bfloat16
from model.errors import InvalidInputError
from model.network import MaskRCNNWithScores
from model.winograd import WinogradConv

Precision = Literal["float32", "bfloat16"]

_SAMPLES = 2  # along a side of a bin, the `sampling_ratio` of our networks
_NEIGHBOURS = 2 * _SAMPLES  # cells along a side: each sample lies between two


def for_inference(network: MaskRCNNWithScores, *, precision: Precision = "float32") -> MaskRCNNWithScores:
    """Changes the network itself, and returns it in evaluation mode; its weights are no longer those of a version.

    Batch norm goes into the convolutions before it. On CPUs, the channels of a pixel lie side by side in memory, which
    convolutions and the pooling of RoIs like better. In "bfloat16" detections are nearly those of the network as it was
    (docs/decisions/078). Raises InvalidInputError for a network that is quick already, and where bfloat16 is slow.
    """
    if isinstance(network.roi_heads.mask_predictor, _MaskPredictor):
        raise InvalidInputError("expected a network as it was built or loaded, got one that was made quick before")
    device = next(network.parameters()).device
    if precision == "bfloat16":
        check_bfloat16(device)
    network.eval().requires_grad_(False)
    _fold_batch_norm(network.backbone.body)
    if device.type == "cpu":
        if precision == "float32":
            _use_winograd(network)
        network.to(memory_format=torch.channels_last)
        network.transform.register_forward_hook(_channels_last)
        heads = network.roi_heads
        heads.box_roi_pool, heads.mask_roi_pool = (_RoIPool(pool) for pool in (heads.box_roi_pool, heads.mask_roi_pool))
        heads.box_head = _BoxHead(heads.box_head, heads.box_roi_pool.output_size[0])
        heads.mask_predictor = _MaskPredictor(heads.mask_predictor)
    if precision == "bfloat16":
        to_bfloat16(network)
    return network


def _fold_batch_norm(module: nn.Module) -> None:
    """In the bodies that we have, each batch norm is registered right after its convolution."""
    convolution: nn.Conv2d | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d | FrozenBatchNorm2d) and convolution is not None:
            _fold(convolution, child)
            setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's has the activation inside
        _fold_batch_norm(child)
        convolution = child if isinstance(child, nn.Conv2d) else None


def _fold(convolution: nn.Conv2d, norm: Any) -> None:
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    convolution.weight, convolution.bias = weight.requires_grad_(False), bias.requires_grad_(False)


def _use_winograd(module: nn.Module) -> None:
    for name, child in module.named_children():
        if WinogradConv.suits(child):
            setattr(module, name, WinogradConv(child))
        _use_winograd(child)


def _channels_last(_: nn.Module, __: object, output: tuple[Any, Any]) -> tuple[Any, Any]:
    images, targets = output
    images.tensors = images.tensors.contiguous(memory_format=torch.channels_last)
    return images, targets


class _RoIPool(MultiScaleRoIAlign):
    """The same pooling as sums over rows of a table: a bin is the weighted sum of 16 pixels (2 x 2 samples of 4 each),
    and each pixel has its channels side by side."""

    def __init__(self, pool: MultiScaleRoIAlign) -> None:
        if pool.sampling_ratio != _SAMPLES:
            raise InvalidInputError(f"sampling_ratio: expected {_SAMPLES}, got {pool.sampling_ratio}")
        super().__init__(pool.featmap_names, pool.output_size, pool.sampling_ratio)
        self.scales, self.map_levels = pool.scales, pool.map_levels

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Features (R, C, P, P), channels last, of R boxes xyxy in pixels of the network's input, by image."""
        levels = [x[name] for name in self.featmap_names]
        rois, level_of = torch.cat(boxes), self.map_levels(boxes)
        image_of = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(box) for box in boxes]))
        size, channels = self.output_size[0], levels[0].shape[1]
        pooled = levels[0].new_empty(len(rois), size, size, channels)
        for number, (features, scale) in enumerate(zip(levels, self.scales, strict=True)):
            here = (level_of == number).nonzero()[:, 0]
            pooled[here] = _pooled(features, rois[here] * scale, image_of[here], size)
        return pooled.permute(0, 3, 1, 2)


def _pooled(features: Tensor, rois_xyxy: Tensor, image_of: Tensor, size: int) -> Tensor:
    """(R, P, P, C) of one level (B, C, H, W); boxes in its cells."""
    height, width = features.shape[2:]
    y, weight_y = _samples(rois_xyxy[:, 1], rois_xyxy[:, 3], size, height)
    x, weight_x = _samples(rois_xyxy[:, 0], rois_xyxy[:, 2], size, width)
    rows = (image_of[:, None, None] * height + y)[:, :, None, :, None] * width + x[:, None, :, None, :]
    table = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    weights = (weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]).to(table.dtype)
    bins = F.embedding_bag(
        rows.reshape(-1, _NEIGHBOURS**2), table, mode="sum", per_sample_weights=weights.reshape(-1, _NEIGHBOURS**2)
    )
    return bins.view(len(rois_xyxy), size, size, features.shape[1])


def _samples(low: Tensor, high: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """Along one axis, the cells between which each bin of a RoI has its samples, and their weights, (R, P, 4) each.

    As torchvision's roi_align has it: RoIs are at least a cell long; beyond the last centre the last cell counts, and
    beyond its end nothing.
    """
    step = (high - low).clamp(min=1.0) / (size * _SAMPLES)
    at = low[:, None] + (torch.arange(size * _SAMPLES) + 0.5) * step[:, None]
    inside = (at <= cells) / _SAMPLES
    at = at.clamp(0, cells - 1)
    first = at.floor()
    after = at - first
    index = torch.stack([first, (first + 1).clamp(max=cells - 1)], dim=2).long()
    weight = torch.stack([1 - after, after], dim=2) * inside[:, :, None]
    return index.view(-1, size, _NEIGHBOURS), weight.view(-1, size, _NEIGHBOURS)


class _BoxHead(nn.Module):
    """The same two layers, for RoI features whose channels come last: they need not be put in order first."""

    def __init__(self, head: TwoMLPHead, size: int) -> None:
        super().__init__()
        self.fc6, self.fc7 = head.fc6, head.fc7
        by_channel = head.fc6.weight.view(len(head.fc6.weight), -1, size, size)
        self.fc6.weight = nn.Parameter(by_channel.permute(0, 2, 3, 1).flatten(1), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """(R, C, P, P) -> (R, D)."""
        hidden = F.relu(self.fc6(features.permute(0, 2, 3, 1).flatten(1)))
        return F.relu(self.fc7(hidden))


class _MaskPredictor(nn.Module):
    """The same layers as two matrix products: a transposed convolution whose kernel and stride are 2 makes four pixels
    of each one, independently."""

    def __init__(self, predictor: MaskRCNNPredictor) -> None:
        super().__init__()
        deconvolution, logits = predictor.conv5_mask, predictor.mask_fcn_logits
        self.to_pixels = nn.Linear(deconvolution.in_channels, 4 * deconvolution.out_channels)
        self.to_pixels.weight = nn.Parameter(deconvolution.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous())
        self.to_pixels.bias = nn.Parameter(deconvolution.bias.repeat(4))
        self.to_logits = nn.Linear(logits.in_channels, logits.out_channels)
        self.to_logits.weight = nn.Parameter(logits.weight.flatten(1).contiguous())
        self.to_logits.bias = logits.bias
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """(R, C, M / 2, M / 2) -> (R, classes, M, M)."""
        count, channels, height, width = features.shape
        pixels = self.to_pixels(features.permute(0, 2, 3, 1).reshape(-1, channels)).relu_()
        logits: Tensor = self.to_logits(pixels.view(-1, self.to_logits.in_features))
        by_place = logits.view(count, height, width, 2, 2, self.to_logits.out_features)
        return by_place.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
