"""What the rooms of the project hand to each other: frozen, and checked when they are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from model.errors import InvalidInputError

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]


class Rle(TypedDict):
    """COCO's compressed run-length encoding of one binary mask; `counts` is text, so that it can go into JSON."""

    size: list[int]  # [height, width]
    counts: str


@dataclass(frozen=True, kw_only=True)
class LabeledImage:
    """One image with the outlines of its instances, drawn by people or (`pseudo`) by the model.

    `labels` (N,) int64 in 1..C, where 0 would be background; `rles` N masks of the image's own size `image_hw`.
    N = 0 says that somebody looked and found nothing.

    Only a pseudo-labelled image may have `triplets` (N, 3), the scores c, b, m in [0, 1] of its instances, and
    `ignored_boxes_xyxy` (K, 4), pixels, what the model also saw there but not surely enough for a label.
    """

    image_id: str
    path: Path
    image_hw: tuple[int, int]
    labels: IntArray
    rles: tuple[Rle, ...]
    pseudo: bool = False
    triplets: FloatArray | None = None
    ignored_boxes_xyxy: FloatArray | None = None

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.rles),):
            raise InvalidInputError(
                f"image {self.image_id}: expected one label for each of the {len(self.rles)} masks, "
                f"got labels of shape {self.labels.shape}"
            )
        if self.labels.size and self.labels.min() < 1:
            raise InvalidInputError(
                f"image {self.image_id}: labels start at 1 (0 is background), got {self.labels.min()}"
            )
        for rle in self.rles:
            if tuple(rle["size"]) != self.image_hw:
                raise InvalidInputError(
                    f"image {self.image_id}: its size is {self.image_hw} (height, width), a mask has {rle['size']}"
                )
        self._check_what_the_model_said()

    def _check_what_the_model_said(self) -> None:
        triplets, ignored = self.triplets, self.ignored_boxes_xyxy
        if not self.pseudo and (triplets is not None or ignored is not None):
            raise InvalidInputError(
                f"image {self.image_id}: only pseudo-labelled images have triplets or ignored boxes, this is people's"
            )
        if triplets is not None:
            if triplets.shape != (len(self.rles), 3):
                raise InvalidInputError(
                    f"image {self.image_id}: expected triplets of shape ({len(self.rles)}, 3), got {triplets.shape}"
                )
            if not ((triplets >= 0) & (triplets <= 1)).all():
                raise InvalidInputError(f"image {self.image_id}: expected triplets in [0, 1], got {triplets.tolist()}")
        if ignored is not None and (ignored.ndim != 2 or ignored.shape[1] != 4 or not np.isfinite(ignored).all()):
            raise InvalidInputError(
                f"image {self.image_id}: expected ignored boxes (K, 4), finite, got shape {ignored.shape}"
            )


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What the model sees in one image of size `image_hw`: N instances, the best class score first.

    `boxes_xyxy` (N, 4) in pixels of the image; `labels` (N,) in 1..C; the triplet of the paper, each (N,) in [0, 1]:
    `class_scores` c, `box_scores` b (predicted box IoU), `mask_scores` m (predicted mask IoU);
    `roi_masks` (N, M, M) probabilities inside each box.
    """

    image_hw: tuple[int, int]
    boxes_xyxy: FloatArray
    labels: IntArray
    class_scores: FloatArray
    box_scores: FloatArray
    mask_scores: FloatArray
    roi_masks: FloatArray

    def __post_init__(self) -> None:
        count = len(self.labels)
        expected = {
            "boxes_xyxy": (count, 4),
            "labels": (count,),
            "class_scores": (count,),
            "box_scores": (count,),
            "mask_scores": (count,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise InvalidInputError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")
        if self.roi_masks.ndim != 3 or len(self.roi_masks) != count:
            raise InvalidInputError(f"roi_masks: expected shape ({count}, M, M), got {self.roi_masks.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, keep: BoolArray | IntArray) -> "Detections":
        """The instances that a boolean mask (N,) or an index array picks, in that order."""
        return Detections(
            image_hw=self.image_hw,
            boxes_xyxy=self.boxes_xyxy[keep],
            labels=self.labels[keep],
            class_scores=self.class_scores[keep],
            box_scores=self.box_scores[keep],
            mask_scores=self.mask_scores[keep],
            roi_masks=self.roi_masks[keep],
        )


def found_in(detections: Mapping[str, Detections], image: LabeledImage) -> Detections:
    """The detections in an image, by its id. InvalidInputError when it has none or they are for another size, in which
    no mask could overlap those of its annotations."""
    if image.image_id not in detections:
        raise InvalidInputError(f"expected detections for every image, {image.image_id} has none")
    found = detections[image.image_id]
    if found.image_hw != image.image_hw:
        raise InvalidInputError(
            f"image {image.image_id}: its annotations are for size {image.image_hw} (height, width), its detections "
            f"for {found.image_hw}: {image.path} may be another file than the annotated one"
        )
    return found
