"""Whether a new version may take the place of the one in use: a paired bootstrap over the validation images; pure.

Both were measured on the same images, so an image that is drawn twice counts twice for both, and what makes a set of
images easy or hard cancels out of the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.comparison import Compared, average_precisions, mean_precision, ranked_hits, resampled_map_50
from model.config import FEWEST_IMAGES
from model.types import IntArray

CONFIDENCE = 0.9  # of the interval: 5 % lie above its upper end
_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`reason` is for people. The figures are mask mAP@0.5 over `class_names` on the same `images` (those with ground
    truth); `low` and `high` bound the 90 % interval of new minus active. None: not measured."""

    accepted: bool
    reason: str
    class_names: tuple[str, ...] = ()
    images: int = 0
    new_map_50: float | None = None
    active_map_50: float | None = None
    low: float | None = None
    high: float | None = None


def judge(
    new: Sequence[Compared], active: Sequence[Compared], class_names: Sequence[str], *, images: int, margin: float
) -> Verdict:
    """Refuse a new version only if it is worse than the active one by more than `margin`, and that with confidence.

    `new` and `active` (`model.comparison.compare`) are of the same `images` images; class i + 1 is `class_names[i]`.
    """
    instances = _instances(new, class_names, images)
    with_truth = int((instances.sum(axis=0) > 0).sum())
    measured_new, measured_active = (_map_50(compared, class_names) for compared in (new, active))
    if measured_new is None or measured_active is None or with_truth < FEWEST_IMAGES:
        return Verdict(
            accepted=True,
            reason=f"accepted without judgement: to tell versions apart, {FEWEST_IMAGES} validation images with "
            f"annotated instances are needed, and {with_truth} found",
            class_names=tuple(class_names),
            images=with_truth,
            new_map_50=measured_new,
            active_map_50=measured_active,
        )
    resampled_new, resampled_active = (
        resampled_map_50(
            {name: ranked_hits(compared, label) for label, name in enumerate(class_names, start=1)},
            {name: row.tolist() for name, row in zip(class_names, instances, strict=True)},
            _RESAMPLES,
        )
        for compared in (new, active)
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_new - resampled_active, [tail, 1 - tail]).tolist()
    accepted = high >= -margin
    return Verdict(
        accepted=accepted,
        reason=_reason(accepted, measured_new, measured_active, (low, high), with_truth, margin),
        class_names=tuple(class_names),
        images=with_truth,
        new_map_50=measured_new,
        active_map_50=measured_active,
        low=low,
        high=high,
    )


def _instances(compared: Sequence[Compared], class_names: Sequence[str], images: int) -> IntArray:
    """The number of annotated instances by class and image, (C, images)."""
    counts = np.zeros((len(class_names), images), dtype=np.int64)
    for pair in compared:
        counts[pair.label - 1, pair.image] = pair.instances
    return counts


def _map_50(compared: Sequence[Compared], class_names: Sequence[str]) -> float | None:
    return mean_precision(average_precisions(compared, len(class_names), lambda pair: pair.class_scores)[:, 0])


def _reason(
    accepted: bool, new: float, active: float, interval: tuple[float, float], images: int, margin: float
) -> str:
    figures = (
        f"mask mAP@0.5 {new:.3f} against {active:.3f} of the active version on the same {images} validation images "
        f"(difference {new - active:+.3f}, 90 % interval {interval[0]:+.3f} to {interval[1]:+.3f})"
    )
    if accepted:
        return f"accepted: {figures} is not surely worse by more than {margin:g}"
    return f"refused: {figures} is surely worse by more than {margin:g}"
