"""Random: every image is as good as any other. What all others must beat."""

from collections.abc import Sequence

import numpy as np

from model.strategies.base import Observation, Sight, Strategy
from model.tsp import EmptyImagePolicy
from model.types import IntArray


class Random(Strategy):
    """A uniform draw without replacement."""

    name = "random"

    def observe(self, sight: Sight) -> Observation:
        return Observation(score=None, feature=sight.feature)

    def choose(
        self,
        pool: Sequence[Observation],
        labelled: Sequence[Observation],
        count: int,
        *,
        seed: int,
        empty_policy: EmptyImagePolicy = EmptyImagePolicy.MEDIAN,
    ) -> IntArray:
        return np.random.default_rng(seed).permutation(len(pool))[:count]
