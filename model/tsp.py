"""Triplet Scoring Predictions: how uncertain the model is about an instance (eq. 2) and an image (eq. 3).

The lower a score, the more uncertain the model, and the sooner a person should annotate the image.
"""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from model.errors import EmptyImageError, InvalidInputError

Array = TypeVar("Array", NDArray[np.floating], torch.Tensor)


def instance_scores(class_scores: Array, box_scores: Array, mask_scores: Array) -> Array:
    """Eq. 2, `s = exp(-std(c, b, m)) * mean(c, b, m)` with the population standard deviation.

    Takes three arrays or tensors (N,) in [0, 1]; returns (N,) of the same kind, in [0, 1].
    """
    named = {"class_scores": class_scores, "box_scores": box_scores, "mask_scores": mask_scores}
    triplets = [_scores(name, scores) for name, scores in named.items()]
    if len({len(scores) for scores in triplets}) > 1:
        lengths = ", ".join(f"{len(scores)} {name}" for name, scores in zip(named, triplets, strict=True))
        raise InvalidInputError(f"expected as many scores of each kind, got {lengths}")
    scores = _consistent_mean(torch.stack(triplets))
    return scores if isinstance(class_scores, torch.Tensor) else scores.numpy()


def image_score(instance_scores: Array, *, when_empty: float | None = None) -> float:
    """Eq. 3, `S = exp(-std(s)) * mean(s)` over the instance scores (N,) of one image.

    N = 0 gives `when_empty`; without it, EmptyImageError. Never NaN.
    """
    scores = _scores("instance_scores", instance_scores)
    if len(scores) == 0:
        if when_empty is None:
            raise EmptyImageError("eq. 3 needs at least one detection, got none: pass `when_empty`")
        return when_empty
    return float(_consistent_mean(scores))


def expected_uncertainty(class_scores: Array, instance_scores: Array) -> float:
    """What people can teach in one image, beyond the paper: `sum_i c_i (1 - s_i)` over its instances (N,), >= 0.

    Eq. 3 asks how uncertain the instances are on average. This asks how much there is to correct: each instance counts
    by the probability c that it exists, so that doubtful specks in an empty image do not outweigh real objects.
    """
    c, s = _scores("class_scores", class_scores), _scores("instance_scores", instance_scores)
    if c.shape != s.shape:
        raise InvalidInputError(f"expected as many scores of each kind, got {len(c)} and {len(s)}")
    return float((c * (1 - s)).sum())


def _consistent_mean(scores: torch.Tensor) -> torch.Tensor:
    """`exp(-std) * mean` over the first axis. The std is spelled out: torch's warns when there is no instance."""
    mean = scores.mean(dim=0)
    std = (scores - mean).square().mean(dim=0).sqrt()
    return torch.exp(-std) * mean


def _scores(name: str, values: object) -> torch.Tensor:
    scores = torch.as_tensor(np.asarray(values) if not isinstance(values, torch.Tensor) else values)
    if scores.ndim != 1:
        raise InvalidInputError(f"{name}: expected shape (N,), got {tuple(scores.shape)}")
    scores = scores if scores.is_floating_point() else scores.double()
    if scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
        raise InvalidInputError(f"{name}: expected values in [0, 1], got {scores.min():.3g} to {scores.max():.3g}")
    return scores
