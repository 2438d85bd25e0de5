"""A network in bfloat16, for CPUs that multiply such numbers twice as fast (docs/decisions/078).

Convolutions and large matrix products take and give bfloat16; boxes, class scores and probabilities are computed in
float32 from what they give.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import InvalidInputError
from model.network import MaskRCNNWithScores

_X86 = ("x86_64", "amd64")
_HAS_INSTRUCTIONS = (
    "_is_avx512_bf16_supported",
    "_is_amx_tile_supported",
)  # of torch.cpu; another release may lack one


def has_bfloat16() -> bool:
    """Whether this CPU multiplies such numbers."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in _X86:
        return True  # on Arm the library has asked for the instructions
    # On x86 it is content with AVX-512, with which bfloat16 is slower than float32.
    return any(getattr(torch.cpu, name, lambda: False)() for name in _HAS_INSTRUCTIONS)


def check_bfloat16(device: torch.device) -> None:
    """Raises InvalidInputError where bfloat16 would not be quick."""
    if device.type != "cpu":
        raise InvalidInputError(f"bfloat16 is for CPUs, the network is on {device}: expected float32 there")
    if not has_bfloat16():
        raise InvalidInputError(
            "bfloat16: this CPU has no instructions for it (AVX-512 BF16, AMX or Arm's BF16): expected float32"
        )


def to_bfloat16(network: MaskRCNNWithScores) -> None:
    """Changes a network that is quick otherwise. What it returns stays float32.

    So does the body of an EfficientNet: it is quick anyway, and the detections would be others.
    """
    backbone, heads = network.backbone, network.roi_heads
    ends = (network.rpn.head, heads.box_head, heads.mask_predictor, heads.box_iou_branch, heads.mask_iou_branch)
    parts = [backbone.fpn, heads.mask_head, *ends]
    if network.config.profile.startswith("resnet"):
        parts.append(backbone.body)
        backbone.body.register_forward_hook(_widen_last)
    for module in parts:
        module.to(torch.bfloat16).register_forward_pre_hook(_narrow)
    for module in ends:
        module.register_forward_hook(_widen)
    network.rpn.anchor_generator.register_forward_pre_hook(_shapes_of_maps)
    if network.loss_predictor is not None:
        network.loss_predictor.register_forward_pre_hook(_widen_input)


def shapes_only(maps: list[Tensor]) -> list[Tensor]:
    """float32 tensors of the same shapes that take no memory, for code of torchvision's that asks for no more."""
    return [torch.empty(1).expand(features.shape) for features in maps]


def _narrow(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return _cast(inputs, torch.bfloat16)


def _widen(_: nn.Module, __: object, output: Any) -> Any:
    return _cast(output, torch.float32)


def _widen_input(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return _cast(inputs, torch.float32)


def _widen_last(_: nn.Module, __: object, stages: list[Tensor]) -> list[Tensor]:
    """The body's top stage is also averaged, for strategies that compare images."""
    return [*stages[:-1], stages[-1].float()]


def _shapes_of_maps(_: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Anchors take their type from the maps: in bfloat16 they would lie in the wrong places."""
    images, maps = inputs
    return images, shapes_only(maps)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, dict):
        return {name: _cast(one, dtype) for name, one in value.items()}
    return type(value)(_cast(one, dtype) for one in value)
