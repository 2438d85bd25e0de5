"""Masks to polygons: ours next to cv2.findContours and cv2.approxPolyDP, on every mask of COCO folders."""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.dataset import read_coco
from model.geometry import is_simple_polygon, mask_to_polygons, polygons_to_rle, rle_area, rle_to_mask
from model.types import BoolArray, FloatArray, Rle

GOAL_IOU, GOAL_VERTICES = 0.97, 40
_TOLERANCE_OF_LENGTH = 0.01  # of the outline, the usual choice with cv2.approxPolyDP

Outline = Callable[[BoolArray], list[FloatArray]]


def polygons(options: Namespace) -> dict[str, Any]:
    """One result for each folder of `options.data`; the ratio is that of all masks together. Folders that are not
    there, or have no instance, are named in `absent`."""
    masks = {folder.name: _rles(folder) for folder in map(Path, options.data)}
    sets = {name: _of_set(rles) for name, rles in masks.items() if rles}
    if not sets:
        raise SystemExit("polygons: --data must name a folder with annotations.json in COCO's format, with instances")
    ours = sum(of_set["ours"]["seconds"] for of_set in sets.values())
    theirs = sum(of_set["theirs"]["seconds"] for of_set in sets.values())
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs,
        "goal": {"median_iou": GOAL_IOU, "median_vertices": GOAL_VERTICES, "invalid": 0},
        "absent": [name for name, rles in masks.items() if not rles],
        "sets": sets,
    }


def _rles(folder: Path) -> list[Rle]:
    path = folder / "annotations.json"
    images = read_coco(path).images if path.exists() else ()
    return [rle for image in images for rle in image.rles if rle_area(rle)]


def _of_set(rles: Sequence[Rle]) -> dict[str, Any]:
    """Both ways in turn, mask by mask; seconds are CPU time."""
    measured: dict[str, list[tuple[float, float, int, bool]]] = {"ours": [], "theirs": []}
    for number, rle in enumerate(rles):
        mask = rle_to_mask(rle)
        both = [("ours", mask_to_polygons), ("theirs", plain_polygons)]
        for name, outline in both if number % 2 else both[::-1]:
            measured[name].append(_one(outline, mask, rle))
    return {"masks": len(rles), **{name: _summary(rows) for name, rows in measured.items()}}


def plain_polygons(mask: BoolArray) -> list[FloatArray]:
    """What one would write first: contours through the centres of pixels, each simplified by one percent of its
    length; rings with fewer than three points are lost."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    simple = [cv2.approxPolyDP(ring, _TOLERANCE_OF_LENGTH * cv2.arcLength(ring, True), True) for ring in contours]
    return [ring[:, 0].astype(np.float32) + 0.5 for ring in simple if len(ring) >= 3]


def _one(outline: Outline, mask: BoolArray, rle: Rle) -> tuple[float, float, int, bool]:
    """Seconds, IoU against the mask, vertices, and whether a ring is invalid or nothing is left of the mask."""
    started = time.process_time()
    rings = outline(mask)
    seconds = time.process_time() - started
    found = rle_to_mask(polygons_to_rle(rings, (rle["size"][0], rle["size"][1])))
    iou = float((found & mask).sum() / (found | mask).sum())
    invalid = not rings or not all(is_simple_polygon(ring) for ring in rings)
    return seconds, iou, sum(len(ring) for ring in rings), invalid


def _summary(rows: Sequence[tuple[float, float, int, bool]]) -> dict[str, float]:
    seconds, ious, vertices, invalid = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "seconds": round(float(seconds.sum()), 6),
        "median_ms": round(float(np.median(seconds)) * 1000, 3),
        "median_iou": round(float(np.median(ious)), 4),
        "iou_p05": round(float(np.quantile(ious, 0.05)), 4),
        "median_vertices": float(np.median(vertices)),
        "most_vertices": int(vertices.max()),
        "invalid": int(invalid.sum()),
    }
