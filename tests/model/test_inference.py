"""A network made quick says what it said before."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from model.config import PROFILES
from model.errors import InvalidInputError
from model.inference import _RoIPool, for_inference
from model.network import build_model
from model.winograd import WinogradConv
from scripts.make_phantoms import phantom
from tests.model.examples import tiny_network

OF_DETECTIONS = ("boxes", "labels", "scores", "box_scores", "mask_scores", "roi_masks", "class_probabilities")


def images(*sizes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    drawn = [torch.from_numpy(phantom(number, 128, empty_fraction=0.0).image) for number in range(len(sizes))]
    return [
        (image[:height, :width] / 255).to(dtype).expand(3, -1, -1)
        for image, (height, width) in zip(drawn, sizes, strict=True)
    ]


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norm that has seen something: an untrained one would change nothing."""
    torch.manual_seed(1)
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network


@pytest.mark.parametrize(
    ("profile", "frozen_batch_norm"), [(PROFILES[0], False), (PROFILES[1], True), (PROFILES[2], False)]
)
def test_the_detections_are_the_same(profile, frozen_batch_norm):
    torch.manual_seed(0)
    network = build_model(
        profile, 4, min_size=64, max_size=96, frozen_batch_norm=frozen_batch_norm, score_threshold=0.0,
        detections_per_image=5, proposals_inference=20, learning_loss=profile == "resnet18_fpn",
    )  # fmt: skip
    network = with_statistics(network).eval().double()  # where roundings are too small to hide anything
    batch = images((64, 64), (128, 70), dtype=torch.float64)
    with torch.inference_mode():
        expected = network(batch)
    quick = for_inference(copy.deepcopy(network))
    with torch.inference_mode():
        for _ in range(2):  # the scales of the pooling are found with the first image
            for found, before in zip(quick(batch), expected, strict=True):
                assert set(found) == set(before)
                assert len(found["boxes"]) == len(before["boxes"]) == 5
                for name, values in before.items():
                    torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) for module in quick.backbone.body.modules())
    assert any(isinstance(module, WinogradConv) for module in quick.modules()) is profile.startswith("resnet")


@pytest.mark.parametrize("profile", PROFILES)
def test_an_image_without_detections_is_still_none(profile):
    quick = for_inference(build_model(profile, 3, min_size=64, max_size=64, score_threshold=1.0))
    with torch.inference_mode():
        for _ in range(2):
            (found,) = quick(images((64, 64)))
            assert [len(found[name]) for name in OF_DETECTIONS] == [0] * len(OF_DETECTIONS)
            assert found["roi_masks"].shape[1:] == (28, 28)


def test_a_network_that_is_quick_is_not_made_so_again():
    quick = for_inference(tiny_network())
    with pytest.raises(InvalidInputError, match="made quick before"):
        for_inference(quick)


def test_dropout_drops_the_same():
    network = tiny_network(dropout=0.5, score_threshold=0.0).eval()
    (image,) = images((64, 64))
    with torch.inference_mode():
        expected = network.stochastic_passes(image, 3, seed=5)
        found = for_inference(network).stochastic_passes(image, 3, seed=5)
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(after["scores"], before["scores"], rtol=1e-3, atol=1e-4)
    assert not torch.equal(found[0]["scores"], found[1]["scores"])


@pytest.mark.parametrize(("size", "boxes"), [(7, 40), (14, 40), (7, 0)])
def test_rois_are_pooled_as_torchvision_does(size, boxes):
    torch.manual_seed(0)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2)
    sizes = [(200, 256), (256, 190)]
    pyramid = {str(level): torch.randn(2, 8, 64 >> level, 64 >> level).double() for level in range(4)}
    rois = []
    for height, width in sizes:
        corners = torch.rand(boxes, 2, 2) * torch.tensor([width, height])
        some = torch.cat([corners.min(1).values, corners.max(1).values], dim=1)
        edges = torch.tensor([[0.0, 0, width, height], [width - 1.0, height - 1, width, height], [3, 3, 3.1, 3.2]])
        rois.append((torch.cat([some, edges]) if boxes else some).double())
    expected = pool(pyramid, rois, sizes)
    quick = _RoIPool(pool)
    channels_last = {name: level.contiguous(memory_format=torch.channels_last) for name, level in pyramid.items()}
    for _ in range(2):  # the first time it finds the scales
        torch.testing.assert_close(quick(channels_last, rois, sizes), expected, rtol=1e-9, atol=1e-9)
