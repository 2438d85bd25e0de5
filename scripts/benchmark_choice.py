"""Algorithm 1, lines 7 to 10: what people annotate next, and what the network labels itself. Sees no hidden label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from model.comparison import compare
from model.config import PseudoLabelConfig
from model.dataset import load_image
from model.empty_images import EmptyImagePolicy
from model.network import MaskRCNNWithScores
from model.pseudo_labels import class_thresholds, image_with_trusted, with_score_threshold
from model.strategies import Observation, Strategy, look
from model.types import Detections, FloatArray, LabeledImage
from scripts.benchmark_lines import Experiment


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The b images for people, the first one first; D_semi from the rest, by `trust`, with its thresholds by class, if
    there are any; and how the scores were spread."""

    new_ids: list[str]
    pseudo: list[LabeledImage]
    trust: PseudoLabelConfig
    class_thresholds: FloatArray | None
    queue: dict[str, Any]


def choose_next(
    network: MaskRCNNWithScores,
    strategy: Strategy,
    settings: Experiment,
    *,
    labelled: Mapping[str, Path],
    unlabelled: Mapping[str, Path],
    annotate: Callable[[Sequence[str]], Sequence[LabeledImage]],
    semi_supervised: bool,
    seed: int,
    on_look: Callable[[], object] = lambda: None,
) -> Choice:
    """Score D_u, choose b, pseudo-label the rest. Images are files by id: what is in them, only the network says.

    The chosen ones are then annotated: what the network had seen in them tells how far it can be trusted. `on_look` is
    called after each image.
    """
    torch.manual_seed(seed)  # MC dropout draws; how the training went must not matter
    selection = settings.selection
    observed = partial(
        _Observations, network=network, strategy=strategy, queue_threshold=selection.queue_threshold, on_look=on_look
    )
    pool = observed(unlabelled, keep=settings.pseudo if semi_supervised else None)
    if semi_supervised:
        pool.look_at_all()
    chosen = strategy.choose(
        pool,
        observed(labelled),
        settings.batch,
        seed=seed,
        empty_policy=EmptyImagePolicy(selection.empty_policy),
    ).tolist()
    ids = list(unlabelled)
    new_ids = [ids[i] for i in chosen]
    thresholds = _class_thresholds(list(pool.found.values()), settings.pseudo, network)
    trust = settings.pseudo
    if semi_supervised and trust.rule == "precision":
        config = network.config
        compared = compare(pool.found, annotate(new_ids), config.num_classes - 1, mask_threshold=config.mask_threshold)
        trust = with_score_threshold(trust, compared)
    rest = {image_id: found for image_id, found in pool.found.items() if image_id not in new_ids}
    training = replace(settings, pseudo=trust)
    return Choice(
        new_ids=new_ids,
        pseudo=_pseudo_labeled(rest, unlabelled, training, network.config.mask_threshold, thresholds),
        trust=trust,
        class_thresholds=thresholds,
        queue=pool.summary(set(chosen)),
    )


def _class_thresholds(
    found: Sequence[Detections], config: PseudoLabelConfig, network: MaskRCNNWithScores
) -> FloatArray | None:
    if not config.class_wise_thresholds or not found:
        return None
    scores, labels = (np.concatenate([getattr(d, name) for d in found]) for name in ("class_scores", "labels"))
    return class_thresholds(scores, labels, config, num_classes=network.config.num_classes - 1)


def _pseudo_labeled(
    found: Mapping[str, Detections],
    paths: Mapping[str, Path],
    settings: Experiment,
    mask_threshold: float,
    thresholds: FloatArray | None,
) -> list[LabeledImage]:
    """D_semi; for a teacher also the images without any label, at which it will look again."""
    labeled = [
        image_with_trusted(
            detections,
            settings.pseudo,
            image_id=image_id,
            path=paths[image_id],
            mask_threshold=mask_threshold,
            class_thresholds=thresholds,
        )
        for image_id, detections in found.items()
    ]
    return labeled if settings.training.ema_decay > 0 else [image for image in labeled if len(image.labels)]


class _Observations(Sequence[Observation]):
    """What a strategy keeps of images, made when it asks: nothing is looked at that it does not need.

    With `keep`, `found` has what pseudo labels may be made of, by id, of the images that were looked at.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        *,
        network: MaskRCNNWithScores,
        strategy: Strategy,
        queue_threshold: float,
        on_look: Callable[[], object],
        keep: PseudoLabelConfig | None = None,
    ) -> None:
        self.found: dict[str, Detections] = {}
        self._paths, self._network, self._strategy = list(paths.items()), network, strategy
        self._queue_threshold, self._on_look, self._keep = queue_threshold, on_look, keep
        self._known: dict[int, Observation] = {}

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Observation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Observation]: ...
    def __getitem__(self, index: int | slice) -> Observation | Sequence[Observation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._known:
            self._known[index] = self._observe(*self._paths[index])
            self._on_look()
        return self._known[index]

    def look_at_all(self) -> None:
        """Look at every image."""
        for _ in self:
            pass

    def summary(self, chosen: set[int]) -> dict[str, Any]:
        """The scores of the chosen and of the other images that were looked at, if the strategy gives any."""
        parts: dict[str, list[float | None]] = {"chosen": [], "rest": []}
        for index, observation in self._known.items():
            parts["chosen" if index in chosen else "rest"].append(observation.score)
        return {part: _summary(scores) for part, scores in parts.items()}

    def _observe(self, image_id: str, path: Path) -> Observation:
        sight, detections = look(self._network, load_image(path), queue_threshold=self._queue_threshold)
        if self._keep is not None:
            self.found[image_id] = _perhaps_trusted(detections, self._keep)
        return self._strategy.observe(sight)


def _perhaps_trusted(detections: Detections, config: PseudoLabelConfig) -> Detections:
    """Without those that can neither be trusted nor ignored nor count for the thresholds by class: there are many."""
    if config.rule != "and":
        return detections
    least = min(config.class_threshold, config.class_threshold_floor, config.ignore_threshold)
    return detections.select(detections.class_scores >= least)


def _summary(scores: list[float | None]) -> dict[str, Any]:
    known = [score for score in scores if score is not None]
    result: dict[str, Any] = {"images": len(scores), "without_score": len(scores) - len(known)}
    if known:
        quantiles = np.quantile(known, [0, 0.25, 0.5, 0.75, 1])
        result |= {"mean": float(np.mean(known)), "quartiles": [float(value) for value in quantiles]}
    return result
