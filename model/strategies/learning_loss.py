"""Learning loss: the image with the highest predicted training loss is annotated first."""

from typing import Any, ClassVar

from model.errors import InvalidInputError
from model.strategies.base import Observation, Sight, Strategy


class LearningLoss(Strategy):
    """The score falls with the loss l that the network's auxiliary module predicts: (1 - l / (1 + |l|)) / 2.

    l is any number, for only the order of the losses was learnt; this maps it to (0, 1) and keeps the order. An
    exponential would make large losses equal.
    """

    name = "learning_loss"
    network_options: ClassVar[dict[str, Any]] = {"learning_loss": True}

    def observe(self, sight: Sight) -> Observation:
        if "predicted_loss" not in sight.output:
            raise InvalidInputError(
                f"{self.name}: expected a network that predicts its loss: build it with the strategy's "
                f"network_options, {self.network_options}"
            )
        loss = float(sight.output["predicted_loss"])
        return Observation(score=(1 - loss / (1 + abs(loss))) / 2, feature=sight.feature)
