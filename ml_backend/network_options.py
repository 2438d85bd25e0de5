"""What settings, strategy and annotated images ask of the network that a cycle builds."""

from collections.abc import Sequence
from typing import Any

from ml_backend.settings import Settings
from model.config import NetworkConfig
from model.dataset import fitting_anchors
from model.strategies import STRATEGIES
from model.types import LabeledImage


def network_options(settings: Settings, training_images: Sequence[LabeledImage] = ()) -> dict[str, Any]:
    """What they change of the profile's defaults (fields of NetworkConfig)."""
    most = max((len(image.labels) for image in training_images), default=0)
    options: dict[str, Any] = {
        "score_threshold": settings.score_threshold,
        "detections_per_image": settings.detections_per_image or max(100, 2 * most),
        **STRATEGIES[settings.strategy].network_options,
        **settings.network_sizes(),
    }
    if most and "anchor_sizes" not in options:
        config = NetworkConfig.for_profile(settings.profile, 2, **options)
        options["anchor_sizes"] = fitting_anchors(training_images, config)
    return options
