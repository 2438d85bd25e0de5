"""TSP x diversity: the most uncertain images, spread out, so that near-duplicates do not fill a batch."""

from collections.abc import Sequence

import numpy as np

from model.strategies.base import Observation, features_of, scores_of
from model.strategies.core_set import k_centre_greedy
from model.strategies.tsp import TSP
from model.tsp import EmptyImagePolicy
from model.types import IntArray


class Hybrid(TSP):
    """Of the `candidates * count` lowest S, those that lie farthest from the annotated images and from each other."""

    name = "hybrid"
    candidates = 4

    def choose(
        self,
        pool: Sequence[Observation],
        labelled: Sequence[Observation],
        count: int,
        *,
        seed: int,
        empty_policy: EmptyImagePolicy = EmptyImagePolicy.MEDIAN,
    ) -> IntArray:
        if not pool:
            return np.array([], dtype=np.int64)
        uncertain = np.argsort(scores_of(pool, empty_policy), kind="stable")[: self.candidates * count]
        features = features_of(pool)[uncertain]
        spread = k_centre_greedy(features, features_of(labelled) if labelled else None, count)
        return uncertain[spread]
