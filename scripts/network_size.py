"""Parameters and operations of each profile, beside the paper's 47.07 M and 132.54 GFLOPs. Prints JSON.

Operations are multiply-accumulates of one forward pass (what most papers call FLOPs; half of what torch's counter
counts), with as many final detections as the network may return, for that is when all heads work.
"""

import argparse
import json
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import maskrcnn_resnet50_fpn

from model.config import PROFILES
from model.network import build_model

PAPER = {"profile": "paper", "parameters_millions": 47.07, "giga_operations": 132.54}


def measure(network: torch.nn.Module, *, size: int) -> dict[str, Any]:
    """Parameters, and operations for one random image of `size` x `size`."""
    torch.manual_seed(0)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        detections = network.eval()([torch.rand(3, size, size)])
    return {
        "parameters_millions": round(sum(p.numel() for p in network.parameters()) / 1e6, 2),
        "giga_operations": round(counter.get_total_flops() / 2e9, 2),
        "detections": len(detections[0]["labels"]),
    }


def main() -> None:
    """Measure every profile, and torchvision's Mask R-CNN without the two branches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the square image (the paper's is 512)")
    parser.add_argument(
        "--classes", type=int, default=10, help="classes without the background (the paper's CT has 10)"
    )
    options = parser.parse_args()
    sizes = {"min_size": options.size, "max_size": options.size}
    rows = [PAPER]
    for profile in PROFILES:
        # A threshold of zero: an untrained network, too, fills its detections.
        network = build_model(profile, options.classes + 1, score_threshold=0.0, **sizes)
        rows.append({"profile": profile, **measure(network, size=options.size)})
    plain = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=options.classes + 1, box_score_thresh=0.0, **sizes
    )
    rows.append({"profile": "torchvision maskrcnn_resnet50_fpn", **measure(plain, size=options.size)})
    print(json.dumps({"size": options.size, "classes": options.classes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
