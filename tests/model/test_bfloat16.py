"""A network in bfloat16 finds nearly what it finds in float32."""

import copy
import platform

import pytest
import torch
from torchvision.ops import box_iou

from model.bfloat16 import has_bfloat16
from model.config import PROFILES
from model.errors import InvalidInputError
from model.inference import for_inference
from model.network import build_model
from model.winograd import WinogradConv
from scripts.make_phantoms import phantom
from tests.model.examples import tiny_network

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no instructions for bfloat16")
TYPES = {
    "boxes": torch.float32,
    "labels": torch.int64,
    "scores": torch.float32,
    "box_scores": torch.float32,
    "mask_scores": torch.float32,
    "roi_masks": torch.float32,
    "class_probabilities": torch.float32,
    "feature": torch.float32,
    "predicted_loss": torch.float32,
}


@needs_bfloat16
@pytest.mark.parametrize("profile", PROFILES)
def test_the_heads_find_nearly_the_same_in_the_same_places(profile):
    """Nothing is left out for its score or its neighbours, so that near ties cannot change what is found."""
    torch.manual_seed(0)
    options = {"min_size": 128, "max_size": 128, "score_threshold": 0.0, "nms_threshold": 1.0}
    network = build_model(profile, 4, learning_loss=profile == "resnet18_fpn", **options)
    near = for_inference(copy.deepcopy(network), precision="bfloat16")
    exact = for_inference(network)
    corners = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(0)) * 90
    places = torch.cat([corners.amin(1), corners.amax(1) + 30], dim=1)
    (before, pyramid), (found, near_pyramid) = heads_at(exact, places), heads_at(near, places)
    for level, features in pyramid.items():
        assert (near_pyramid[level].float() - features).norm() < 0.03 * features.norm(), level
    same = box_iou(before["boxes"], found["boxes"]) * (before["labels"][:, None] == found["labels"])
    iou, which = same.max(dim=1)
    assert len(found["boxes"]) == len(before["boxes"]) == 24
    assert iou.min() > 0.95
    for name in ("scores", "box_scores", "mask_scores"):
        torch.testing.assert_close(found[name][which], before[name], rtol=0, atol=0.02)
    assert (found["roi_masks"][which] - before["roi_masks"]).abs().mean() < 0.02
    assert not any(isinstance(module, WinogradConv) for module in near.modules())


@needs_bfloat16
@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_returned_is_float32(profile):
    network = build_model(profile, 3, min_size=64, max_size=64, learning_loss=True, score_threshold=0.0)
    network = for_inference(network, precision="bfloat16")
    with torch.inference_mode():
        for _ in range(2):  # the scales of the pooling are found with the first image
            (found,) = network([torch.rand(3, 64, 64)])
    assert len(found["boxes"]) > 0
    assert {name: values.dtype for name, values in found.items()} == TYPES


@torch.inference_mode()
def heads_at(network, places):
    """What the heads find in places xyxy of an image, and the pyramid in which they look."""
    image = torch.from_numpy(phantom(3, 128, empty_fraction=0.0).image).expand(3, -1, -1) / 255
    batch, _ = network.transform([image])
    pyramid = network.backbone(batch.tensors)
    return network.roi_heads.detect(pyramid, [places], batch.image_sizes)[0], pyramid


@needs_bfloat16
def test_dropout_drops_in_bfloat16_too():
    network = for_inference(tiny_network(dropout=0.5, score_threshold=0.0), precision="bfloat16")
    with torch.inference_mode():
        found = network.stochastic_passes(torch.rand(3, 64, 64), 2, seed=5)
    assert not torch.equal(found[0]["scores"], found[1]["scores"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks what an x86 CPU can do")
@pytest.mark.parametrize(
    ("instructions", "is_quick"),
    [
        pytest.param((), False, id="AVX-512 without bfloat16, as Cascade Lake"),
        pytest.param(("_is_avx512_bf16_supported",), True, id="AVX-512 BF16, as Zen 4"),
        pytest.param(("_is_amx_tile_supported",), True, id="AMX"),
    ],
)
@pytest.mark.parametrize("is_asked", [True, False], ids=["each can be asked for", "torch knows only what is there"])
def test_avx512_alone_does_not_multiply_bfloat16(monkeypatch, instructions, is_quick, is_asked):
    """Of CPUs that are not here: what torch says of them is set."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if is_asked or name in instructions:
            monkeypatch.setattr(torch.cpu, name, lambda there=name in instructions: there, raising=False)
        else:
            monkeypatch.delattr(torch.cpu, name, raising=False)
    assert has_bfloat16() is is_quick


def test_without_onednn_nothing_is_quick_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(InvalidInputError, match="expected float32"):
        for_inference(tiny_network(), precision="bfloat16")


@pytest.mark.skipif(has_bfloat16(), reason="this CPU has instructions for bfloat16")
def test_a_cpu_without_bfloat16_says_so():
    with pytest.raises(InvalidInputError, match="expected float32"):
        for_inference(tiny_network(), precision="bfloat16")


def test_other_devices_say_that_bfloat16_is_for_cpus():
    with pytest.raises(InvalidInputError, match="bfloat16 is for CPUs, the network is on meta"):
        for_inference(tiny_network().to("meta"), precision="bfloat16")
