"""Core-set: images far from everything that is annotated (Sener and Savarese, k-centre greedy)."""

import numpy as np

from model.strategies.base import Candidates, Observation, Sight, Strategy
from model.strategies.tsp import uncertainty
from model.types import FloatArray, IntArray


class CoreSet(Strategy):
    """Each choice is the image farthest from the annotated and the chosen ones in feature space.

    The score is S (eq. 3), for people who look: the choice ignores it.
    """

    name = "core_set"
    chooses_a_set = True
    compares_images = True

    def observe(self, sight: Sight) -> Observation:
        return Observation(score=uncertainty(sight), feature=sight.feature)

    def _choose(self, candidates: Candidates) -> IntArray:
        everything = candidates.features(range(len(candidates.pool)))
        return k_centre_greedy(everything, candidates.centres, candidates.count)


def k_centre_greedy(features: FloatArray, centres: FloatArray | None, count: int) -> IntArray:
    """Indices of `count` points (P, F), each the farthest from the centres (L, F) and from those before it.

    Without centres the first is the point nearest to the mean: the most ordinary image. O(count * P * F).
    """
    if count == 0 or len(features) == 0:
        return np.array([], dtype=np.int64)
    if centres is None or len(centres) == 0:
        first = int(np.linalg.norm(features - features.mean(axis=0), axis=1).argmin())
        chosen = [first]
        distance = np.linalg.norm(features - features[first], axis=1)
    else:
        chosen = []
        distance = np.full(len(features), np.inf)
        for centre in centres:
            np.minimum(distance, np.linalg.norm(features - centre, axis=1), out=distance)
    distance[chosen] = -1
    while len(chosen) < min(count, len(features)):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        np.minimum(distance, np.linalg.norm(features - features[farthest], axis=1), out=distance)
        distance[farthest] = -1
    return np.array(chosen[:count], dtype=np.int64)
