"""A tiny experiment, and what a run of it leaves, for the tests of the benchmark."""

import json
from pathlib import Path
from typing import Any

from model.config import PseudoLabelConfig, TrainingConfig
from scripts.benchmark_lines import Experiment
from tests.model.examples import TINY

SMALL = {**TINY, "trainable_stages": 0, "detections_per_image": 8}
EXPERIMENT = Experiment(
    profile="efficientnet_lite0_fpn",
    weights="imagenet",
    network=SMALL,
    training=TrainingConfig.for_cpu(epochs=1, min_steps=3, batch_size=2, checkpoint_every_steps=1),
    pseudo=PseudoLabelConfig(class_threshold=0, box_threshold=0, mask_threshold=0),
    first_batch=3,
    batch=2,
    cycles=2,
)


def without_seconds(path: Path) -> dict[str, Any]:
    """A run.json without what differs from run to run."""
    state: dict[str, Any] = json.loads(path.read_text())
    for cycle in state["cycles"]:
        for clocks in cycle.pop("seconds").values():
            # None: it was killed between its last checkpoint and the note of how long it took.
            assert clocks is None or min(clocks["cpu"], clocks["wall"]) >= 0
    return state
