"""Random: every image is as good as any other. What all others must beat."""

import numpy as np

from model.strategies.base import Candidates, Observation, Sight, Strategy
from model.strategies.tsp import uncertainty
from model.types import IntArray


class Random(Strategy):
    """A uniform draw without replacement. The score is S (eq. 3), for people who look: the choice ignores it."""

    name = "random"
    chooses_a_set = True

    def observe(self, sight: Sight) -> Observation:
        return Observation(score=uncertainty(sight), feature=sight.feature)

    def _choose(self, candidates: Candidates) -> IntArray:
        return np.random.default_rng(candidates.seed).permutation(len(candidates.pool))[: candidates.count]
