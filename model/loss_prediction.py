"""The auxiliary module of Learning Loss: predicts an image's training loss from the feature pyramid.

Yoo and Kweon, "Learning Loss for Active Learning", CVPR 2019. Only the order of the losses is learnt, by pairs.
"""

import torch
from torch import Tensor, nn

_LEVELS = ("0", "1", "2", "3")
_WIDTH = 64


class LossPredictor(nn.Module):
    """Global average pooling, FC and ReLU for each pyramid level, then one FC over all: levels -> (B,) losses."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({level: nn.Linear(channels, _WIDTH) for level in _LEVELS})
        self.predict = nn.Linear(_WIDTH * len(_LEVELS), 1)

    def forward(self, pyramid: dict[str, Tensor]) -> Tensor:
        # Detached: the module watches the detector and must not change what it learns.
        hidden = [self.levels[level](pyramid[level].detach().mean(dim=(2, 3))).relu() for level in _LEVELS]
        predicted: Tensor = self.predict(torch.cat(hidden, dim=1))
        return predicted.squeeze(1)


def ranking_loss(predicted: Tensor, true: Tensor, *, margin: float = 1.0) -> Tensor:
    """The mean over all pairs of `max(0, margin - sign(l_i - l_j) (p_i - p_j))`, (B,), (B,) -> (); 0 without a pair."""
    if len(predicted) < 2:
        return predicted.sum() * 0
    i, j = torch.triu_indices(len(true), len(true), offset=1)
    order = torch.sign((true[i] - true[j]).detach())
    return (margin - order * (predicted[i] - predicted[j])).clamp(min=0).mean()
