"""COCO's figures of an image set: ours, against faster-coco-eval on the same masks."""

import contextlib
import io
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluate import evaluate as evaluate_all
from model.evaluate import ground_truth, precision, results_of
from model.geometry import mask_to_rle
from model.types import BoolArray, Detections, FloatArray, LabeledImage
from scripts.bench_compare import Work, compare

GOAL = 1.0
CLASSES = ("dot", "cell", "lesion")
SIDE, ROI = 128, 28
ONE_THREAD = {"rle_iou_max_workers": 1}  # faster-coco-eval takes up to eight
MOST_DETECTIONS, MASK_THRESHOLD = 1000, 0.3


def evaluate(options: Namespace) -> dict[str, Any]:
    """`options.images` synthetic images; `ours` and `theirs` are CPU seconds from masks to precisions, one thread each,
    `wall` the same by wall time. `as_it_comes` is with the threads that faster-coco-eval takes unless told. `share` is
    that of our seconds in all that an evaluation takes, the masks included. RuntimeError when the figures differ."""
    found, images = pool(options.images)
    truth, results = ground_truth(images, CLASSES), results_of(found, images, MASK_THRESHOLD)
    ours = partial(_ours, truth, results)
    one_thread, as_it_comes = (partial(_theirs, truth, results, **threads) for threads in (ONE_THREAD, {}))
    difference = max(float(np.abs(ours() - theirs()).max()) for theirs in (one_thread, as_it_comes))
    if difference > 1e-12:
        raise RuntimeError(f"the precisions differ by up to {difference}: expected rounding errors at most")
    figures = evaluate_all(found, images, CLASSES, mask_threshold=MASK_THRESHOLD)
    whole = partial(evaluate_all, found, images, CLASSES, mask_threshold=MASK_THRESHOLD)
    return {
        **_both(ours, one_thread, options.rounds),
        "as_it_comes": _both(ours, as_it_comes, options.rounds),
        "goal": GOAL,
        "difference": difference,
        "share": round(compare(ours, whole, rounds=1)["ratio"], 2),
        "map_50": figures.map_50,
        "map_50_95": figures.map_50_95,
        "images": len(images),
        "instances": figures.instances,
        "detections": len(results),
        "rounds": options.rounds,
    }


def _both(ours: Work, theirs: Work, rounds: int) -> dict[str, Any]:
    """By CPU time, and by `wall` time."""
    cpu, wall = (compare(ours, theirs, rounds=rounds, clock=clock) for clock in (time.process_time, time.perf_counter))
    return {**_rounded(cpu), "wall": _rounded(wall)}


def _rounded(measured: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in measured.items()}


def _ours(truth: dict[str, Any], results: list[dict[str, Any]]) -> FloatArray:
    return precision(*_copied(truth, results), MOST_DETECTIONS)


def _theirs(truth: dict[str, Any], results: list[dict[str, Any]], **threads: int) -> FloatArray:
    from faster_coco_eval import COCO, COCOeval_faster  # a dependency of development

    truth, results = _copied(truth, results)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth)
        evaluator = COCOeval_faster(coco, coco.loadRes(results), "segm", print_function=lambda *_: None, **threads)
        evaluator.params.maxDets = [MOST_DETECTIONS]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    found: FloatArray = evaluator.eval["precision"][:, :, :, 0, 0]
    return found


def _copied(truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """For evaluators that write into what they get."""
    annotations = [dict(annotation) for annotation in truth["annotations"]]
    return {**truth, "annotations": annotations}, [dict(result) for result in results]


def pool(count: int, *, seed: int = 0) -> tuple[dict[str, Detections], list[LabeledImage]]:
    """Images with up to 12 ellipses, which overlap, and what somebody found in them: most of the ellipses, some twice,
    some in the wrong class, and ellipses that are not there; by scores of which some are equal."""
    rng = np.random.default_rng(seed)
    images, found = [], {}
    for number in range(count):
        boxes = _boxes(rng, int(rng.integers(0, 13)))
        labels = rng.integers(1, len(CLASSES) + 1, len(boxes))
        image = LabeledImage(
            image_id=str(number),
            path=Path(f"{number}.png"),
            image_hw=(SIDE, SIDE),
            labels=labels,
            rles=tuple(mask_to_rle(_ellipse(box_xyxy)) for box_xyxy in boxes),
        )
        images.append(image)
        found[image.image_id] = _detections(rng, boxes, labels)
    return found, images


def _boxes(rng: np.random.Generator, count: int) -> FloatArray:
    low = rng.uniform(0, SIDE * 0.8, (count, 2))
    return np.concatenate([low, np.minimum(low + rng.uniform(6, 50, (count, 2)), SIDE)], axis=1)


def _ellipse(box_xyxy: FloatArray) -> BoolArray:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    x0, y0, x1, y1 = box_xyxy
    inside = ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 <= 0.25
    return np.asarray(inside, dtype=np.bool_)


def _detections(rng: np.random.Generator, boxes: FloatArray, labels: Any) -> Detections:
    times = rng.choice(3, len(boxes), p=[0.1, 0.7, 0.2])
    near = np.repeat(boxes, times, axis=0)
    near = near + rng.normal(scale=1.5, size=near.shape)
    others = _boxes(rng, int(rng.integers(0, 7)))
    all_labels = np.concatenate([np.repeat(labels, times), rng.integers(1, len(CLASSES) + 1, len(others))])
    count = len(all_labels)
    all_labels = np.where(rng.uniform(size=count) < 0.1, all_labels % len(CLASSES) + 1, all_labels)
    scores = np.sort(rng.uniform(0.05, 1, count).round(2))[::-1].astype(np.float32)
    y, x = np.mgrid[:ROI, :ROI] / (ROI - 1) - 0.5
    disc = np.clip(1.3 - 4 * (x**2 + y**2), 0, 1) + rng.normal(scale=0.05, size=(count, 1, 1))
    order = rng.permutation(count)
    return Detections(
        image_hw=(SIDE, SIDE),
        boxes_xyxy=np.concatenate([near, others])[order].astype(np.float32),
        labels=all_labels[order],
        class_scores=scores,
        box_scores=scores,
        mask_scores=scores,
        roi_masks=np.clip(disc, 0, 1).astype(np.float32),
    )
