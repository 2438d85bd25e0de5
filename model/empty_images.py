"""Where images without any detection stand in the queue. No torch: settings and the order of a queue need none."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class EmptyImagePolicy(StrEnum):
    """Where an image without any detection stands in the queue; the paper is silent on it."""

    FIRST = "first"  # S = 0: perhaps everything in it was missed
    LAST = "last"  # S = 1: there is probably nothing in it
    MEDIAN = "median"  # the median S of the images that have detections (0 when none has): neither first nor last


def empty_image_score(scores: Sequence[float] | NDArray[np.float64], policy: EmptyImagePolicy) -> float:
    """The score that `policy` gives an image without detections; `scores` are those of the pool's other images."""
    policy = EmptyImagePolicy(policy)  # accepts its text too, and no other
    if policy is EmptyImagePolicy.FIRST:
        return 0.0
    if policy is EmptyImagePolicy.LAST:
        return 1.0
    return float(np.median(scores)) if len(scores) else 0.0
