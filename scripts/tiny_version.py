"""A version with a tiny network that nobody has trained: quick to load and to ask, for trials of the service."""

from collections.abc import Sequence

import torch

from ml_backend.db import utc_now
from model.network import MaskRCNNWithScores, build_model
from model.registry import ModelCard
from model.strategies import STRATEGIES


def tiny_version(
    version: str, class_names: Sequence[str], *, strategy: str = "tsp"
) -> tuple[ModelCard, MaskRCNNWithScores]:
    """Its card and its network, the same weights each time; for `Registry.add`."""
    torch.manual_seed(0)
    network = build_model(
        "efficientnet_lite0_fpn",
        len(class_names) + 1,
        weights="none",
        min_size=64,
        max_size=96,
        fpn_channels=16,
        box_head_width=32,
        mask_head_widths=(16,),
        proposals_inference=20,
        detections_per_image=5,
        **STRATEGIES[strategy].network_options,
    )
    card = ModelCard(
        version=version,
        network=network.config.to_json(),
        class_names=tuple(class_names),
        created_at=utc_now(),
        strategy=strategy,
    )
    return card, network
