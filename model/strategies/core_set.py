"""Core-set: images far from everything that is annotated (Sener and Savarese, k-centre greedy)."""

from collections.abc import Iterator

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
        return k_centre_greedy(candidates.all_features, candidates.centres, candidates.count)


def k_centre_greedy(features: FloatArray, centres: FloatArray | None, count: int) -> IntArray:
    """Indices of `count` points (P, F), each the farthest from the centres (L, F) and from those before it.

    Without centres the first is the point nearest to the mean: the most ordinary image. Time (L + count) * P * F;
    beside the features, memory for L * F numbers and some thousand distances for each centre.
    """
    if count == 0 or len(features) == 0:
        return np.array([], dtype=np.int64)
    chosen: list[int] = []
    if centres is None or len(centres) == 0:
        chosen = [int(_distances(features, features.mean(axis=0, dtype=np.float64)).argmin())]
        distance = _distances(features, features[chosen[0]])
    else:
        distance = _nearest(features, centres)
    distance[chosen] = -1
    while len(chosen) < min(count, len(features)):
        farthest = int(distance.argmax())
        chosen.append(farthest)
        np.minimum(distance, _distances(features, features[farthest]), out=distance)
        distance[farthest] = -1
    return np.array(chosen[:count], dtype=np.int64)


def _distances(features: FloatArray, point: FloatArray) -> FloatArray:
    """Distances (P,) of points (P, F) to one (F,); by pieces, whose differences stay in the processor's cache."""
    return np.concatenate([np.linalg.norm(piece - point, axis=1) for piece in _pieces(features)])


def _nearest(features: FloatArray, centres: FloatArray) -> FloatArray:
    """Distances (P,) of points (P, F) to the nearest of (L, F): |x|^2 - 2 xc + |c|^2, one matrix product a piece."""
    middle = centres.mean(axis=0, dtype=np.float32)  # numbers near zero lose fewer digits in the difference
    centres = centres - middle
    lengths = np.square(centres).sum(axis=1)
    squares = []
    for piece in _pieces(features):
        shifted = piece - middle
        squares.append(np.square(shifted).sum(axis=1) + (lengths - 2 * shifted @ centres.T).min(axis=1))
    distances: FloatArray = np.sqrt(np.maximum(np.concatenate(squares), 0))
    return distances


def _pieces(features: FloatArray) -> Iterator[FloatArray]:
    dtype = np.promote_types(features.dtype, np.float32)
    return (features[first : first + _PIECE].astype(dtype, copy=False) for first in range(0, len(features), _PIECE))


_PIECE = 1024
