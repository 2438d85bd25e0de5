"""How many labels a line needs until it is as good as full supervision, or as random in its last cycle."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.types import FloatArray
from scripts.benchmark_statistics import images_to_reach

Run = dict[str, Any]

_SHARES_OF_FULL = (80, 90, 95, 100)  # percent


def curves_of(runs: Sequence[Run]) -> FloatArray:
    """mAP@0.5 by seed and cycle."""
    return np.array([[cycle["map_50"] for cycle in run["cycles"]] for run in runs], dtype=np.float64)


def labels_needed(
    runs: Sequence[Run], full: dict[str, Any] | None, lines: Mapping[str, Sequence[Run]]
) -> dict[str, dict[str, dict[str, Any]] | dict[str, Any] | None]:
    """How many annotated images a line needs: for shares of full supervision's height (none without it), and for that
    of random's last cycle at the same seeds, which is what the paper and others compare with."""
    curves, settings = curves_of(runs), runs[0]["settings"]
    pool = settings["pool_images"], settings["pool_instances"]
    shares = {}
    if full is not None:
        for percent in _SHARES_OF_FULL:
            targets = np.full(len(runs), full["map_50"] * percent / 100)
            shares[str(percent)] = _images_to_reach(runs, curves, targets, of=pool)
    random = {run["seed"]: run for run in lines.get("random", [])}
    alike = [run for run in runs if run["seed"] in random and run["line"] != "random"]
    if not alike:
        return {"images_to_reach": shares, "images_to_reach_random": None}
    ends = [random[run["seed"]]["cycles"][-1] for run in alike]
    heights = np.array([end["map_50"] for end in ends], dtype=np.float64)
    last = ends[0]["annotated_images"], float(np.mean([end["annotated_instances"] for end in ends]))
    return {
        "images_to_reach": shares,
        "images_to_reach_random": _images_to_reach(alike, curves_of(alike), heights, of=last),
    }


def _images_to_reach(
    runs: Sequence[Run], curves: FloatArray, targets: FloatArray, *, of: tuple[int, float]
) -> dict[str, Any]:
    """From which annotated images on the mean curve stays above the mean target (None: it ends below), what share `of`
    so many images and so many instances they are, and the images of each seed's own curve and target.

    Between cycles the curve is straight, and nobody annotates a part of an image: rounded up. With as many as the first
    cycle has, fewer may have done.
    """
    images = [cycle["annotated_images"] for cycle in runs[0]["cycles"]]
    exact = images_to_reach(images, curves.mean(axis=0), float(targets.mean()))
    instances = np.array([[cycle["annotated_instances"] for cycle in run["cycles"]] for run in runs]).mean(axis=0)
    return {
        "images": _whole(exact),
        "share_of_images": None if exact is None else (_whole(exact) or 0) / of[0],
        "share_of_instances": None if exact is None else float(np.interp(exact, images, instances)) / max(of[1], 1),
        "from_the_first_cycle": exact == images[0],
        "images_by_seed": [
            _whole(images_to_reach(images, curve, float(target))) for curve, target in zip(curves, targets, strict=True)
        ],
    }


def _whole(images: float | None) -> int | None:
    return None if images is None else math.ceil(round(images, 6))
