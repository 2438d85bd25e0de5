"""The statistics of a benchmark's report: pure functions of numbers.

Seeds are few, so Student's t is what counts: with n seeds, no test of signs can give less than 2 / 2^n, and a bootstrap
of n differences knows only n values and is too sure of itself.
"""

import math
from collections.abc import Sequence

import numpy as np

from model.types import FloatArray

_RESAMPLES = 10_000
_ANGLES = np.linspace(0, np.pi / 2, 50_001)


def student_p(t: float, degrees: int) -> float:
    """Two-sided p of Student's t. With t = sqrt(df) tan(a) its density is cos(a)^(df - 1)."""
    below = _below(degrees)
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(degrees)), _ANGLES, below / below[-1]))


def student_quantile(degrees: int) -> float:
    """The t within which 95 % lie."""
    below = _below(degrees)
    return math.sqrt(degrees) * math.tan(float(np.interp(0.95, below / below[-1], _ANGLES)))


def half_width(values: FloatArray) -> FloatArray:
    """Half the width of a 95 % interval of the mean over seeds, (seeds, ...) -> (...); 0 for a single seed."""
    count = len(values)
    if count < 2:
        return np.zeros(values.shape[1:])
    width: FloatArray = student_quantile(count - 1) * values.std(axis=0, ddof=1) / np.sqrt(count)
    return width


def paired_t_p(differences: FloatArray) -> float:
    """Two-sided p of a mean of zero by the paired t-test; differences (n >= 2,)."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    if error == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    return student_p(float(differences.mean() / error), len(differences) - 1)


def bootstrap_p(differences: FloatArray) -> float:
    """Two-sided p of a mean of zero: resampled means of the centred differences at least as far out. Too optimistic
    for few differences."""
    centred = differences - differences.mean()
    means = np.random.default_rng(0).choice(centred, (_RESAMPLES, len(centred))).mean(axis=1)
    return float((1 + (np.abs(means) >= abs(differences.mean()) - 1e-12).sum()) / (_RESAMPLES + 1))


def smallest_sign_p(count: int) -> float:
    """The smallest two-sided p that a test of n signs can give: all on one side."""
    return float(min(1.0, 2.0 ** (1 - count)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number after Holm, in the same order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def area_under(images: Sequence[int], heights: FloatArray) -> FloatArray:
    """The mean height of curves (..., cycles) over the annotated images, by the trapezium rule."""
    x = np.array(images, dtype=np.float64)
    if x[0] == x[-1]:
        means: FloatArray = heights.mean(axis=-1)
        return means
    areas: FloatArray = np.trapezoid(heights, x, axis=-1) / (x[-1] - x[0])
    return areas


def images_to_reach(images: Sequence[int], curve: FloatArray, target: float) -> float | None:
    """From how many annotated images on the curve, straight between cycles, stays at or above the target; None if it
    ends below."""
    below = np.flatnonzero(curve < target)
    if not len(below):
        return float(images[0])
    last = int(below[-1])
    if last == len(curve) - 1:
        return None
    share = (target - curve[last]) / (curve[last + 1] - curve[last])
    return float(images[last] + share * (images[last + 1] - images[last]))


def _below(degrees: int) -> FloatArray:
    """The integral of cos^(df - 1) from 0 to each angle."""
    density = np.cos(_ANGLES) ** (degrees - 1)
    steps = (density[1:] + density[:-1]) / 2
    return np.concatenate([[0.0], steps.cumsum()])
