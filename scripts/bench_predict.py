"""A prediction from the HTTP request to polygons in JSON, against torchvision's own Mask R-CNN on the tensor alone.

Both have the same ResNet-50 with the same weights, score threshold and number of detections. torchvision's reads no
image, predicts no IoU and draws no polygon; it pastes each mask into the image.
"""

import json
import math
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn

from ml_backend.app import create_app
from ml_backend.label_config import parse_label_config
from ml_backend.ls_format import prediction
from ml_backend.pool import detections_for_people
from ml_backend.settings import Settings
from model.dataset import image_tensor, input_hw, load_image
from model.inference import for_inference
from model.network import MaskRCNNWithScores
from model.predict import detections_of
from model.registry import Registry
from scripts.bench_compare import compare
from scripts.bench_version import (
    KEY,
    LABEL_CONFIG,
    UID,
    VERSION,
    add_version,
    data_uri,
    environment,
)
from scripts.make_phantoms import phantom
from scripts.served_app import served

IMAGE_PX = 1024
_JSON = {"Content-Type": "application/json"}
OPTIONS = {"score_threshold": 0.0, "nms_threshold": 0.2, "max_size": 1333}
SHOWN = {"TSP_SHOWN_THRESHOLD": "0", "TSP_QUEUE_THRESHOLD": "0"}


@dataclass(frozen=True)
class Case:
    """How many detections both sides have, and the shorter side of the network's input, in pixels."""

    detections: int
    min_size: int


def predict(options: Namespace) -> dict[str, Any]:
    """100 detections at torchvision's default size."""
    return _measured(Case(100, 800), options)


def predict_few(options: Namespace) -> dict[str, Any]:
    """5 detections, and 100 at 512 px; the ratio is that of the worse."""
    cases = [_measured(case, options) for case in (Case(5, 800), Case(100, 512))]
    worse = max(cases, key=lambda measured: measured["ratio"])
    return {**{name: worse[name] for name in ("ours", "theirs", "ratio")}, "cases": cases}


def _measured(case: Case, options: Namespace) -> dict[str, Any]:
    pixels = np.repeat(phantom(3, IMAGE_PX, empty_fraction=0.0).image[:, :, None], 3, axis=2)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        settings = environment(Path(folder)) | SHOWN | {"TSP_THREADS": str(options.threads)}
        sizes = {"min_size": case.min_size, "detections_per_image": case.detections}
        network = add_version(
            settings, "resnet50_fpn", prepare=lambda made: draw_blobs(made, pixels), **OPTIONS, **sizes
        )
        theirs = torchvision_network(network)
        tensor = [torch.from_numpy(pixels).permute(2, 0, 1).float() / 255]
        path = Path(folder) / "image.png"
        cv2.imwrite(str(path), pixels)
        with served(create_app(Settings.model_validate(settings))) as url:
            body = _request(pixels)

            def ours() -> list[Any]:
                answer = httpx.post(f"{url}/predict", content=body, headers=_JSON, timeout=600)
                return list(answer.raise_for_status().json()["results"][0]["result"])

            def pasted() -> dict[str, torch.Tensor]:
                with torch.inference_mode():
                    return dict(theirs(tensor)[0])

            regions, count = ours(), len(pasted()["boxes"])
            if count != case.detections:
                raise RuntimeError(f"expected {case.detections} detections of torchvision's network, got {count}")
            measured = compare(ours, pasted, rounds=options.rounds)
        shares = stages(Settings.model_validate(settings), path, options.rounds)
    return {
        **measured,
        "detections": count,
        "polygons": len(regions),
        "vertices": round(float(np.mean([len(region["value"]["points"]) for region in regions])), 1),
        "input_px": case.min_size,
        "image_px": IMAGE_PX,
        "threads": options.threads,
        "rounds": options.rounds,
        "stages": shares,
    }


@torch.no_grad()
def draw_blobs(network: MaskRCNNWithScores, pixels: NDArray[np.uint8]) -> None:
    """Give an untrained network batch norm that fits an image (H, W, 3), boxes of a tenth of it, and masks that are
    round instead of noise: its mask head averages, and what lies outside of a RoI is 0."""
    body, heads = network.backbone.body, network.roi_heads
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all that it sees
            module.reset_running_stats()
    body.train()
    image = image_tensor(pixels, input_hw((pixels.shape[0], pixels.shape[1]), network.config))
    body(network.transform([image])[0].tensors)
    network.eval()
    heads.box_predictor.bbox_pred.bias.view(-1, 4)[:, 2:] = 5 * math.log(3)  # boxes thrice as large as the anchors
    mask_layers = [module for module in heads.mask_head.modules() if isinstance(module, nn.Conv2d)][1:]
    mask_layers += [heads.mask_predictor.conv5_mask, heads.mask_predictor.mask_fcn_logits]
    for layer in mask_layers:
        reached = layer.in_channels * (9 if layer in mask_layers[:-2] else 1)
        layer.weight.fill_(1 / reached)
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels))
    masks = network([image])[0]["roi_masks"]
    level = float(torch.logit(masks).quantile(0.55))
    heads.mask_predictor.mask_fcn_logits.weight.mul_(4 / level)
    heads.mask_predictor.mask_fcn_logits.bias.fill_(-4 + math.log(network.config.mask_threshold / 0.7))


def torchvision_network(ours: MaskRCNNWithScores) -> MaskRCNN:
    """torchvision's `maskrcnn_resnet50_fpn` with the same weights, without the IoU branches."""
    config = ours.config
    network = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=config.num_classes,
        min_size=config.min_size,
        max_size=config.max_size,
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_threshold,
        box_detections_per_img=config.detections_per_image,
    )
    network.load_state_dict({name: value for name, value in ours.state_dict().items() if "_iou_branch" not in name})
    return network.eval()


def _request(pixels: NDArray[np.uint8]) -> bytes:
    """The image lies in the task, so that the first request brings it into the cache."""
    task = {"id": 1, "data": {"image": data_uri(pixels)}}
    return json.dumps({"tasks": [task], "project": UID, "label_config": LABEL_CONFIG}).encode()


def stages(settings: Settings, path: Path, rounds: int) -> dict[str, float]:
    """Which share of the CPU time of a prediction, HTTP left out, each stage takes; medians."""
    network, card = Registry(settings.model_dir / "versions").load(KEY, VERSION)
    _shares(for_inference(network, precision=settings.precision), card.class_names, path)  # warms up
    shares = [_shares(network, card.class_names, path) for _ in range(rounds)]
    return {name: round(float(np.median([one[name] for one in shares])), 3) for name in shares[0]}


def _shares(network: MaskRCNNWithScores, class_names: Sequence[str], path: Path) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    config = parse_label_config(LABEL_CONFIG)
    mask_threshold = network.config.mask_threshold
    started = time.process_time()
    with _timed(spent, "decode"):
        pixels = load_image(path)
    image_hw = (pixels.shape[0], pixels.shape[1])
    with _timed(spent, "resize"):
        image = image_tensor(pixels, input_hw(image_hw, network.config))
    with _hooks(network, spent), torch.inference_mode():
        output = network([image])[0]
    found = detections_of(output, input_hw=image.shape[-2:], image_hw=image_hw)
    with _timed(spent, "duplicates"):
        shown = detections_for_people(
            found, config, class_names=class_names, shown_threshold=0.0, mask_threshold=mask_threshold
        )
    with _timed(spent, "triplets and polygons"):
        answer = prediction(shown, config, model_version=VERSION, score=0.5, mask_threshold=mask_threshold)
    with _timed(spent, "JSON"):
        json.dumps(answer)
    total = time.process_time() - started
    return {name: seconds / total for name, seconds in {**spent, "rest": total - sum(spent.values())}.items()}


@contextmanager
def _timed(spent: dict[str, float], stage: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[stage] += time.process_time() - started


@contextmanager
def _hooks(network: MaskRCNNWithScores, spent: dict[str, float]) -> Iterator[None]:
    """Count what the parts of the network take."""
    heads = network.roi_heads
    stages = {
        "body": [network.transform, network.backbone.body],
        "pyramid": [network.backbone.fpn],
        "proposals": [network.rpn],
        "RoI pooling": [heads.box_roi_pool, heads.mask_roi_pool],
        "box head": [heads.box_head, heads.box_predictor],
        "IoU branches": [heads.box_iou_branch, heads.mask_iou_branch],
        "mask head": [heads.mask_head, heads.mask_predictor],
    }
    handles = []
    for stage, modules in stages.items():
        for module in modules:
            handles += _clock(module, spent, stage)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _clock(module: nn.Module, spent: dict[str, float], stage: str) -> list[RemovableHandle]:
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(time.process_time())

    def after(*_: Any) -> None:
        spent[stage] += time.process_time() - started.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
