"""Algorithm 1 on a COCO set with an oracle: one run of one strategy and seed, resumable at any moment.

A run's folder holds `run.json`, what is known so far cycle by cycle, and while it trains with pseudo labels the
checkpoint of that. Networks that were trained without lie in a folder that all runs share (docs/decisions/017).
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.calibration import fit_calibration
from model.comparison import compare
from model.config import NetworkConfig, TrainingConfig
from model.dataset import LabeledSet, fitting_anchors, load_annotated
from model.files import write_json
from model.network import MaskRCNNWithScores, build_model
from model.registry import ModelCard, Registry
from model.strategies import STRATEGIES, Sight, look
from model.strategies.core_set import k_centre_greedy
from model.train import Progress, train
from model.types import Detections, LabeledImage
from scripts.benchmark_choice import choose_next
from scripts.benchmark_clock import Seconds, Stopwatch, timed
from scripts.benchmark_lines import (
    FULL,
    Experiment,
    RunName,
    settings_of,
    strategy_of,
    supervised_settings,
    without_semi_supervision,
)
from scripts.benchmark_measures import iou_pairs, measured, pseudo_quality
from scripts.benchmark_runs import read_run
from scripts.benchmark_sets import Data, at_input_size
from scripts.benchmark_signs import SignsOfLife
from scripts.shared_files import locked

KEPT = "network"  # the folder of a run, in the form of a registry, where its last network is kept on demand

Plan = dict[str, Any]
_NO_PSEUDO_LABELS: Plan = {
    "pseudo": [],
    "pseudo_quality": None,
    "class_thresholds": None,
    "score_threshold": None,
    "held_out": None,
}


def run(
    name: RunName,
    experiment: Experiment,
    data: Data,
    folder: Path,
    shared: Path,
    *,
    device: str = "cpu",
    deadline: float = float("inf"),
    keep_network: bool = False,
) -> None:
    """Carry a run to its end from wherever it is; no new cycle starts after `deadline` (by `time.monotonic`).

    `shared` keeps the networks of all cycles without pseudo labels, which lines that have chosen the same images in the
    same order train once, and the pool at the size that the network sees. With `keep_network`, the last cycle's network
    stays in the run's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _load(folder, name, experiment, data)
    cycles = _Cycles(name, experiment, data, folder=folder, shared=shared, device=device, keep_network=keep_network)
    _remove_checkpoint(folder, len(state["cycles"]))
    while len(state["cycles"]) < cycles.total and time.monotonic() < deadline:
        number = len(state["cycles"]) + 1
        cycle, following = cycles.carry_out(number, state.pop("next", None))
        state["cycles"].append(cycle)
        if following is not None:
            state["next"] = following  # in the same file as the cycle that made it: never one without the other
        write_json(folder / "run.json", state)
        _remove_checkpoint(folder, number)
        done = f"cycle {number} of {cycles.total}: {cycle['annotated_images']} images, mAP@0.5 {cycle['map_50']:.3f}"
        print(f"{name.folder}, {done}\n", end="", flush=True)  # in one piece: other processes print as well


def cycles_done(name: RunName, experiment: Experiment, data: Data, folder: Path) -> tuple[int, int]:
    """How many cycles are done, and of how many. ValueError when the run was made with other settings or images."""
    return len(_load(folder, name, experiment, data)["cycles"]), _total(name, experiment)


def first_batch(pool: LabeledSet, size: int, seed: int) -> list[str]:
    """The random images that every strategy starts with at this seed."""
    order = np.random.default_rng((seed, 0)).permutation(len(pool.images))
    return [pool.images[i].image_id for i in order[:size]]


def anchors_for(pool: LabeledSet, experiment: Experiment) -> tuple[int, ...]:
    """Anchor sizes that fit the pool's instances."""
    return fitting_anchors(pool.images, NetworkConfig.for_profile(experiment.profile, 2, **experiment.network))


def _total(name: RunName, experiment: Experiment) -> int:
    return 1 if name.strategy == FULL else experiment.cycles


def _load(folder: Path, name: RunName, experiment: Experiment, data: Data) -> dict[str, Any]:
    settings = {
        **asdict(experiment),
        "data": data.name,
        "crop": data.crop,
        "pool": data.fingerprints[0],
        "test": data.fingerprints[1],
        "pool_images": len(data.pool.images),
        "pool_instances": sum(len(image.labels) for image in data.pool.images),
        "test_images": len(data.test.images),
        **({"random_split": True} if data.random_split else {}),  # runs that do not say it are older, or have none
    }
    settings = json.loads(json.dumps(settings))
    path = folder / "run.json"
    if not path.exists():
        classes = enumerate(data.test.class_names, start=1)
        return {
            **asdict(name),
            "options": dict(name.options),
            "line": name.line,
            "settings": settings,
            "test_instances": {n: [int((i.labels == k).sum()) for i in data.test.images] for k, n in classes},
            "cycles": [],
        }
    state = read_run(path)
    if differing := _differing(state["settings"], settings):
        raise ValueError(
            f"{path} was made with other settings or images ({', '.join(differing)}): choose another --out, or delete "
            f"the folder {folder}"
        )
    return state


def _differing(kept: dict[str, Any], wanted: dict[str, Any], within: str = "") -> list[str]:
    """The names of settings that differ, such as training.epochs."""
    names = []
    for name in sorted({*kept, *wanted}):
        old, new = kept.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differing(old, new, f"{within}{name}.")
        elif old != new:
            names.append(within + name)
    return names


class _Cycles:
    """The cycles of one run."""

    def __init__(
        self,
        name: RunName,
        experiment: Experiment,
        data: Data,
        *,
        folder: Path,
        shared: Path,
        device: str,
        keep_network: bool,
    ) -> None:
        self.name, self.data, self.folder, self.shared, self.device = name, data, folder, shared, device
        self.keep_network = keep_network
        self.settings = settings_of(name, experiment)
        self.total = _total(name, experiment)
        options = {} if name.strategy == FULL else STRATEGIES[name.strategy].network_options
        self.network_options = {**experiment.network, **options}
        network = NetworkConfig.for_profile(experiment.profile, len(data.pool.class_names) + 1, **self.network_options)
        self.mask_threshold = network.mask_threshold
        self.small, self.vertices = at_input_size(data, network, shared)
        self.original = {image.image_id: image for image in data.pool.images}
        self.signs = SignsOfLife(name.folder)

    def carry_out(self, number: int, plan: Plan | None) -> tuple[dict[str, Any], Plan | None]:
        """Train on what is annotated (and pseudo-labelled), measure, and choose what comes next.

        `plan` is what the cycle before has chosen; returns the measurements and the next cycle's plan, if there is one.
        """
        self.signs.begin(f"cycle {number} of {self.total}")
        plan = plan or self._first_plan(number)
        images = [self.small[image_id] for image_id in plan["annotated"]]
        if plan["pseudo"]:
            pseudo = [self._pseudo_from_json(item) for item in plan["pseudo"]]
            network, training = self._trained(
                [*images, *pseudo],
                self.settings.training,
                _checkpoint(self.folder, number),
                plan["class_thresholds"],
                plan["score_threshold"],
            )
            measurements, evaluation = self._measured(network, plan["held_out"])
            seconds = {"training": training, "evaluation": evaluation}
        else:
            network, measurements, seconds = self._shared_cycle(images, plan["held_out"])
        result = {"number": number, **self._counts(plan), **measurements, "seconds": seconds}
        if number == self.total:
            if self.keep_network:
                self._keep(number, network)
            return result, None
        with timed(seconds, "scoring"):
            following, result["queue"] = self._next_plan(number, network, plan["annotated"])
        return result, self._with_truth(network, following)

    def _first_plan(self, number: int) -> Plan:
        """What the first cycle trains on."""
        if number > 1:
            raise ValueError(f"{self.folder}/run.json does not say what cycle {number} trains on: delete the folder")
        if self.name.strategy == FULL:
            chosen = list(self.original)
        elif self.settings.selection.first == "spread":
            chosen = self._spread_batch()
        else:
            chosen = first_batch(self.data.pool, self.settings.first_batch, self.name.seed)
        return {"annotated": chosen, "new": len(chosen), **_NO_PSEUDO_LABELS}

    def _spread_batch(self) -> list[str]:
        """One random image, then each the farthest from those before it, by the pretrained body's features."""
        # What the untrained heads find does not matter.
        few = {"proposals_inference": 1, "detections_per_image": 1}
        network = self._built({**self.network_options, **few}).to(self.device).eval()
        looks = self._looks(network, list(self.small.values()), "spreading the first batch, image")
        features = np.stack([sight.feature for _, sight, _ in looks])
        [start] = first_batch(self.data.pool, 1, self.name.seed)
        ids = list(self.small)
        centre = ids.index(start)
        others = [i for i in range(len(ids)) if i != centre]
        farthest = k_centre_greedy(features[others], features[[centre]], self.settings.first_batch - 1)
        return [start, *(ids[others[i]] for i in farthest)]

    def _built(self, options: dict[str, Any]) -> MaskRCNNWithScores:
        torch.manual_seed(self.name.seed)
        classes = len(self.data.pool.class_names) + 1
        return build_model(self.settings.profile, classes, weights=self.settings.weights, **options)

    def _trained(
        self,
        images: Sequence[LabeledImage],
        config: TrainingConfig,
        checkpoint: Path,
        class_thresholds: list[float] | None = None,
        score_threshold: float | None = None,
    ) -> tuple[MaskRCNNWithScores, Seconds | None]:
        network = self._built(self.network_options)
        stopwatch = Stopwatch(checkpoint.with_suffix(".json"), config.checkpoint_every_steps)
        teaches = config.ema_decay > 0 and any(image.pseudo for image in images)
        trust = self.settings.pseudo
        if score_threshold is not None:
            trust = replace(trust, score_threshold=score_threshold)

        def on_step(progress: Progress) -> None:
            stopwatch.on_step(progress)
            self.signs.give("training, step", progress.step, progress.steps)

        train(
            network,
            images,
            config,
            pseudo=trust if teaches else None,
            class_thresholds=np.array(class_thresholds) if teaches and class_thresholds is not None else None,
            checkpoint=checkpoint,
            device=self.device,
            on_step=on_step,
        )
        return network.eval(), stopwatch.seconds()

    def _shared_cycle(
        self, images: Sequence[LabeledImage], held_out: dict[str, list[float]] | None
    ) -> tuple[MaskRCNNWithScores, dict[str, Any], dict[str, Any]]:
        """The network, measurements and seconds of a cycle without pseudo labels.

        Which line has chosen the images does not matter: whoever comes first trains and measures for all.
        """
        checkpoint = self.shared / f"{self._digest_of_training(images)}.safetensors"
        record = checkpoint.with_name(f"{checkpoint.stem}-{_digest(held_out)}.json")
        # Who comes second waits, and then has nothing left to do.
        with locked(checkpoint.with_suffix(".lock"), on_wait=self.signs.wait):
            config = without_semi_supervision(self.settings.training)
            network, training = self._trained(images, config, checkpoint)
            if not record.exists():
                measurements, evaluation = self._measured(network, held_out)
                seconds = {"training": training, "evaluation": evaluation}
                write_json(record, {"measurements": measurements, "seconds": seconds})
            known = json.loads(record.read_text())
        return network, known["measurements"], known["seconds"]

    def _digest_of_training(self, images: Sequence[LabeledImage]) -> str:
        """Tells trainings without pseudo labels apart; the version of this code is not in it."""
        weights = Path(self.settings.weights)
        return _digest(
            {
                "settings": supervised_settings(self.settings),
                "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
                "network": self.network_options,
                "images": [image.image_id for image in images],  # the order decides which come together in a step
                "data": self.data.fingerprints,
                "device": torch.device(self.device).type,
            }
        )

    def _keep(self, number: int, network: MaskRCNNWithScores) -> None:
        card = ModelCard(
            version=f"cycle-{number}",
            network=network.config.to_json(),
            class_names=self.data.pool.class_names,
            created_at=datetime.now(UTC).isoformat(),
            data_fingerprint=self.data.fingerprints[0],
        )
        Registry(self.folder).add(KEPT, card, network)

    def _counts(self, plan: Plan) -> dict[str, Any]:
        """What people have annotated until now, and what the model has labelled itself for this training."""
        annotated = [self.original[image_id] for image_id in plan["annotated"]]
        new = annotated[len(annotated) - plan["new"] :]
        classes = enumerate(self.data.pool.class_names, start=1)
        return {
            "annotated_images": len(annotated),
            "annotated_instances": sum(len(image.labels) for image in annotated),
            "annotated_vertices": sum(self.vertices[image.image_id] for image in annotated),
            "annotated_by_class": {n: int(sum((i.labels == k).sum() for i in annotated)) for k, n in classes},
            "new_images": len(new),
            "new_empty_images": sum(len(image.labels) == 0 for image in new),
            "annotated": [image.image_id for image in new],
            "pseudo_images": sum(bool(item["labels"]) for item in plan["pseudo"]),
            "pseudo_quality": plan["pseudo_quality"],
            "score_threshold": plan["score_threshold"],
        }

    def _measured(
        self, network: MaskRCNNWithScores, held_out: dict[str, list[float]] | None = None
    ) -> tuple[dict[str, Any], Seconds]:
        """Against the ground truth at the images' own size.

        `held_out` are predicted and true mask IoUs by the network before, of the images that people annotated then: the
        only ones whose truth is known and which a network of this run has not learnt from.
        """
        seconds: dict[str, Any] = {}
        calibrate = None
        if held_out is not None:
            calibrate = fit_calibration(np.array(held_out["mask_scores"]), np.array(held_out["mask_ious"]))
        with timed(seconds, "evaluation"):
            looks = self._looks(network, self.data.test.images, "measuring, image")
            found = {image_id: detections for image_id, _, detections in looks}
            names = self.data.test.class_names
            compared = compare(found, self.data.test.images, len(names), mask_threshold=self.mask_threshold)
            measurements = measured(compared, names, calibrate)
        return measurements, seconds["evaluation"]

    def _looks(
        self, network: MaskRCNNWithScores, images: Sequence[LabeledImage], stage: str
    ) -> Iterator[tuple[str, Sight, Detections]]:
        """What the network sees in each image, by its id."""
        for done, image in enumerate(images, start=1):
            sight, found = look(network, load_annotated(image), queue_threshold=self.settings.selection.queue_threshold)
            self.signs.give(stage, done, len(images))
            yield image.image_id, sight, found

    def _next_plan(
        self, number: int, network: MaskRCNNWithScores, annotated_ids: list[str]
    ) -> tuple[Plan, dict[str, Any]]:
        """What the next cycle trains on, as far as it is known without hidden labels. Also a summary of the scores."""
        annotated = set(annotated_ids)
        paths = {image_id: image.path for image_id, image in self.small.items()}
        looked = count(1)
        choice = choose_next(
            network,
            strategy_of(self.name, self.settings.selection),
            self.settings,
            labelled={image_id: path for image_id, path in paths.items() if image_id in annotated},
            unlabelled={image_id: path for image_id, path in paths.items() if image_id not in annotated},
            annotate=lambda ids: [self.small[image_id] for image_id in ids],
            semi_supervised=self.name.semi_supervised,
            seed=self.name.seed * 1000 + number,
            on_look=lambda: self.signs.give("choosing what comes next, image", next(looked)),
        )
        thresholds = choice.class_thresholds
        plan = {
            "annotated": [*annotated_ids, *choice.new_ids],
            "new": len(choice.new_ids),
            "pseudo": [_pseudo_to_json(image) for image in choice.pseudo],
            "class_thresholds": None if thresholds is None else thresholds.tolist(),
            "score_threshold": choice.trust.score_threshold if choice.trust.rule == "precision" else None,
        }
        return plan, choice.queue

    def _with_truth(self, network: MaskRCNNWithScores, plan: Plan) -> Plan:
        """The plan with what the hidden labels say of it, which is looked up only when everything is chosen."""
        annotated = set(plan["annotated"])
        hidden = {image_id: image for image_id, image in self.small.items() if image_id not in annotated}
        pseudo = [self._pseudo_from_json(item) for item in plan["pseudo"]]
        return {
            **plan,
            "pseudo_quality": pseudo_quality(pseudo, hidden) if self.name.semi_supervised else None,
            "held_out": self._held_out(network, plan["annotated"][len(plan["annotated"]) - plan["new"] :]),
        }

    def _held_out(self, network: MaskRCNNWithScores, new_ids: Sequence[str]) -> dict[str, list[float]]:
        """Predicted and true mask IoUs in the images that people annotate now, which the network has not learnt."""
        images = [self.small[image_id] for image_id in new_ids]
        looks = self._looks(network, images, "looking at what people annotate, image")
        found = {image_id: detections for image_id, _, detections in looks}
        compared = compare(found, images, len(self.data.pool.class_names), mask_threshold=self.mask_threshold)
        pairs = iou_pairs(compared)
        return {name: [round(float(value), 4) for value in pairs[name]] for name in ("mask_scores", "mask_ious")}

    def _pseudo_from_json(self, item: dict[str, Any]) -> LabeledImage:
        return replace(
            self.small[item["image_id"]],
            labels=np.array(item["labels"], dtype=np.int64),
            rles=tuple(item["rles"]),
            pseudo=True,
            triplets=np.array(item["triplets"], dtype=np.float64).reshape(-1, 3),
            ignored_boxes_xyxy=np.array(item["ignored_boxes_xyxy"], dtype=np.float64).reshape(-1, 4),
        )


def _pseudo_to_json(image: LabeledImage) -> dict[str, Any]:
    return {
        "image_id": image.image_id,
        "labels": image.labels.tolist(),
        "rles": list(image.rles),
        **{
            name: [] if values is None else values.tolist()
            for name, values in (("triplets", image.triplets), ("ignored_boxes_xyxy", image.ignored_boxes_xyxy))
        },
    }


def _digest(described: Any) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _checkpoint(folder: Path, number: int) -> Path:
    """Each cycle has its own, so that what an interrupted one leaves is never taken for the next one's."""
    return folder / f"checkpoint-{number}.safetensors"


def _remove_checkpoint(folder: Path, number: int) -> None:
    for suffix in (".safetensors", ".json"):
        _checkpoint(folder, number).with_suffix(suffix).unlink(missing_ok=True)
