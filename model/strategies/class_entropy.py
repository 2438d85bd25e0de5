"""Class entropy: the mean softmax entropy over the detections of an image; the highest is annotated first."""

import math

import torch

from model.strategies.base import Observation, Sight, Strategy, mean_or_none


class ClassEntropy(Strategy):
    """The score is one minus the mean entropy, in units of its largest value, log(C)."""

    name = "class_entropy"

    def observe(self, sight: Sight) -> Observation:
        probabilities = sight.counted["class_probabilities"].double()
        entropy = -torch.xlogy(probabilities, probabilities).sum(dim=1) / math.log(probabilities.shape[1])
        return Observation(score=mean_or_none(1 - entropy), feature=sight.feature)
