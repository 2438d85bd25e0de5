"""Procedural head CT slices with lesions and their COCO ground truth: images for a machine that can download nothing.

    python -m scripts.make_phantoms OUT --images 120 --size 192 --seed 0

Noise and contrast differ from image to image, so that some are much harder than others.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from model.dataset import coco_annotation
from model.errors import DatasetError, InvalidInputError
from model.files import write_json
from model.geometry import mask_to_rle
from model.types import BoolArray, FloatArray

CLASS_NAMES = ("haemorrhage", "oedema", "calcification")
BRAIN = 0.42  # attenuations in [0, 1], which become gray values 0..255
CONTRASTS = {"haemorrhage": 0.24, "oedema": -0.16, "calcification": 0.45}  # against the brain, at best
MIN_AREA = 4e-4  # of the image; what is smaller is not drawn
MAX_HIDDEN = 0.4  # of a lesion, by later ones


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """`image` (S, S) uint8; N lesions, the later on top: `labels` (N,) int64 in 1..3, `masks` (N, S, S) bool.

    Masks are whole lesions, also where a later one lies on top of them.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: BoolArray


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What decides each byte of a set."""

    images: int
    size: int
    seed: int
    empty_fraction: float

    def __post_init__(self) -> None:
        if self.images < 1 or self.size < 64 or self.seed < 0 or not 0 <= self.empty_fraction <= 1:
            raise InvalidInputError(
                f"expected images >= 1, size >= 64, seed >= 0 and empty_fraction in [0, 1], got {asdict(self)}"
            )


def make_phantoms(out: Path, *, images: int, size: int, seed: int, empty_fraction: float = 0.15) -> None:
    """Write `out/images/*.png` (8-bit gray) and `out/annotations.json` (COCO instances, compressed RLE).

    A set that is complete is left as it is, one that was interrupted is written again. Raises DatasetError
    if `out` holds anything else, a set of other parameters included.
    """
    parameters = Parameters(images=images, size=size, seed=seed, empty_fraction=empty_fraction)
    annotations = out / "annotations.json"
    _claim(out, parameters)
    if annotations.exists():
        return
    (out / "images").mkdir(exist_ok=True)
    coco: dict[str, Any] = {
        "info": {"description": "Procedural CT phantoms", "parameters": asdict(parameters)},
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES, start=1)],
        "images": [],
        "annotations": [],
    }
    for index in range(images):
        name = f"phantom_{index:05d}.png"
        drawn = phantom((seed, index), size, empty_fraction=empty_fraction)
        (out / "images" / name).write_bytes(cv2.imencode(".png", drawn.image)[1].tobytes())
        coco["images"].append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for label, mask in zip(drawn.labels.tolist(), drawn.masks, strict=True):
            number = len(coco["annotations"]) + 1
            coco["annotations"].append(
                coco_annotation(mask_to_rle(mask), number=number, image_id=index + 1, category_id=label)
            )
    write_json(annotations, coco)  # last: its presence says that the set is complete


def phantom(seed: int | tuple[int, ...], size: int, *, empty_fraction: float = 0.15) -> Phantom:
    """Draw one slice of `size` x `size` pixels; without lesions at a chance of `empty_fraction`."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random()
    slice_, brain = _head(rng, size)
    names: list[str] = []
    masks: list[BoolArray] = []
    wanted = 0 if rng.random() < empty_fraction else int(rng.integers(1, 6))
    while len(masks) < wanted:
        name = str(rng.choice(CLASS_NAMES))
        mask = _largest_part(_lesion(rng, name, size) & brain)
        if mask.sum() < MIN_AREA * size**2 or not _fits(mask, name, zip(masks, names, strict=True)):
            continue
        contrast = CONTRASTS[name] * rng.uniform(0.8, 1.2) * (1 - 0.55 * difficulty)
        slice_ = _blend(slice_, mask, BRAIN + contrast, size, texture=_noise(rng, size, 0.008))
        names.append(name)
        masks.append(mask)
    grain = _noise(rng, size, 0.004) * 0.6 + rng.normal(size=(size, size)) * 0.4
    slice_ = rng.uniform(0.9, 1.1) * slice_ + (0.02 + 0.055 * difficulty) * grain
    return Phantom(
        image=np.clip(np.rint(slice_ * 255), 0, 255).astype(np.uint8),
        labels=np.array([CLASS_NAMES.index(name) + 1 for name in names], dtype=np.int64),
        masks=np.array(masks, dtype=np.bool_).reshape(-1, size, size),
    )


def _head(rng: np.random.Generator, size: int) -> tuple[FloatArray, BoolArray]:
    """A slice without lesions (S, S) in [0, 1], and where the brain is (S, S)."""
    centre_xy = size * rng.uniform(0.48, 0.52, 2)
    radii_xy = size * np.array([rng.uniform(0.33, 0.38), rng.uniform(0.40, 0.45)])
    angle = rng.normal(0, 0.12)
    thickness = size * rng.uniform(0.022, 0.035)
    waves = rng.normal(0, 0.008, 4)

    def inside(margin: float) -> BoolArray:
        return _outline(size, centre_xy, radii_xy - margin, angle, waves)

    scalp, skull, brain = inside(-0.8 * thickness), inside(0), inside(thickness)
    slice_: FloatArray = np.zeros((size, size))
    for mask, value in ((scalp, 0.33), (skull, 0.92), (brain, BRAIN)):
        slice_ = _blend(slice_, mask, value, size)
    slice_ += brain * (0.018 * _noise(rng, size, 0.03) + 0.012 * _noise(rng, size, 0.01))
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    falx = _outline(size, centre_xy, np.array([0.004 * size, 0.9 * radii_xy[1]]), angle, np.zeros(1)) & brain
    slice_ = _blend(slice_, falx, BRAIN + 0.05, size)
    for side in (-1, 1):  # ventricles are dark and near the midline: oedema is not the only dark thing
        for along, tilt in ((-0.07, 0.35), (0.09, -0.45)):
            horn_xy = centre_xy + size * (side * rng.uniform(0.035, 0.06) * axes[0] + along * axes[1])
            radii = size * np.array([rng.uniform(0.012, 0.028), rng.uniform(0.05, 0.085)])
            horn = _outline(size, horn_xy, radii, angle + side * tilt, rng.normal(0, 0.03, 3))
            slice_ = _blend(slice_, horn & brain, 0.22, size)
    return slice_, brain


def _lesion(rng: np.random.Generator, name: str, size: int) -> BoolArray:
    """The shape (S, S) of a lesion somewhere in the head."""
    away, direction, angle = np.sqrt(rng.uniform(0.1**2, 0.32**2)), rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
    centre_xy = size * (0.5 + away * np.array([0.85 * np.cos(direction), np.sin(direction)]))
    if name == "calcification":
        return _outline(size, centre_xy, size * rng.uniform(0.018, 0.034, 2), angle, rng.normal(0, 0.03, 3))
    if name == "haemorrhage":
        radii_xy = size * rng.uniform(0.04, 0.115) * np.array([1, rng.uniform(0.5, 1)])
        return _outline(size, centre_xy, radii_xy, angle, rng.normal(0, 0.09, 5))
    radii_xy = size * rng.uniform(0.07, 0.15) * np.array([1, rng.uniform(0.5, 0.9)])
    waves = rng.normal(0, 0.12, 8)
    shape = _outline(size, centre_xy, radii_xy, angle, waves)
    if rng.random() < 0.5:  # a crescent
        bite_xy = centre_xy + 0.75 * radii_xy[1] * np.array([-np.sin(angle), np.cos(angle)])
        shape &= ~_outline(size, bite_xy, 0.95 * radii_xy, angle, waves / 2)
    return shape


def _outline(size: int, centre_xy: FloatArray, radii_xy: FloatArray, angle: float, waves: FloatArray) -> BoolArray:
    """An ellipse (S, S) turned by `angle`, whose radius swings k + 2 times around it by about `waves[k]`, relative."""
    y, x = np.indices((size, size)) + 0.5
    x, y = x - centre_xy[0], y - centre_xy[1]
    u = (np.cos(angle) * x + np.sin(angle) * y) / radii_xy[0]
    v = (-np.sin(angle) * x + np.cos(angle) * y) / radii_xy[1]
    around = np.arctan2(v, u)
    radius = 1 + sum(wave / (1 + k / 2) * np.sin((k + 2) * around + 7 * k) for k, wave in enumerate(waves))
    inside: BoolArray = np.hypot(u, v) <= radius
    return inside


def _blend(
    slice_: FloatArray, mask: BoolArray, value: float, size: int, texture: FloatArray | float = 0.0
) -> FloatArray:
    """Put `value` where the mask is, with an edge as soft as a scanner's."""
    alpha = cv2.GaussianBlur(mask.astype(np.float64), (0, 0), 0.004 * size)
    blended: FloatArray = slice_ * (1.0 - alpha) + (value + 0.015 * texture) * alpha
    return blended


def _noise(rng: np.random.Generator, size: int, smooth: float) -> FloatArray:
    """Smooth noise (S, S) of unit variance; `smooth` is a fraction of the size."""
    noise = cv2.GaussianBlur(rng.normal(size=(size, size)), (0, 0), smooth * size)
    return np.asarray(noise / noise.std())


def _fits(mask: BoolArray, name: str, earlier: Iterable[tuple[BoolArray, str]]) -> bool:
    """Whether a lesion on top of others leaves enough of each to be seen, and does not melt into one of its class."""
    return all(
        (below & mask).sum() <= (0 if name_below == name else MAX_HIDDEN * below.sum()) for below, name_below in earlier
    )


def _largest_part(mask: BoolArray) -> BoolArray:
    """What is left of a shape that the skull cut up, without crumbs."""
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if len(statistics) < 3:
        return mask
    largest: BoolArray = parts == 1 + statistics[1:, cv2.CC_STAT_AREA].argmax()
    return largest


def _claim(out: Path, parameters: Parameters) -> None:
    """Mark the folder as a set of these parameters, or find that it is one already."""
    marker = out / "phantoms.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != asdict(parameters):
            raise DatasetError(f"{out} holds phantoms of {found}, wanted {asdict(parameters)}: choose another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise DatasetError(f"{out} holds other files: expected an empty folder, choose another one")
    out.mkdir(parents=True, exist_ok=True)
    write_json(marker, asdict(parameters))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write procedural CT phantoms with lesions as a COCO folder.")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument("--images", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=192, help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other images; default: %(default)s")
    parser.add_argument("--empty-fraction", type=float, default=0.15, help="chance of an image without lesions")
    given = parser.parse_args(arguments)
    try:
        make_phantoms(
            given.out, images=given.images, size=given.size, seed=given.seed, empty_fraction=given.empty_fraction
        )
    except (DatasetError, InvalidInputError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.images} phantoms in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
