import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.calibration import true_ious
from model.comparison import compare, matched
from model.errors import InvalidInputError
from model.evaluate import evaluate, ground_truth, precision, results_of
from model.geometry import mask_to_rle, rle_area, rle_to_box_xyxy, rle_to_mask, roi_mask_to_rle
from model.types import LabeledImage
from scripts.bench_evaluate import CLASSES as BENCH_CLASSES
from scripts.bench_evaluate import pool
from tests.model.examples import detections, ellipse, rectangle

CLASSES = ["cell", "dot"]


def truth(image_id, *instances, hw=(64, 64)):
    return LabeledImage(
        image_id=image_id,
        path=Path(f"{image_id}.png"),
        image_hw=hw,
        labels=np.array([label for label, _ in instances], dtype=np.int64),
        rles=tuple(mask_to_rle(mask) for _, mask in instances),
    )


def measure(found, images, **options):
    return evaluate(found, images, CLASSES, mask_threshold=0.3, **options)


def perfect(image):
    """RoI masks on a grid of the image's own pixels, so that pasting gives the very masks of the ground truth."""
    height, width = image.image_hw
    assert height == width
    boxes = [[0.0, 0.0, float(width), float(height)]] * len(image.labels)
    masks = [rle_to_mask(rle) for rle in image.rles]
    return detections(
        boxes,
        labels=image.labels.tolist(),
        image_hw=image.image_hw,
        roi_masks=np.array(masks, dtype=np.float32).reshape(-1, height, width),
    )


IMAGES = [
    truth("a", (1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60))),
    truth("b", (1, ellipse(2, 2, 30, 40)), (1, rectangle(40, 10, 60, 60))),
    truth("empty"),
]


def test_perfect_detections_score_one_at_every_iou():
    result = measure({image.image_id: perfect(image) for image in IMAGES}, IMAGES)
    assert (result.map_50, result.map_50_95) == (pytest.approx(1.0), pytest.approx(1.0))
    assert result.ap_50_by_class == {"cell": pytest.approx(1.0), "dot": pytest.approx(1.0)}
    assert (result.images, result.instances) == (3, 4)


@pytest.mark.parametrize("with_boxes_elsewhere", [False, True], ids=["no detections", "none at the right place"])
def test_without_a_hit_the_score_is_zero(with_boxes_elsewhere):
    found = {image.image_id: detections([[0, 60, 4, 64]] if with_boxes_elsewhere else []) for image in IMAGES}
    result = measure(found, IMAGES)
    assert (result.map_50, result.map_50_95) == (0.0, 0.0)
    assert result.ap_50_95_by_class == {"cell": 0.0, "dot": 0.0}


@pytest.mark.parametrize("found", [detections([]), detections([[1, 1, 9, 9]])], ids=["no detections", "a detection"])
@pytest.mark.parametrize("images", [[], [truth("x")]], ids=["no images", "an empty image"])
def test_without_ground_truth_there_is_no_score(found, images):
    result = measure({"x": found}, images)
    assert (result.map_50, result.map_50_95) == (None, None)
    assert result.ap_50_by_class == {"cell": None, "dot": None}
    assert result.instances == 0


def test_a_class_without_ground_truth_has_no_score_and_does_not_count_in_the_mean():
    images = [truth("a", (1, rectangle(8, 8, 30, 28)))]
    result = measure({"a": perfect(images[0])}, images)
    assert result.ap_50_by_class == {"cell": pytest.approx(1.0), "dot": None}
    assert result.map_50 == pytest.approx(1.0)
    nothing = measure({"a": detections([])}, images)
    assert nothing.ap_50_by_class == {"cell": 0.0, "dot": None}


def test_the_right_mask_with_the_wrong_class_is_no_hit():
    images = [truth("a", (1, rectangle(8, 8, 30, 28)))]
    found = detections([[8, 8, 30, 28]], labels=[2])
    assert measure({"a": found}, images).map_50 == 0.0
    assert measure({"a": detections([[8, 8, 30, 28]], labels=[1])}, images).map_50 == pytest.approx(1.0)


def test_classes_are_measured_apart():
    # class 1: both found; class 2: one of two found
    images = [
        truth("a", (1, rectangle(0, 0, 20, 20)), (2, rectangle(30, 30, 60, 60))),
        truth("b", (1, rectangle(0, 0, 20, 20)), (2, rectangle(30, 30, 60, 60))),
    ]
    found = {
        "a": detections([[0, 0, 20, 20], [30, 30, 60, 60]], labels=[1, 2]),
        "b": detections([[0, 0, 20, 20]], labels=[1]),
    }
    result = measure(found, images)
    # COCO interpolates at 101 recall points; 0, 0.01 ... 0.5 are reached with precision 1
    half = 51 / 101
    assert result.ap_50_by_class == {"cell": pytest.approx(1.0), "dot": pytest.approx(half)}
    assert result.map_50 == pytest.approx((1 + half) / 2)


def test_a_mask_that_fits_by_two_thirds_counts_up_to_that_iou():
    images = [truth("a", (1, rectangle(0, 0, 60, 20)))]
    # 40 x 20 inside 60 x 20: IoU 2/3 is reached at .50 .55 .60 .65 of the ten thresholds
    roi_mask = np.zeros((1, 60, 60), dtype=np.float32)
    roi_mask[0, :20, :40] = 1
    result = measure({"a": detections([[0, 0, 60, 60]], roi_masks=roi_mask)}, images)
    assert result.map_50 == pytest.approx(1.0)
    assert result.map_50_95 == pytest.approx(0.4)


def test_a_false_alarm_with_a_higher_score_halves_the_precision():
    images = [truth("a", (1, rectangle(0, 0, 20, 20)))]
    found = detections([[40, 40, 60, 60], [0, 0, 20, 20]], class_scores=[0.9, 0.8])
    assert measure({"a": found}, images).map_50 == pytest.approx(0.5)
    found = detections([[40, 40, 60, 60], [0, 0, 20, 20]], class_scores=[0.7, 0.8])
    assert measure({"a": found}, images).map_50 == pytest.approx(1.0)


def test_more_than_a_hundred_instances_of_an_image_count():
    boxes = [(x, y, x + 5, y + 5) for x in range(0, 120, 8) for y in range(0, 72, 8)]  # 15 x 9 = 135
    image = truth("a", *[(1, rectangle(*box, hw=(72, 120))) for box in boxes], hw=(72, 120))
    found = detections([list(map(float, box)) for box in boxes], image_hw=(72, 120))
    assert len(found) == 135
    assert measure({"a": found}, [image]).map_50 == pytest.approx(1.0)
    # with COCO's own limit only 100 of the 135 are looked at: recall points 0 to 0.74
    assert measure({"a": found}, [image], max_detections=100).map_50 == pytest.approx(75 / 101)


def test_the_mask_threshold_decides_what_is_compared():
    images = [truth("a", (1, rectangle(8, 8, 36, 36)))]
    roi_mask = np.full((1, 28, 28), 0.4, dtype=np.float32)
    found = {"a": detections([[8, 8, 36, 36]], roi_masks=roi_mask)}
    assert evaluate(found, images, CLASSES, mask_threshold=0.3).map_50 == pytest.approx(1.0)
    assert evaluate(found, images, CLASSES, mask_threshold=0.5).map_50 == 0.0


def test_numbers_agree_with_those_that_pycocotools_prints():
    rng = np.random.default_rng(0)
    images, found = [], {}
    for index in range(12):
        corners = rng.integers(0, 34, (rng.integers(1, 6), 2))
        sides = rng.integers(8, 31, corners.shape)
        boxes = np.concatenate([corners, corners + sides], axis=1)
        labels = rng.integers(1, 3, len(boxes))
        shapes = [(ellipse, rectangle)[label - 1](*box.tolist()) for label, box in zip(labels, boxes, strict=True)]
        images.append(truth(str(index), *zip(labels.tolist(), shapes, strict=True)))
        noisy = np.clip(np.repeat(boxes, 2, axis=0) + rng.normal(0, 3, (2 * len(boxes), 4)), 0, 64)
        noisy[:, 2:] = np.maximum(noisy[:, 2:], noisy[:, :2] + 2)
        right, guessed = np.repeat(labels, 2), rng.integers(1, 3, len(noisy))
        found[str(index)] = detections(
            noisy.tolist(),
            labels=np.where(rng.random(len(noisy)) < 0.8, right, guessed).tolist(),
            class_scores=rng.random(len(noisy)).tolist(),
        )
    ours, theirs = measure(found, images), plain_coco(found, images)
    assert 0.05 < ours.map_50_95 < ours.map_50 < 0.95
    assert (ours.map_50_95, ours.map_50) == pytest.approx((theirs[0], theirs[1]))


@pytest.mark.parametrize("max_detections", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_each_precision_is_the_very_one_that_pycocotools_computes(seed, max_detections):
    found, images = pool(60, seed=seed)
    truth, results = ground_truth(images, BENCH_CLASSES), results_of(found, images, 0.3)
    scores = [(result["image_id"], result["score"]) for result in results]
    assert len(set(scores)) < len(scores)  # some are equal
    ours = precision(truth, results, max_detections)
    assert 0.2 < ours.mean() < 0.95 if max_detections == 1000 else ours.any()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "segm")
        evaluator.params.maxDets = [max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
    assert np.array_equal(ours, evaluator.eval["precision"][:, :, :, 0, 0])


@pytest.mark.parametrize(
    ("ious", "hits"),
    [
        pytest.param([[0.9], [0.95]], [[1, 0], [1, 0]], id="who comes first takes it"),
        pytest.param([[0.6, 0.9], [0.0, 0.8]], [[1, 0], [1, 0]], id="the best one, not what is left for others"),
        pytest.param([[0.6, 0.8], [0.7, 0.9]], [[1, 1], [1, 0]], id="the second best where the best is taken"),
        pytest.param([[0.8, 0.8], [0.8, 0.0]], [[1, 1], [1, 1]], id="of equals the last"),
        pytest.param([[0.5, 0.75]], [[1], [1]], id="a threshold counts as reached"),
        pytest.param([[0.4, 0.3]], [[0], [0]], id="nothing overlaps enough"),
    ],
)
def test_detections_take_what_they_overlap_most(ious, hits):
    scores = np.linspace(1, 0, len(ious))
    found = matched(np.array(ious), scores, np.array([0.5, 0.75]))
    assert found.astype(int).tolist() == hits
    backwards = matched(np.array(ious)[::-1], scores[::-1], np.array([0.5, 0.75]))  # the best first all the same
    assert np.array_equal(backwards, found[:, ::-1])


def plain_coco(found, images):
    """The twelve numbers of COCO for the same masks, by the book."""
    annotations, results = [], []
    for number, image in enumerate(images, start=1):
        for label, rle in zip(image.labels.tolist(), image.rles, strict=True):
            x0, y0, x1, y1 = rle_to_box_xyxy(rle).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label, "segmentation": rle,
                 "area": rle_area(rle), "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
            )  # fmt: skip
        seen = found[image.image_id]
        for label, score, mask, box in zip(
            seen.labels.tolist(), seen.class_scores.tolist(), seen.roi_masks, seen.boxes_xyxy, strict=True
        ):
            rle = roi_mask_to_rle(mask, box, image.image_hw, mask_threshold=0.3)
            results.append({"image_id": number, "category_id": label, "segmentation": rle, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": n, "height": 64, "width": 64} for n in range(1, len(images) + 1)],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "dot"}],
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def test_an_image_that_nobody_looked_at_is_named():
    with pytest.raises(InvalidInputError, match="1 have none, the first is b"):
        measure({"a": detections([]), "empty": detections([])}, IMAGES)


@pytest.mark.parametrize(
    "measured",
    [
        pytest.param(measure, id="evaluate"),
        pytest.param(lambda found, images: compare(found, images, 2, mask_threshold=0.3), id="compare"),
        pytest.param(lambda found, images: true_ious(found, images, mask_threshold=0.3), id="true_ious"),
    ],
)
def test_detections_for_another_size_are_no_misses_but_refused(measured):
    found = {image.image_id: perfect(image) for image in IMAGES}
    measured(found, IMAGES)
    found["b"] = detections([[40, 10, 60, 60]], image_hw=(128, 128))
    with pytest.raises(
        InvalidInputError, match=r"image b: .* size \(64, 64\) .* detections for \(128, 128\): b\.png may"
    ):
        measured(found, IMAGES)
