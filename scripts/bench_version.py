"""A version of an untrained network, and settings of a service that predicts with it; Label Studio is away."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from ml_backend.db import utc_now
from model.network import MaskRCNNWithScores, build_model
from model.registry import ModelCard, Registry
from scripts.make_phantoms import CLASS_NAMES

UID, KEY = "7.1700000000", "7-1700000000"
VERSION = "tsp-1-00000000"
LABEL_CONFIG = (
    '<View><Image name="image" value="$image"/><PolygonLabels name="label" toName="image">'
    + "".join(f'<Label value="{name}"/>' for name in CLASS_NAMES)
    + "</PolygonLabels></View>"
)


def environment(folder: Path, *, port: int = 0, **others: str) -> dict[str, str]:
    """Variables of a service whose Label Studio does not answer."""
    return {
        "MODEL_DIR": str(folder / "models"),
        "LABEL_STUDIO_URL": "http://127.0.0.1:1",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "PORT": str(port),
        "TSP_DEVICE": "cpu",
        **others,
    }


def add_version(
    settings: dict[str, str],
    profile: str,
    *,
    prepare: Callable[[MaskRCNNWithScores], object] = lambda _: None,
    **options: Any,
) -> MaskRCNNWithScores:
    """Put a network of seed 0, changed by `prepare`, into the registry, make it the active version, and return it."""
    torch.manual_seed(0)
    network = build_model(profile, len(CLASS_NAMES) + 1, **options)
    prepare(network)
    registry = Registry(Path(settings["MODEL_DIR"]) / "versions")
    card = ModelCard(version=VERSION, network=network.config.to_json(), class_names=CLASS_NAMES, created_at=utc_now())
    registry.add(KEY, card, network)
    registry.activate(KEY, VERSION)
    return network.eval()


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W) or (H, W, 3) BGR as PNG, inside of its address."""
    return f"data:image/png;base64,{base64.b64encode(cv2.imencode('.png', pixels)[1].tobytes()).decode()}"
