"""Algorithm 1 on a COCO set with an oracle: one run of one strategy and seed, resumable at any moment.

A run's folder holds `run.json`, what is known so far cycle by cycle, and the checkpoint of the training that goes on.
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.calibration import reliability, true_ious
from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, fitting_anchors, image_tensor, input_hw, load_image
from model.evaluate import evaluate
from model.files import write_json
from model.network import MaskRCNNWithScores, build_model
from model.predict import detections_of
from model.pseudo_labels import pseudo_labeled_image
from model.strategies import STRATEGIES, Observation
from model.strategies.base import Sight
from model.train import train
from model.types import Detections, LabeledImage

FULL = "full"  # not a strategy: everything is annotated at once, the line that the others are measured against


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all runs on a set share."""

    profile: str
    weights: str
    network: dict[str, Any]
    training: TrainingConfig
    pseudo: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    first_batch: int
    batch: int
    cycles: int


@dataclass(frozen=True, kw_only=True)
class RunName:
    """One line of the figure at one seed."""

    strategy: str
    semi_supervised: bool
    seed: int

    @property
    def line(self) -> str:
        return self.strategy + ("+ssl" if self.semi_supervised else "")

    @property
    def folder(self) -> str:
        return f"{self.line}-seed{self.seed}"


def run(name: RunName, experiment: Experiment, pool: LabeledSet, test: LabeledSet, folder: Path, shared: Path) -> None:
    """Carry a run to its end from wherever it is. `shared` keeps first cycles, which many runs have in common."""
    folder.mkdir(parents=True, exist_ok=True)
    state = _load(folder, name, experiment, pool, test)
    total = 1 if name.strategy == FULL else experiment.cycles
    _checkpoint(folder, len(state["cycles"])).unlink(missing_ok=True)
    while len(state["cycles"]) < total:
        number = len(state["cycles"]) + 1
        cycle, following = _cycle(number, name, experiment, pool, test, state.pop("next", None), folder, shared)
        state["cycles"].append(cycle)
        if following is not None:
            state["next"] = following  # in the same file as the cycle that made it: never one without the other
        write_json(folder / "run.json", state)
        _checkpoint(folder, number).unlink(missing_ok=True)


def is_finished(name: RunName, experiment: Experiment, pool: LabeledSet, test: LabeledSet, folder: Path) -> bool:
    """Whether nothing is left to do. Raises ValueError when the run was made with other settings or images."""
    total = 1 if name.strategy == FULL else experiment.cycles
    return len(_load(folder, name, experiment, pool, test)["cycles"]) >= total


def first_batch(pool: LabeledSet, size: int, seed: int) -> list[str]:
    """The random images that every strategy starts with at this seed."""
    order = np.random.default_rng((seed, 0)).permutation(len(pool.images))
    return [pool.images[i].image_id for i in order[:size]]


def _checkpoint(folder: Path, number: int) -> Path:
    """Each cycle has its own, so that what an interrupted one leaves is never taken for the next one's."""
    return folder / f"checkpoint-{number}.safetensors"


def _load(folder: Path, name: RunName, experiment: Experiment, pool: LabeledSet, test: LabeledSet) -> dict[str, Any]:
    settings = {
        **asdict(experiment),
        "pool": _fingerprint(pool),
        "test": _fingerprint(test),
        "pool_images": len(pool.images),
        "test_images": len(test.images),
    }
    settings = json.loads(json.dumps(settings))
    path = folder / "run.json"
    if not path.exists():
        return {**asdict(name), "line": name.line, "settings": settings, "cycles": []}
    state: dict[str, Any] = json.loads(path.read_text())
    if state["settings"] != settings:
        raise ValueError(f"{path} was made with other settings or images: choose another --out, or delete it")
    return state


def _cycle(
    number: int,
    name: RunName,
    experiment: Experiment,
    pool: LabeledSet,
    test: LabeledSet,
    plan: dict[str, Any] | None,
    folder: Path,
    shared: Path,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Train on what is annotated (and pseudo-labelled), measure, and choose what comes next.

    `plan` is what the cycle before has chosen; returns the measurements and the next cycle's plan, if there is one.
    """
    by_id = {image.image_id: image for image in pool.images}
    plan = plan or _first_plan(number, name, experiment, pool)
    annotated = [by_id[image_id] for image_id in plan["annotated"]]
    pseudo = [_pseudo_from_json(item, by_id) for item in plan["pseudo"]]
    started = time.process_time()
    network = _trained(number, name, experiment, pool, annotated, pseudo, folder, shared)
    seconds = time.process_time() - started
    found = {image.image_id: _look(network, image)[1] for image in test.images}
    result = {
        "number": number,
        "annotated_images": len(annotated),
        "annotated_instances": sum(len(image.labels) for image in annotated),
        "pseudo_images": len(pseudo),
        "pseudo_quality": plan["pseudo_quality"],
        "training_cpu_seconds": round(seconds, 1),
        "annotated": plan["annotated"][len(plan["annotated"]) - plan["new"] :],
        **_measured(network, found, test),
    }
    if name.strategy == FULL or number == experiment.cycles:
        return result, None
    return result, _next_plan(number, name, experiment, pool, network, plan["annotated"])


def _first_plan(number: int, name: RunName, experiment: Experiment, pool: LabeledSet) -> dict[str, Any]:
    """What the first cycle trains on."""
    if number > 1:
        raise ValueError(f"{name.folder}/run.json does not say what cycle {number} trains on: delete the folder")
    if name.strategy == FULL:
        chosen = [image.image_id for image in pool.images]
    else:
        chosen = first_batch(pool, experiment.first_batch, name.seed)
    return {"annotated": chosen, "new": len(chosen), "pseudo": [], "pseudo_quality": None}


def _trained(
    number: int,
    name: RunName,
    experiment: Experiment,
    pool: LabeledSet,
    annotated: Sequence[LabeledImage],
    pseudo: Sequence[LabeledImage],
    folder: Path,
    shared: Path,
) -> MaskRCNNWithScores:
    options = {} if name.strategy == FULL else STRATEGIES[name.strategy].network_options
    torch.manual_seed(name.seed)
    network = build_model(
        experiment.profile,
        len(pool.class_names) + 1,
        weights=experiment.weights,
        **{**experiment.network, **options},
    )
    config = replace(experiment.training, seed=name.seed)
    if number > 1 or name.strategy == FULL:
        train(network, [*annotated, *pseudo], config, checkpoint=_checkpoint(folder, number))
        return network.eval()
    digest = hashlib.sha256(json.dumps([asdict(experiment), options, name.seed, _fingerprint(pool)]).encode())
    shared.mkdir(parents=True, exist_ok=True)
    checkpoint = shared / f"{digest.hexdigest()[:16]}.safetensors"
    with checkpoint.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and then has nothing left to train
        train(network, annotated, config, checkpoint=checkpoint)
    return network.eval()


def _look(network: MaskRCNNWithScores, image: LabeledImage) -> tuple[Sight, Detections]:
    pixels = load_image(image.path)
    tensor = image_tensor(pixels, input_hw(image.image_hw, network.config))
    with torch.inference_mode():
        output = network([tensor])[0]
    found = detections_of(output, input_hw=tensor.shape[-2:], image_hw=image.image_hw)
    return Sight(network=network, image=tensor, output=output), found


def _next_plan(
    number: int,
    name: RunName,
    experiment: Experiment,
    pool: LabeledSet,
    network: MaskRCNNWithScores,
    annotated_ids: list[str],
) -> dict[str, Any]:
    """Algorithm 1, lines 7 to 10: score D_u, choose b, pseudo-label the rest."""
    strategy = STRATEGIES[name.strategy]
    annotated = set(annotated_ids)
    unlabelled = [image for image in pool.images if image.image_id not in annotated]
    torch.manual_seed(name.seed * 1000 + number)  # MC dropout draws; how the training went must not matter
    observations: list[Observation] = []
    pseudo: dict[str, LabeledImage] = {}
    for image in unlabelled:
        sight, found = _look(network, image)
        observations.append(strategy.observe(sight))
        if name.semi_supervised:
            labeled = pseudo_labeled_image(
                found,
                experiment.pseudo,
                image_id=image.image_id,
                path=image.path,
                mask_threshold=network.config.mask_threshold,
            )
            if labeled is not None:
                pseudo[image.image_id] = labeled
    labelled = [strategy.observe(_look(network, i)[0]) for i in pool.images if i.image_id in annotated]
    chosen = strategy.choose(observations, labelled, experiment.batch, seed=name.seed * 1000 + number)
    new_ids = [unlabelled[i].image_id for i in chosen]
    rest = [
        pseudo[image.image_id] for image in unlabelled if image.image_id in pseudo and image.image_id not in new_ids
    ]
    return {
        "annotated": [*annotated_ids, *new_ids],
        "new": len(new_ids),
        "pseudo": [{"image_id": p.image_id, "labels": p.labels.tolist(), "rles": list(p.rles)} for p in rest],
        "pseudo_quality": _pseudo_quality(rest, unlabelled, new_ids),
    }


def _pseudo_quality(pseudo: Sequence[LabeledImage], unlabelled: Sequence[LabeledImage], new_ids: list[str]) -> Any:
    """Precision and recall of the pseudo labels against the hidden ground truth, at mask IoU 0.5 and equal class."""
    from pycocotools import mask as coco_mask

    truth = {image.image_id: image for image in unlabelled if image.image_id not in new_ids}
    hits = made = 0
    for image in pseudo:
        true = truth[image.image_id]
        made += len(image.labels)
        free = set(range(len(true.labels)))
        ious = coco_mask.iou([dict(r) for r in image.rles], [dict(r) for r in true.rles], [0] * len(true.rles))
        for i, label in enumerate(image.labels):
            fitting = [j for j in free if true.labels[j] == label and ious[i][j] >= 0.5]
            if fitting:
                hits += 1
                free.remove(max(fitting, key=lambda j: ious[i][j]))
    hidden = sum(len(image.labels) for image in truth.values())
    return {
        "instances": made,
        "precision": hits / made if made else None,
        "recall": hits / hidden if hidden else None,
    }


def _measured(network: MaskRCNNWithScores, found: dict[str, Detections], test: LabeledSet) -> dict[str, Any]:
    threshold = network.config.mask_threshold
    by_class_score = evaluate(found, test.images, test.class_names, mask_threshold=threshold)
    rescored = {k: replace(d, class_scores=d.class_scores * d.mask_scores) for k, d in found.items()}
    by_product = evaluate(rescored, test.images, test.class_names, mask_threshold=threshold)
    ious = true_ious(found, test.images, mask_threshold=threshold)
    return {
        **asdict(by_class_score),
        "rescored_map_50": by_product.map_50,
        "rescored_map_50_95": by_product.map_50_95,
        "box_reliability": asdict(reliability(ious["box_scores"], ious["box_ious"])),
        "mask_reliability": asdict(reliability(ious["mask_scores"], ious["mask_ious"])),
    }


def _pseudo_from_json(item: dict[str, Any], by_id: dict[str, LabeledImage]) -> LabeledImage:
    image = by_id[item["image_id"]]
    return replace(image, labels=np.array(item["labels"], dtype=np.int64), rles=tuple(item["rles"]), pseudo=True)


def _fingerprint(dataset: LabeledSet) -> str:
    content = json.dumps([[i.image_id, i.labels.tolist(), [r["counts"] for r in i.rles]] for i in dataset.images])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def anchors_for(pool: LabeledSet, experiment: Experiment) -> tuple[int, ...]:
    """Anchor sizes that fit the pool's instances."""
    network = build_model(experiment.profile, 2, **experiment.network)
    return fitting_anchors(pool.images, network.config)
