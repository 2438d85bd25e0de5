"""What pseudo labels cost: a training with them against one without, for as many steps (the paper: 5.2 against 4.8 h).

Real trainings on phantoms of a few files, with all that belongs to them: reading, flips, optimizer, checks. The body is
frozen where the profile freezes a pretrained one. Both networks go on learning from round to round.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import TrainingConfig
from model.dataset import read_coco
from model.errors import InvalidInputError
from model.network import MaskRCNNWithScores, build_model
from model.train import train
from model.types import LabeledImage
from scripts.bench_compare import compare
from scripts.benchmark import EFFORTS
from scripts.benchmark_lines import parse_line, settings_of
from scripts.make_phantoms import CLASS_NAMES, make_phantoms

IMAGES = 8  # annotated ones, and as many with pseudo labels
TURNS = 4  # pseudo-labelled images in one round


def ssl_training(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a line of the benchmark, such as "tsp+ssl@pseudo_every_steps=4"; `profile`, `size` (pixels), `rounds`."""
    training = _training(options.line)
    with tempfile.TemporaryDirectory() as folder:
        make_phantoms(Path(folder), images=2 * IMAGES, size=options.size, seed=0, empty_fraction=0)
        images = read_coco(Path(folder) / "annotations.json").images
        annotated = images[:IMAGES]
        both = [*annotated, *map(_as_pseudo, images[IMAGES:])]
        ours, theirs = _network(options), _network(options)
        measured = compare(
            lambda: train(ours, both, training), lambda: train(theirs, annotated, training), rounds=options.rounds
        )
    setting = {name: getattr(options, name) for name in ("line", "profile", "size", "rounds", "threads")}
    return {**measured, **setting, "steps": training.min_steps, "pseudo_every_steps": training.pseudo_every_steps}


def _training(line: str) -> TrainingConfig:
    """The line's settings, for so many steps that there is a pseudo-labelled image in TURNS of them."""
    try:
        name = parse_line(line, seed=0)
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    if not name.semi_supervised:
        raise InvalidInputError(f"--line: expected one with pseudo labels, such as tsp+ssl, got {line!r}")
    training = settings_of(name, EFFORTS["cpu"].experiment).training
    return replace(training, epochs=1, min_steps=TURNS * training.pseudo_every_steps)


def _as_pseudo(image: LabeledImage) -> LabeledImage:
    """As if the model had labelled it, rather sure of everything."""
    return replace(
        image,
        pseudo=True,
        triplets=np.full((len(image.labels), 3), 0.9),
        ignored_boxes_xyxy=np.zeros((0, 4)),
    )


def _network(options: argparse.Namespace) -> MaskRCNNWithScores:
    torch.manual_seed(0)
    sides = {"min_size": options.size, "max_size": options.size}
    network = build_model(options.profile, len(CLASS_NAMES) + 1, frozen_batch_norm=True, **sides)
    network.freeze_stages()
    return network
