"""The only conversion between Label Studio's JSON and our types: tasks, predictions, annotations. Pure.

A Label Studio polygon is one ring, so an instance in several parts is several regions: the first is the parent, the
others name it in `parentID` (Label Studio shows them nested). Points are percents of the image, 0..100, also when the
annotator has rotated the view: `image_rotation` only tells how the image was shown, so it changes nothing here.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import cv2
import numpy as np

from ml_backend.errors import ImageError
from ml_backend.label_config import LabelConfig
from model.errors import InvalidInputError
from model.geometry import (
    is_simple_polygon,
    mask_to_polygons,
    polygons_to_rle,
    rle_area,
    rle_to_mask,
    roi_mask_to_polygons,
)
from model.types import Detections, FloatArray, IntArray, Rle

Json = dict[str, Any]

# 3 decimals are 0.04 px in an image of 4096 px; rings too small or too crowded for that get the finer rounding.
ROUNDINGS_PCT = (3, 6)
# Tighter than predictions: these outlines stand for the truth.
TRUTH_MAX_VERTICES = 200
TRUTH_TOLERANCE_PX = 0.25

# What an annotation may hold that was drawn with another configuration: these reasons begin so.
UNKNOWN_LABEL = "unknown label"
UNKNOWN_NAME = "polygon of a tag that the labelling configuration does not have:"

DRAWN_TYPES = frozenset({"polygon", "rectangle", "ellipse", "keypoint", "brush", "bitmask", "vector"})


@dataclass(frozen=True, kw_only=True)
class AnnotatedInstances:
    """What one annotation says: `labels` (N,) int64 in 1..C and N masks of the image's size.

    `ignored` counts what was drawn but cannot be learnt, by reason. N = 0 with nothing ignored says that somebody
    looked and found nothing; N = 0 with something ignored is no such statement.
    """

    labels: IntArray
    rles: tuple[Rle, ...]
    ignored: Mapping[str, int]


def image_uri(task: Mapping[str, Any], config: LabelConfig) -> str:
    """The address of the task's image as Label Studio stores it; ImageError if the task has none."""
    data = task.get("data")
    uri = _look_up(data, config.data_key)
    if isinstance(uri, str) and uri:
        return uri
    keys = ", ".join(map(str, data)) if isinstance(data, Mapping) else "none"
    raise ImageError(
        f"task {task.get('id', '?')}: expected the address of an image as text in data[{config.data_key!r}], "
        f"got {type(uri).__name__}; keys in data: {keys or 'none'}. "
        f"Import the task with this key or change the value of <Image> in the labelling configuration."
    )


def prediction(
    detections: Detections,
    config: LabelConfig,
    *,
    model_version: str,
    score: float,
    mask_threshold: float = 0.3,
    max_vertices: int = 40,
) -> Json:
    """One Label Studio prediction: `score` is the image's S (eq. 3) in [0, 1], a region for each part of an instance.

    Instances whose mask gives no polygon are left out. The same input gives equal JSON, region ids included.
    """
    if not len(detections):
        return empty_prediction(model_version, score=score)
    from model.tsp import instance_scores  # brings torch, which who only converts annotations or names does not need

    _check_score(score)
    _check_classes(detections.labels, config)
    certainties = instance_scores(detections.class_scores, detections.box_scores, detections.mask_scores)
    result: list[Json] = []
    for index, label in enumerate(detections.labels):
        rings_xy = roi_mask_to_polygons(
            detections.roi_masks[index],
            detections.boxes_xyxy[index],
            detections.image_hw,
            mask_threshold=mask_threshold,
            max_vertices=max_vertices,
            tolerance_px=_tolerance_px(detections.boxes_xyxy[index]),
        )
        result += _regions(
            _without_specks(rings_xy),
            config.labels[int(label) - 1],
            config,
            detections.image_hw,
            id_seed=f"{model_version}/{index}",
            extra=_confidence(detections, index, certainty=float(certainties[index])),
        )
    return {"model_version": model_version, "score": float(score), "result": result}


def empty_prediction(model_version: str, *, score: float = 0.0) -> Json:
    """A prediction without regions. It has a score, because Label Studio serves null scores before all others."""
    _check_score(score)
    return {"model_version": model_version, "score": float(score), "result": []}


def for_task(prediction: Mapping[str, Any], task_id: int) -> Json:
    """The prediction as Label Studio's bulk import wants it, with the id of its task."""
    return {"task": task_id, **prediction}


def relabelled(regions: Sequence[Mapping[str, Any]], config: LabelConfig) -> list[Json]:
    """The polygon regions of a prediction as `config` names control, image and labels; those of labels that it does not
    have are left out, because Label Studio shows them broken."""
    result: list[Json] = []
    for region in regions:
        label = _class_of(region["value"]["polygonlabels"], config)
        if isinstance(label, int):
            value = {**region["value"], "polygonlabels": [config.labels[label - 1]]}
            result.append({**region, "from_name": config.from_name, "to_name": config.to_name, "value": value})
    return result


def choose_annotation(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The one annotation that counts for a task: ground truth if there is one, else the latest by `updated_at`.

    Skipped ones never count; drafts live under another key of the task and are not looked at.
    """
    annotations = task.get("annotations")
    usable = [
        annotation
        for annotation in (annotations if isinstance(annotations, list) else [])
        if isinstance(annotation, Mapping) and not annotation.get("was_cancelled")
    ]
    return max(usable, key=_precedence, default=None)


def instances_from_annotation(
    annotation: Mapping[str, Any], config: LabelConfig, image_hw: tuple[int, int]
) -> AnnotatedInstances:
    """The polygons that `config`'s control drew, as masks of `image_hw`; parts of one group are one instance.

    Never raises on what people drew or imported: what cannot be used is counted in `ignored`.
    """
    ignored: Counter[str] = Counter()
    parts: list[_Part] = []
    for region in _drawn_regions(annotation.get("result"), ignored):
        part = _read_part(region, config, image_hw)
        if isinstance(part, str):
            ignored[part] += 1
        else:
            parts.append(part)
    labels: list[int] = []
    rles: list[Rle] = []
    for group in _groups(parts):
        rings_xy = [part.ring_xy for part in group if isinstance(part.ring_xy, np.ndarray)]
        ignored.update(part.ring_xy for part in group if isinstance(part.ring_xy, str))
        rle = polygons_to_rle(rings_xy, image_hw)
        if rle_area(rle):
            labels.append(group[0].label)
            rles.append(rle)
        elif rings_xy:
            ignored["polygon without area"] += len(rings_xy)
    return AnnotatedInstances(labels=np.array(labels, dtype=np.int64), rles=tuple(rles), ignored=dict(ignored))


def regions_from_instances(
    labels: IntArray, rles: Sequence[Rle], config: LabelConfig, image_hw: tuple[int, int]
) -> list[Json]:
    """The `result` of an annotation that draws these instances: labels (N,) in 1..C, N masks of `image_hw`.

    Holes are filled, because a polygon cannot have any; an empty mask gives no region.
    """
    if len(labels) != len(rles):
        raise InvalidInputError(f"expected one mask for each label, got {len(labels)} labels and {len(rles)} masks")
    _check_classes(labels, config)
    result: list[Json] = []
    for index, (label, rle) in enumerate(zip(labels, rles, strict=True)):
        rings_xy = mask_to_polygons(rle_to_mask(rle), max_vertices=TRUTH_MAX_VERTICES, tolerance_px=TRUTH_TOLERANCE_PX)
        name = config.labels[int(label) - 1]
        extra: Json = {"origin": "manual"}
        result += _regions(rings_xy, name, config, image_hw, id_seed=f"manual/{index}", extra=extra)
    return result


def _look_up(data: object, key: str) -> object:
    """`data[key]`, else the value at the path that `key` spells ("scan.files[0]"), as Label Studio's editor does."""
    if isinstance(data, Mapping) and key in data:
        return data[key]
    value = data
    for step in re.findall(r"[^.\[\]]+", key):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _check_score(score: float) -> None:
    if not 0.0 <= score <= 1.0:  # NaN fails as well
        raise InvalidInputError(
            f"score of a prediction: expected a number in [0, 1], got {score}; Label Studio's bulk import drops others"
        )


def _check_classes(labels: IntArray, config: LabelConfig) -> None:
    count = len(config.labels)
    if len(labels) and not (labels.min() >= 1 and labels.max() <= count):
        raise InvalidInputError(
            f"classes: expected 1..{count} for the labels {', '.join(config.labels)}, got {labels.min()} to "
            f"{labels.max()}: the labelling configuration has changed; a model trained on the new one is needed"
        )


def _tolerance_px(box_xyxy: FloatArray) -> float:
    """How far a polygon may leave its mask: half a cell of a 28 x 28 mask, from just enough for small ones to 1 px.

    A mask knows no more, and every vertex is one that an annotator may have to drag.
    """
    side = float(max(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]))
    return min(1.0, max(0.45, side / 56))


def _without_specks(rings_xy: Sequence[FloatArray]) -> list[FloatArray]:
    """The parts of an instance, the largest first, without those below a twentieth of the largest: a model's noise,
    and for an annotator a region to delete."""
    areas = [cv2.contourArea(ring.astype(np.float32)) for ring in rings_xy]
    return [ring for ring, area in zip(rings_xy, areas, strict=True) if area >= 0.05 * areas[0]]


def _confidence(detections: Detections, index: int, *, certainty: float) -> Json:
    """What Label Studio shows of an instance: c in the list of regions, the triplet and s (eq. 2) in its details."""
    triplet = (detections.class_scores[index], detections.box_scores[index], detections.mask_scores[index])
    c, b, m, s = (f"{value:.2f}".removeprefix("0") for value in (*triplet, certainty))
    text = f"class {c} box {b} mask {m}, certainty {s}"
    return {"origin": "prediction", "score": round(float(triplet[0]), 4), "meta": {"text": [text]}}


def _regions(
    rings_xy: Sequence[FloatArray],
    label: str,
    config: LabelConfig,
    image_hw: tuple[int, int],
    *,
    id_seed: str,
    extra: Json,
) -> list[Json]:
    """One region for each ring (V, 2) in pixels that survives rounding; the first is the parent of the others."""
    height, width = image_hw
    regions: list[Json] = []
    for ring_xy in rings_xy:
        points_pct = _points_pct(ring_xy, image_hw)
        if points_pct is None:
            continue
        region = {
            "id": hashlib.sha256(f"{id_seed}/{len(regions)}/{points_pct}".encode()).hexdigest()[:16],
            "from_name": config.from_name,
            "to_name": config.to_name,
            "type": "polygonlabels",
            "original_width": int(width),
            "original_height": int(height),
            "image_rotation": 0,
            **extra,
            "value": {"points": points_pct, "closed": True, "polygonlabels": [label]},
        }
        if regions:
            region["parentID"] = regions[0]["id"]
        regions.append(region)
    return regions


def _points_pct(ring_xy: FloatArray, image_hw: tuple[int, int]) -> list[list[float]] | None:
    """Rounded percents of a ring (V, 2) in pixels, still a simple polygon; None if no rounding leaves one."""
    height, width = image_hw
    exact_pct = np.clip(ring_xy.astype(np.float64) / (width, height) * 100, 0, 100)
    for decimals in ROUNDINGS_PCT:
        rounded_pct = exact_pct.round(decimals)
        distinct = (rounded_pct != np.roll(rounded_pct, 1, axis=0)).any(axis=1)
        if is_simple_polygon(rounded_pct[distinct]):
            points: list[list[float]] = rounded_pct[distinct].tolist()
            return points
    return None


def _precedence(annotation: Mapping[str, Any]) -> tuple[bool, datetime, int]:
    number = annotation.get("id")
    return (
        bool(annotation.get("ground_truth")),
        _moment(annotation.get("updated_at")),
        number if isinstance(number, int) else -1,
    )


def _moment(value: object) -> datetime:
    """Times compare as times: as text, Label Studio's "...00.5Z" would come before "...00Z"."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, datetime):
        return datetime.min.replace(tzinfo=UTC)
    return value if value.tzinfo else value.replace(tzinfo=UTC)


@dataclass(frozen=True)
class _Part:
    """A polygon region with a known label; `ring_xy` (V, 2) float64 in pixels, or why there is none."""

    label: int
    ring_xy: FloatArray | str
    region_id: str | None
    parent_id: str | None


def _drawn_regions(result: object, ignored: Counter[str]) -> list[Mapping[str, Any]]:
    """The shapes of an annotation. Choices, texts, ratings and relations beside them draw nothing and do not count."""
    if result is None:
        return []
    if not isinstance(result, list):
        ignored["malformed result"] += 1
        return []
    drawn: list[Mapping[str, Any]] = []
    for region in result:
        if not isinstance(region, Mapping) or not isinstance(region.get("type"), str):
            ignored["malformed region"] += 1
        elif region["type"].lower().removesuffix("labels") in DRAWN_TYPES:
            drawn.append(region)
    return drawn


def _read_part(region: Mapping[str, Any], config: LabelConfig, image_hw: tuple[int, int]) -> _Part | str:
    """A part of an instance, or the reason why the region is none."""
    kind, value = region["type"].lower(), region.get("value")
    if not kind.startswith("polygon"):
        return f"{kind}: only polygons are learnt"
    if region.get("from_name") != config.from_name:
        return _elsewhere("polygon of another control", region.get("from_name"), config)
    if region.get("to_name") != config.to_name:
        return _elsewhere("polygon on another image", region.get("to_name"), config)
    if not isinstance(value, Mapping):
        return "malformed region"
    label = _class_of(value.get("polygonlabels"), config)
    if isinstance(label, str):
        return label
    region_id, parent_id = region.get("id"), region.get("parentID")
    return _Part(
        label=label,
        ring_xy=_ring_xy(value.get("points"), image_hw),
        region_id=region_id if isinstance(region_id, str) else None,
        parent_id=parent_id if isinstance(parent_id, str) else None,
    )


def _elsewhere(reason: str, name: object, config: LabelConfig) -> str:
    """Why a region of another tag than ours is not learnt: `reason` if the configuration has that tag."""
    return reason if name in config.other_names else f"{UNKNOWN_NAME} {name!r}"


def _class_of(names: object, config: LabelConfig) -> int | str:
    """The class of the first known label, or the reason why there is none."""
    texts = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    for name in texts:
        label = config.class_of(name)
        if label is not None:
            return label
    return f"{UNKNOWN_LABEL} {texts[0]!r}" if texts else "no label"


def _ring_xy(points: object, image_hw: tuple[int, int]) -> FloatArray | str:
    """Percent points as pixels (V, 2) float64, clamped to the image, or the reason why there are none."""
    try:
        points_pct = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # not numbers, rows of unequal length, integers beyond float64
        return "malformed points"
    if points_pct.shape != (0,) and points_pct.shape[1:] != (2,):
        return "malformed points"
    if len(points_pct) < 3:
        return "fewer than 3 points"
    if not np.isfinite(points_pct).all():
        return "points that are not finite"
    height, width = image_hw
    ring_xy: FloatArray = np.clip(points_pct, 0, 100) / 100 * (width, height)
    return ring_xy


def _groups(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Parts of one instance together, in the order of the annotation: a part belongs to its parent of the same label.

    Nesting regions of different labels (a nucleus in its cell) groups nothing.
    """
    index_of: dict[str | None, int] = {}
    for index, part in enumerate(parts):
        if part.region_id is not None:
            index_of.setdefault(part.region_id, index)
    groups: dict[int, list[_Part]] = {}
    for index, part in enumerate(parts):
        root, seen = index, set[int]()
        while root not in seen:  # parents that go round in a circle end it too
            seen.add(root)
            parent = index_of.get(parts[root].parent_id)
            if parent is not None and parts[parent].label == part.label:
                root = parent
        groups.setdefault(root, []).append(part)
    return list(groups.values())
