"""Speed, as ratios: ours and what it is compared with, in turn in one run, so that a slow moment hits both.

    python -m scripts.bench train-step [--profile resnet50_fpn] [--size 512] [--rounds 10] [--threads 1] [--json]
    python -m scripts.bench webhook [--requests 2000] [--rate 100] [--out docs/bench] [--json]

The last line is one JSON object with `name`, `ours`, `theirs` (median CPU seconds of one round) and `ratio`, the median
of ours / theirs round by round: lower is better. Without --json it is preceded by the same in words. `webhook` and
`health` are answers of the web process while a cycle trains (bench_web.py): `ours` is the 99th percentile, `theirs` the
time that Label Studio waits. `start`, `publish`, `ingest`, `look` and `score-workers` are wall time, `polygons`
compares sums over all masks, `predict-few` tells the worse of two cases; what they compare stands in their files,
bench_<name>.py.
--profile and --size are for train-step, ssl-training, branches and score-workers.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from model.config import PROFILES
from model.errors import TSPError
from model.files import write_json
from model.inference import for_inference
from model.losses import total_loss
from model.network import MaskRCNNWithScores, build_model
from scripts.arguments import positive
from scripts.bench_compare import Work, compare
from scripts.bench_evaluate import evaluate
from scripts.bench_ingest import ingest
from scripts.bench_look import look
from scripts.bench_polygons import polygons
from scripts.bench_pool import score_pool
from scripts.bench_predict import predict, predict_few
from scripts.bench_publish import publish
from scripts.bench_ssl import ssl_training
from scripts.bench_start import start
from scripts.bench_web import SOAKS, Load, soak
from scripts.bench_workers import score_workers
from scripts.chaos_report import load_average, machine
from scripts.make_phantoms import CLASS_NAMES, phantom

IMAGES = 2  # annotated images of a step


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a benchmark runs on."""

    profile: str
    size: int
    detections: int  # of each image, in inference


def main() -> None:
    """Run one benchmark and print what it measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=[*BENCHMARKS, *OTHERS, *SOAKS], help="what is measured")
    parser.add_argument("--profile", choices=PROFILES, default="resnet50_fpn", help="default: %(default)s")
    parser.add_argument(
        "--size", type=positive, default=512, help="side of the images and of the network's input, pixels"
    )
    parser.add_argument(
        "--detections", type=positive, default=100, help="of branches, in its image; default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=10, help="publish: two at most")
    parser.add_argument("--threads", type=positive, default=1, help="of torch; default: %(default)s")
    parser.add_argument(
        "--line", default="tsp+ssl", help="of ssl-training, as in scripts.benchmark; default: %(default)s"
    )
    parser.add_argument("--requests", type=positive, default=2000, help="of webhook and health")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--database-url", default="", help="where webhook, health, score-workers keep the state")
    parser.add_argument("--data", nargs="+", default=[], help="COCO folders (annotations.json, images/) of polygons")
    parser.add_argument("--tasks", type=positive, default=10_000, help="of publish, ingest and look")
    parser.add_argument("--regions", type=positive, default=15, help="polygons of each of these tasks")
    parser.add_argument(
        "--label-studio",
        type=_variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the Label Studio of publish",
    )
    parser.add_argument("--images", type=positive, default=10_000, help="of evaluate")
    parser.add_argument("--out", help="folder in which the result is kept as <name>.json")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    before = load_average()
    try:
        measured, words = _measure(options)
    except TSPError as error:
        sys.exit(f"{options.name}: {error}")
    result = {"name": options.name, **measured, "machine": machine() | {"load_average_before": before}}
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.out) / f"{options.name}.json", result)
    if not options.json:
        print(words)
    print(json.dumps(result))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What was measured, and the same in words."""
    if options.name in SOAKS:
        return _soak(options)
    torch.set_num_threads(options.threads)
    if options.name in OTHERS:
        what, measure = OTHERS[options.name]
        result = measure(options)
    else:
        what, prepare = BENCHMARKS[options.name]
        setting = Setting(profile=options.profile, size=options.size, detections=options.detections)
        ours, theirs = prepare(setting)
        result = {
            **compare(ours, theirs, rounds=options.rounds),
            **asdict(setting),
            "rounds": options.rounds,
            "threads": options.threads,
        }
    return result, f"{what}: {result['ours']:.3f} s against {result['theirs']:.3f} s, ratio {result['ratio']:.3f}"


def _soak(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    load = Load(requests=options.requests, rate=options.rate)
    result = soak(options.name, load, database_url=options.database_url)
    words = (
        f"{SOAKS[options.name][0]}: half within {result['p50_ms']} ms, 99 % within {result['p99_ms']} ms, all "
        f"within {result['max_ms']} ms; {result['lost']} of {result['requests']} lost"
    )
    return result, words


def train_step(setting: Setting) -> tuple[Work, Work]:
    """A training step on annotated images, against torchvision's with the same body, heads and weights."""
    network = _network(setting)
    images, targets = _batch(setting.size, IMAGES)
    return partial(_step, network, images, targets), partial(_step, torchvision_network(network), images, targets)


def branches(setting: Setting) -> tuple[Work, Work]:
    """Inference with both IoU branches, against inference that leaves them out; both are made quick, as predictions and
    the look at the pool have them, and the masks stay in their boxes.

    A score threshold of 0 lets an untrained network, too, fill its detections, for which the branches work.
    """
    options: dict[str, Any] = {"score_threshold": 0.0, "detections_per_image": setting.detections}
    network = _network(setting, **options).eval()
    without = _network(setting, **options).eval()
    without.load_state_dict(network.state_dict())
    without = for_inference(without)
    heads = without.roi_heads
    for name in ("box_iou_branch", "mask_iou_branch"):
        setattr(heads, name, _Nothing())
    heads.box_roi_pool = _ForProposalsOnly(heads.box_roi_pool)
    images, _ = _batch(setting.size, 1)
    return partial(_look, for_inference(network), images), partial(_look, without, images)


BENCHMARKS: dict[str, tuple[str, Callable[[Setting], tuple[Work, Work]]]] = {
    "train-step": ("training step, ours against torchvision's", train_step),
    "branches": ("inference with both IoU branches against without", branches),
}

# Those with results or options of their own; each gets all options.
OTHERS: dict[str, tuple[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "ssl-training": ("a training with pseudo labels against one without, for as many steps", ssl_training),
    "predict": ("/predict with 100 detections against torchvision's network alone", predict),
    "predict-few": ("/predict with 5 detections, or at 512 px, against torchvision's network alone", predict_few),
    "score-pool": (
        "a pool, from files to scores and polygons, against torchvision's network image by image",
        score_pool,
    ),
    "polygons": ("masks to polygons against cv2.findContours and approxPolyDP", polygons),
    "score-workers": ("two workers on one pool against one", score_workers),
    "start": ("start of the web process until /health answers, against one that loads torch first", start),
    "publish": ("publishing predictions against Label Studio's bulk import alone", publish),
    "ingest": ("reading annotations again when few have changed against reading all", ingest),
    "look": ("a worker's look at a project when nothing has changed, against the first one", look),
    "evaluate": ("COCO's figures of masks against faster-coco-eval", evaluate),
}


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
    """The second time in an image, the RoIs are the final boxes, whose features only the box IoU branch needs."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool, self.calls = pool, 0

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            return self.pool(features, boxes, image_sizes)  # type: ignore[no-any-return]
        return torch.cat(boxes)


def _network(setting: Setting, **options: Any) -> MaskRCNNWithScores:
    torch.manual_seed(0)
    sides: dict[str, Any] = {"min_size": setting.size, "max_size": setting.size}
    return build_model(setting.profile, len(CLASS_NAMES) + 1, **sides, **options).train()


def _batch(size: int, count: int) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Phantoms with lesions, as training gets them."""
    images: list[Tensor] = []
    targets: list[dict[str, Any]] = []
    for number in range(count):
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
            }
        )
    return images, targets


def _step(network: nn.Module, images: list[Tensor], targets: list[dict[str, Any]]) -> None:
    """Forward, backward, and the gradients away: what both have in common after that is left out."""
    torch.manual_seed(0)
    loss = total_loss(network(images, targets), beta=0.01, iou_weight=1.0)
    torch.autograd.backward(loss)
    network.zero_grad(set_to_none=True)


def _look(network: nn.Module, images: list[Tensor]) -> None:
    with torch.inference_mode():
        network(images)


if __name__ == "__main__":
    main()
