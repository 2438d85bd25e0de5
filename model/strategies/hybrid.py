"""TSP x diversity: the most uncertain images, spread out, so that near-duplicates do not fill a batch."""

from model.strategies.base import Candidates
from model.strategies.core_set import k_centre_greedy
from model.strategies.tsp import TSP
from model.types import IntArray


class Hybrid(TSP):
    """Of the `candidates * count` lowest S, those that lie farthest from the annotated images and from each other.

    Of a small pool half at most are candidates: of all of it, S would decide nothing.
    """

    name = "hybrid"
    chooses_a_set = True
    compares_images = True
    candidates = 4

    def _choose(self, candidates: Candidates) -> IntArray:
        most = max(candidates.count, len(candidates.pool) // 2)
        uncertain = candidates.lowest(min(self.candidates * candidates.count, most))
        return uncertain[k_centre_greedy(candidates.features(uncertain), candidates.centres, candidates.count)]
