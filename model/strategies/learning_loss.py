"""Learning loss: the image with the highest predicted training loss is annotated first."""

from typing import Any, ClassVar

from model.strategies.base import Observation, Sight, Strategy


class LearningLoss(Strategy):
    """The score is minus the loss that the network's auxiliary module predicts."""

    name = "learning_loss"
    network_options: ClassVar[dict[str, Any]] = {"learning_loss": True}

    def observe(self, sight: Sight) -> Observation:
        return Observation(score=-float(sight.output["predicted_loss"]), feature=sight.feature)
