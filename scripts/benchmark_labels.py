"""How many labels a line needs until it is as good as full supervision, or as random in its last cycle."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.types import FloatArray
from scripts.benchmark_statistics import images_to_reach

Run = dict[str, Any]
Reached = dict[str, Any]

NEXT_TO_NOTHING = 0.02  # mAP@0.5 that is no target: lines cross it by chance
_SHARES_OF_FULL = (80, 90, 95, 100)  # percent


def curves_of(runs: Sequence[Run]) -> FloatArray:
    """mAP@0.5 by seed and cycle."""
    return np.array([[cycle["map_50"] for cycle in run["cycles"]] for run in runs], dtype=np.float64)


def labels_for_full(runs: Sequence[Run], full: Mapping[str, Any] | None) -> dict[str, Reached]:
    """What a line needs for shares, in percent, of full supervision's mAP@0.5; empty without full supervision."""
    if full is None:
        return {}
    settings = runs[0]["settings"]
    everything = settings["pool_images"], settings["pool_instances"]
    return {
        str(percent): _reached(runs, np.full(len(runs), full["map_50"] * percent / 100), of=everything)
        for percent in _SHARES_OF_FULL
    }


def labels_for_random(runs: Sequence[Run], random: Sequence[Run]) -> Reached | None:
    """What a line needs for random's mAP@0.5 in its last cycle at the same seeds, which is how the paper and others
    count; None without a seed that both have, and where random has learnt next to nothing."""
    ends = {run["seed"]: run["cycles"][-1] for run in random}
    alike = [run for run in runs if run["seed"] in ends]
    if not alike:
        return None
    found = [ends[run["seed"]] for run in alike]
    instances = float(np.mean([end["annotated_instances"] for end in found]))
    targets = np.array([end["map_50"] for end in found], dtype=np.float64)
    if targets.mean() <= NEXT_TO_NOTHING:
        return None
    return _reached(alike, targets, of=(found[0]["annotated_images"], instances))


def _reached(runs: Sequence[Run], targets: FloatArray, *, of: tuple[int, float]) -> Reached:
    """From which annotated images on the mean curve stays above the mean target (None: it ends below), what share `of`
    so many images and so many instances they are, and the images of each seed's own curve and target.

    Between cycles the curve is straight, and nobody annotates a part of an image: rounded up. With as many as the first
    cycle has, fewer may have done.
    """
    curves = curves_of(runs)
    cycles = [cycle["annotated_images"] for cycle in runs[0]["cycles"]]
    by_seed = [
        _whole(images_to_reach(cycles, curve, float(target))) for curve, target in zip(curves, targets, strict=True)
    ]
    exact = images_to_reach(cycles, curves.mean(axis=0), float(targets.mean()))
    images = _whole(exact)
    if exact is None or images is None:
        return {"images": None, "share_of_images": None, "share_of_instances": None, "images_by_seed": by_seed}
    instances = np.array([[cycle["annotated_instances"] for cycle in run["cycles"]] for run in runs]).mean(axis=0)
    return {
        "images": images,
        "share_of_images": images / of[0],
        "share_of_instances": float(np.interp(exact, cycles, instances)) / max(of[1], 1),
        "from_the_first_cycle": exact == cycles[0],
        "images_by_seed": by_seed,
    }


def _whole(images: float | None) -> int | None:
    return None if images is None else math.ceil(round(images, 6))
