"""What a strategy is: it looks at each image once, keeps a few numbers, and chooses from these."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from model.network import MaskRCNNWithScores
from model.tsp import EmptyImagePolicy, empty_image_score
from model.types import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is kept of one image: `score` (the lowest is annotated first; None: the model found nothing to score)
    and `feature` (F,), for strategies that compare images."""

    score: float | None
    feature: FloatArray


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One image as a network sees it: the input (3, H, W) in [0, 1] and the network's output for it."""

    network: MaskRCNNWithScores
    image: Tensor
    output: dict[str, Tensor]

    @property
    def feature(self) -> FloatArray:
        """The body's top features averaged over the image, (F,)."""
        return self.output["feature"].cpu().numpy()


class Strategy(ABC):
    """Ranks the unlabelled images. A strategy has no state: everything it knows are its arguments."""

    name: ClassVar[str]
    network_options: ClassVar[dict[str, Any]] = {}  # what the network must be built with (fields of NetworkConfig)

    @abstractmethod
    def observe(self, sight: Sight) -> Observation:
        """What to keep of an image."""

    def choose(
        self,
        pool: Sequence[Observation],
        labelled: Sequence[Observation],
        count: int,
        *,
        seed: int,
        empty_policy: EmptyImagePolicy = EmptyImagePolicy.MEDIAN,
    ) -> IntArray:
        """Indices of the `count` images of the pool to annotate, (min(count, P),), the first one first.

        By score, ties by position; strategies that compare images override this. `labelled` are the annotated images.
        """
        return np.argsort(scores_of(pool, empty_policy), kind="stable")[:count]


def scores_of(pool: Sequence[Observation], empty_policy: EmptyImagePolicy) -> FloatArray:
    """The scores of a pool (P,), with a place for the images that have none."""
    known = [observation.score for observation in pool if observation.score is not None]
    when_empty = empty_image_score(known, empty_policy)
    return np.array([when_empty if o.score is None else o.score for o in pool], dtype=np.float64)


def features_of(observations: Sequence[Observation]) -> FloatArray:
    """The features of several images (P, F)."""
    return np.stack([observation.feature for observation in observations])


def mean_or_none(values: Tensor) -> float | None:
    """The mean of (N,) values; None for N = 0."""
    return None if values.numel() == 0 else float(torch.mean(values.double()))
