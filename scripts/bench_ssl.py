"""What pseudo labels cost: a training with them against one without, for as many steps (the paper: 5.2 against 4.8 h).

Real trainings on phantoms, with all that belongs to them: reading, flips, optimizer, checks. They are those of the
benchmark's `cpu` profile, but for their length; the body is frozen where the profile freezes a pretrained one. Pseudo
labels are those of the ground truth, and nothing is in doubt, so that all background counts where the line lets
background count. Both networks go on learning from round to round.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.dataset import TrainingSteps, read_coco
from model.errors import InvalidInputError
from model.network import MaskRCNNWithScores, build_model
from model.strategies import STRATEGIES
from model.train import train
from model.types import LabeledImage
from scripts.bench_compare import compare
from scripts.benchmark_efforts import EFFORTS
from scripts.benchmark_lines import RunName, parse_line, settings_of
from scripts.make_phantoms import CLASS_NAMES, make_phantoms

IMAGES = 8  # annotated ones, and as many with pseudo labels
TURNS = 4  # steps of one round that have pseudo-labelled images


def ssl_training(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a `line` of the benchmark, such as "tsp+ssl@pseudo_every_steps=4", whose epochs and min_steps do not
    count, with a `profile` at a `size` (pixels) in so many `rounds`. InvalidInputError for a line without pseudo
    labels, or that does not exist."""
    name = _name(options.line)
    settings = settings_of(name, EFFORTS["cpu"].experiment)
    every = settings.training.pseudo_every_steps
    training = replace(settings.training, epochs=1, min_steps=TURNS * every)
    with tempfile.TemporaryDirectory() as folder:
        make_phantoms(Path(folder), images=2 * IMAGES, size=options.size, seed=0, empty_fraction=0)
        images = read_coco(Path(folder) / "annotations.json").images
        annotated = images[:IMAGES]
        both = [*annotated, *map(_as_pseudo, images[IMAGES:])]
        ours, theirs = _network(name, options), _network(name, options)
        measured = compare(
            lambda: train(ours, both, training, pseudo=settings.pseudo),
            lambda: train(theirs, annotated, training),
            rounds=options.rounds,
        )
        steps = len(TrainingSteps(both, network=ours.config, training=training))
    setting = {key: getattr(options, key) for key in ("line", "profile", "size", "rounds", "threads")}
    return {**measured, **setting, "steps": steps, "pseudo_every_steps": every}


def _name(line: str) -> RunName:
    try:
        name = parse_line(line, seed=0)
    except ValueError as error:
        raise InvalidInputError(f"--line: {error}") from error
    if not name.semi_supervised:
        raise InvalidInputError(f"--line: expected one with pseudo labels, such as tsp+ssl, got {line!r}")
    return name


def _as_pseudo(image: LabeledImage) -> LabeledImage:
    """As if the model had labelled it, rather sure of everything."""
    triplets = np.full((len(image.labels), 3), 0.9)
    return replace(image, pseudo=True, triplets=triplets, ignored_boxes_xyxy=np.zeros((0, 4)))


def _network(name: RunName, options: argparse.Namespace) -> MaskRCNNWithScores:
    torch.manual_seed(0)
    settings = {"min_size": options.size, "max_size": options.size, **STRATEGIES[name.strategy].network_options}
    network = build_model(options.profile, len(CLASS_NAMES) + 1, frozen_batch_norm=True, **settings)
    network.freeze_stages()
    return network
