"""The convolutional bodies and the feature pyramid over them."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from model.config import NetworkConfig


class Backbone(nn.Module):
    """A convolutional body and a feature pyramid with five levels."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.frozen_batch_norm = config.frozen_batch_norm
        if config.profile == "efficientnet_lite0_fpn":
            body: Any = timm.create_model("efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4))
            channels = body.feature_info.channels()
            self.stages = [f"blocks.{i}." for i in (6, 5, 4, 3, 2, 1, 0)] + ["conv_stem.", "bn1."]
        else:
            body, channels = _resnet_body(config)
            self.stages = ["layer4.", "layer3.", "layer2.", "layer1.", "conv1."]
        self.body: nn.Module = body
        self.fpn = FeaturePyramidNetwork(channels, config.fpn_channels, LastLevelMaxPool())
        self.train()  # modules are made in training mode, a frozen body must not be

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.pyramid(self.body(images))

    def pyramid(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """The five levels of the pyramid over the body's four stages."""
        return self.fpn(OrderedDict((str(level), feature) for level, feature in enumerate(features)))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen_batch_norm:
            self.body.eval()  # batch norm keeps its statistics; nothing else in a body depends on the mode
        return self


def normalisation(profile: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the body's ImageNet training, for images in [0, 1]."""
    if profile == "efficientnet_lite0_fpn":
        return [127 / 255] * 3, [128 / 255] * 3
    return [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class _ResNetBody(nn.Module):
    """The four stages of a ResNet, strides 4 to 32."""

    def __init__(self, net: resnet.ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


def _resnet_body(config: NetworkConfig) -> tuple[nn.Module, list[int]]:
    norm_layer = FrozenBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d
    if config.profile == "resnet50_fpn":
        return _ResNetBody(resnet.resnet50(weights=None, norm_layer=norm_layer)), [256, 512, 1024, 2048]
    return _ResNetBody(resnet.resnet18(weights=None, norm_layer=norm_layer)), [64, 128, 256, 512]
