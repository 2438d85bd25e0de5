"""TSP (eq. 2, 3), and without one or two of its scores (the paper's Fig. 4, lines 6 and 7)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from model.strategies.base import Observation, Sight, Strategy
from model.tsp import expected_uncertainty, image_score, instance_scores

TRIPLET = ("scores", "box_scores", "mask_scores")


class TSP(Strategy):
    """Consistency and height of class, box and mask score; the lowest is the most uncertain."""

    name = "tsp"
    scores: ClassVar[tuple[str, ...]] = TRIPLET

    def observe(self, sight: Sight) -> Observation:
        return Observation(score=uncertainty(sight, self.scores), feature=sight.feature)


class TSPWithoutBox(TSP):
    """Class and mask score."""

    name = "tsp_without_box"
    scores = ("scores", "mask_scores")


class TSPWithoutBoxAndMask(TSP):
    """The class score alone."""

    name = "tsp_without_box_and_mask"
    scores = ("scores",)


class ExpectedTSP(TSP):
    """Beyond the paper: how much there is to correct, `exp(-sum c (1 - s))`; many doubtful objects come first."""

    name = "tsp_expected"

    def observe(self, sight: Sight) -> Observation:
        columns = [sight.counted[name].double() for name in TRIPLET]
        expected = expected_uncertainty(columns[0], instance_scores(*columns))
        return Observation(score=math.exp(-expected), feature=sight.feature)  # 1, last, where nothing was found


class PresentTSP(TSP):
    """Beyond the paper: eq. 3 times the probability that there is anything, `1 - (1 - S) (1 - prod (1 - c))`."""

    name = "tsp_present"

    def observe(self, sight: Sight) -> Observation:
        s = uncertainty(sight)
        present = 1 - float((1 - sight.counted["scores"].double()).prod())  # 0 where nothing was found
        return Observation(score=1.0 if s is None else 1 - (1 - s) * present, feature=sight.feature)


def uncertainty(sight: Sight, scores: Sequence[str] = TRIPLET) -> float | None:
    """S of eq. 3 over the detections that count; None when there are none."""
    columns = [sight.counted[name].double() for name in scores]
    return image_score(_consistent_mean(columns)) if len(columns[0]) else None


def _consistent_mean(columns: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 2 over as many scores as there are, (N,)."""
    if len(columns) == 3:
        return instance_scores(*columns)
    stacked = torch.stack(columns)
    return torch.exp(-stacked.std(dim=0, correction=0)) * stacked.mean(dim=0)
