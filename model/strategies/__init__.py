"""Which unlabelled images people should annotate next: the paper's strategies, one file each, behind one interface."""

from model.strategies.base import Observation, Observations, Sight, Strategy, look
from model.strategies.class_entropy import ClassEntropy
from model.strategies.core_set import CoreSet
from model.strategies.hybrid import Hybrid
from model.strategies.learning_loss import LearningLoss
from model.strategies.mc_dropout import MCDropout
from model.strategies.random import Random
from model.strategies.tsp import TSP, ExpectedTSP, PresentTSP, TSPWithoutBox, TSPWithoutBoxAndMask

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Random(),
        MCDropout(),
        CoreSet(),
        ClassEntropy(),
        LearningLoss(),
        TSP(),
        TSPWithoutBox(),
        TSPWithoutBoxAndMask(),
        ExpectedTSP(),
        PresentTSP(),
        Hybrid(),
    )
}

__all__ = ["STRATEGIES", "Observation", "Observations", "Sight", "Strategy", "look"]
