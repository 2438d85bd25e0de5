"""What a strategy is: it looks at each image once, keeps a few numbers, and chooses from these."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.dataset import image_tensor, input_hw
from model.empty_images import EmptyImagePolicy, empty_image_score
from model.errors import InvalidInputError
from model.network import MaskRCNNWithScores
from model.predict import detections_of, outputs_in_memory
from model.types import Detections, FloatArray, IntArray

# What the network says of each detection; the rest of its output is about the whole image.
_OF_DETECTIONS = ("boxes", "labels", "scores", "box_scores", "mask_scores", "roi_masks", "class_probabilities")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is kept of one image: `score` in [0, 1] (the lowest is annotated first; None: the model found nothing to
    score) and `feature` (F,), for strategies that compare images."""

    score: float | None
    feature: FloatArray


class Observations(Sequence[Observation]):
    """Observations by columns, at most `capacity`: a million of them fit where a million small arrays would not.

    Features are kept as float16: distances between images change in their fourth digit.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._count = capacity, 0
        self._scores = np.empty(capacity)  # NaN for None
        self._features: FloatArray = np.empty((0, 0), dtype=np.float16)  # pages that nothing is written to cost nothing

    def append(self, score: float | None, feature: FloatArray) -> None:
        """Add one; the feature (F,) is copied. InvalidInputError when it is not as long as those before it, or beyond
        the capacity."""
        if self._count == self._capacity:
            raise InvalidInputError(f"expected at most {self._capacity} observations, got one more")
        if self._count and len(feature) != self._features.shape[1]:
            raise InvalidInputError(
                f"expected features of {self._features.shape[1]} numbers as those before, got {len(feature)}"
            )
        if self._count == 0:
            self._features = np.empty((self._capacity, len(feature)), dtype=np.float16)
        self._scores[self._count] = np.nan if score is None else score
        self._features[self._count] = feature
        self._count += 1

    @property
    def scores(self) -> FloatArray:
        """(P,), NaN where there is none; not a copy."""
        return self._scores[: self._count]

    @property
    def features(self) -> FloatArray:
        """(P, F), not a copy."""
        return self._features[: self._count]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Observation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Observation]: ...
    def __getitem__(self, index: int | slice) -> Observation | Sequence[Observation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        score, feature = float(self.scores[index]), self.features[index]  # IndexError ends a `for`
        return Observation(score=None if math.isnan(score) else score, feature=feature)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One image as a network sees it: the input (3, H, W) in [0, 1] and the network's output for it.

    Only detections whose class score reaches `queue_threshold` count: strategies read them from `counted`.
    """

    network: MaskRCNNWithScores
    image: Tensor
    output: dict[str, Tensor]
    queue_threshold: float = 0.0

    @property
    def counted(self) -> dict[str, Tensor]:
        """The output without the detections that do not count."""
        return confident(self.output, self.queue_threshold)

    @property
    def feature(self) -> FloatArray:
        """The body's top features averaged over the image, (F,)."""
        return self.output["feature"].cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Out of what a strategy chooses: the images of the pool, those that are annotated, and how many are wanted."""

    pool: Sequence[Observation]
    labelled: Sequence[Observation]
    count: int
    seed: int
    empty_policy: EmptyImagePolicy

    @cached_property
    def scores(self) -> FloatArray:
        """The scores of the pool (P,), with a place for the images that have none."""
        scores = _scores(self.pool)
        is_known = ~np.isnan(scores)
        return np.where(is_known, scores, empty_image_score(scores[is_known], self.empty_policy))

    def features(self, chosen: Iterable[int]) -> FloatArray:
        """The features of some images of the pool, by their indices, (K, F)."""
        return np.stack([self.pool[i].feature for i in chosen])

    @property
    def all_features(self) -> FloatArray:
        """The features of the pool, (P, F)."""
        return _stacked(self.pool)

    @cached_property
    def centres(self) -> FloatArray | None:
        """The features of the annotated images (L, F); None when there are none."""
        return _stacked(self.labelled) if self.labelled else None

    def lowest(self, count: int) -> IntArray:
        """Indices of the lowest scores, ties by position."""
        return np.argsort(self.scores, kind="stable")[:count]


class Strategy(ABC):
    """Ranks the unlabelled images. A strategy has no state: everything it knows are its arguments."""

    name: ClassVar[str]
    network_options: ClassVar[dict[str, Any]] = {}  # what the network must be built with (fields of NetworkConfig)
    chooses_a_set: ClassVar[bool] = False  # what it chooses is more than the lowest scores
    compares_images: ClassVar[bool] = False  # it needs features, those of the annotated images too

    @abstractmethod
    def observe(self, sight: Sight) -> Observation:
        """What to keep of an image. InvalidInputError when the network was not built with `network_options`."""

    def choose(
        self,
        pool: Sequence[Observation],
        labelled: Sequence[Observation],
        count: int,
        *,
        seed: int,
        empty_policy: EmptyImagePolicy = EmptyImagePolicy.MEDIAN,
    ) -> IntArray:
        """Indices of the `count` images of the pool to annotate, (min(count, P),), the first one first.

        `labelled` are the annotated images.
        """
        if not pool or count == 0:
            return np.array([], dtype=np.int64)
        return self._choose(Candidates(pool=pool, labelled=labelled, count=count, seed=seed, empty_policy=empty_policy))

    def _choose(self, candidates: Candidates) -> IntArray:
        """By score; strategies that choose a set override this. At least one image is in the pool and wanted."""
        return candidates.lowest(candidates.count)


def look(
    network: MaskRCNNWithScores,
    pixels: NDArray[np.uint8],
    *,
    image_hw: tuple[int, int] | None = None,
    queue_threshold: float = 0.0,
) -> tuple[Sight, Detections]:
    """One image (H, W, 3) uint8 RGB as strategies need it, and all its detections, in pixels of that image.

    Of an image that was shrunk before (`model.dataset.load_seen`), `image_hw` is the size that it had, and detections
    are in pixels of that. The network is in evaluation mode and runs where its weights are. Raises TooLargeError.
    """
    image_hw = image_hw or (pixels.shape[0], pixels.shape[1])
    image = image_tensor(pixels, input_hw(image_hw, network.config)).to(next(network.parameters()).device)
    (output,) = outputs_in_memory(network, [image])
    sight = Sight(network=network, image=image, output=output, queue_threshold=queue_threshold)
    return sight, detections_of(output, input_hw=image.shape[-2:], image_hw=image_hw)


def confident(output: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The network's output with only the detections whose class score reaches the threshold."""
    if threshold <= 0:
        return output
    keep = output["scores"] >= threshold
    return {name: values[keep] if name in _OF_DETECTIONS else values for name, values in output.items()}


def _scores(observations: Sequence[Observation]) -> FloatArray:
    """(P,), NaN where there is none."""
    if isinstance(observations, Observations):
        return observations.scores
    return np.array([math.nan if o.score is None else o.score for o in observations], dtype=np.float64)


def _stacked(observations: Sequence[Observation]) -> FloatArray:
    if isinstance(observations, Observations):
        return observations.features
    return np.stack([observation.feature for observation in observations])


def mean_or_none(values: Tensor) -> float | None:
    """The mean of (N,) values in [0, 1], rounding errors cut off; None for N = 0."""
    return None if values.numel() == 0 else float(torch.mean(values.double()).clamp(0, 1))
