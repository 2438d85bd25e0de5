"""The comparison of `/predict` with torchvision's network: both see the same, and the stages add up."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from model.network import build_model
from scripts import bench_predict
from scripts.make_phantoms import phantom


def test_torchvisions_network_finds_the_same_boxes():
    torch.manual_seed(0)
    pixels = np.repeat(phantom(3, 96, empty_fraction=0.0).image[:, :, None], 3, axis=2)
    options = {"min_size": 96, "max_size": 96, "score_threshold": 0.0, "nms_threshold": 0.2, "detections_per_image": 7}
    ours = build_model("resnet50_fpn", 4, **options).eval()
    bench_predict.draw_blobs(ours, pixels)
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    with torch.inference_mode():
        (found,), (theirs,) = ours([image]), bench_predict.torchvision_network(ours)([image])
    torch.testing.assert_close(found["boxes"], theirs["boxes"])
    torch.testing.assert_close(found["scores"], theirs["scores"])
    assert theirs["masks"].shape == (7, 1, 96, 96)
    inside = (found["roi_masks"] > ours.config.mask_threshold).float().mean(dim=(1, 2))
    assert bool(((inside > 0.05) & (inside < 0.95)).any())  # masks are neither empty nor whole boxes


def test_a_prediction_is_measured_from_http_to_json(monkeypatch):
    monkeypatch.setattr(bench_predict, "IMAGE_PX", 96)
    measured = bench_predict._measured(bench_predict.Case(5, 96), Namespace(threads=1, rounds=1))
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"])
    assert measured["detections"] == 5
    assert 1 <= measured["polygons"] <= 20
    assert measured["vertices"] >= 3
    assert sum(measured["stages"].values()) == pytest.approx(1, abs=0.02)
