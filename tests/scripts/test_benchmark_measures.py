"""The benchmark's measures against COCO's evaluation and by hand."""

import numpy as np
import pytest

from model.calibration import true_ious
from model.comparison import average_precision, compare, matched
from model.evaluate import evaluate
from model.geometry import mask_to_rle
from model.predict import rescored
from model.types import LabeledImage
from scripts import benchmark_measures
from scripts.benchmark_measures import iou_pairs, measured, pseudo_quality, unpacked
from tests.model.examples import HW, detections, rectangle

CLASSES = ("one", "two", "three")
THRESHOLD = 0.3


def truth(name, *instances):
    return LabeledImage(
        image_id=name,
        path=None,
        image_hw=HW,
        labels=np.array([label for label, _ in instances], dtype=np.int64),
        rles=tuple(mask_to_rle(rectangle(*box)) for _, box in instances),
    )


@pytest.fixture(scope="module")
def scene():
    """Images with up to four instances of two of three classes, and shifted, doubled and invented detections."""
    rng = np.random.default_rng(0)
    images, found = [], {}
    for number in range(12):
        instances, boxes, labels = [], [], []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = rng.integers(2, 30), rng.integers(2, 30), rng.integers(8, 30), rng.integers(8, 30)
            label = int(rng.integers(1, 3))
            instances.append((label, (x, y, x + w, y + h)))
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 2, 4)
                boxes.append([x + shift[0], y + shift[1], x + w + shift[2], y + h + shift[3]])
                labels.append(label)
        boxes.append([5.0, 5.0, 20.0, 20.0])
        labels.append(int(rng.integers(1, 4)))
        scores = [np.round(rng.random(len(boxes)), 1) for _ in range(3)]  # with ties
        images.append(truth(str(number), *instances))
        found[str(number)] = detections(
            boxes, labels=labels, class_scores=scores[0], box_scores=scores[1], mask_scores=scores[2]
        )
    return images, found


def test_average_precisions_are_those_of_cocos_evaluation_for_both_rankings(scene):
    images, found = scene
    ours = measured(compare(found, images, 3, mask_threshold=THRESHOLD), CLASSES)
    coco = evaluate(found, images, CLASSES, mask_threshold=THRESHOLD)
    assert 0.1 < coco.map_50 < 0.9
    assert ours["map_50"] == pytest.approx(coco.map_50)
    assert ours["map_50_95"] == pytest.approx(coco.map_50_95)
    assert ours["ap_50_by_class"] == {name: pytest.approx(ap) for name, ap in coco.ap_50_by_class.items()}
    assert ours["ap_50_95_by_class"] == {name: pytest.approx(ap) for name, ap in coco.ap_50_95_by_class.items()}
    assert ours["ap_50_by_class"]["three"] is None

    by_product = {name: rescored(detections) for name, detections in found.items()}
    coco = evaluate(by_product, images, CLASSES, mask_threshold=THRESHOLD)
    assert ours["rescored_map_50"] == pytest.approx(coco.map_50)
    assert ours["rescored_map_50_95"] == pytest.approx(coco.map_50_95)
    assert ours["rescored_map_50"] != pytest.approx(ours["map_50"])


def test_a_calibration_changes_only_the_ranking_that_is_named_after_it(scene):
    images, found = scene
    compared = compare(found, images, 3, mask_threshold=THRESHOLD)
    plain, same, flat = (measured(compared, CLASSES, c) for c in (None, lambda m: m, np.ones_like))
    assert plain["calibrated_map_50"] is None
    assert same["calibrated_map_50"] == plain["rescored_map_50"] == same["rescored_map_50"]
    assert flat["calibrated_map_50_95"] == plain["map_50_95"] != plain["rescored_map_50_95"]


def test_predicted_and_true_ious_are_those_of_the_calibration(scene):
    images, found = scene
    ours = iou_pairs(compare(found, images, 3, mask_threshold=THRESHOLD))
    theirs = true_ious(found, images, mask_threshold=THRESHOLD)
    assert len(theirs["box_ious"]) > 10
    for name, values in theirs.items():
        assert np.sort(ours[name]) == pytest.approx(np.sort(values))


def test_a_set_without_detections_measures_zero():
    images = [truth("a", (1, (0, 0, 10, 10)))]
    ours = measured(compare({"a": detections([])}, images, 3, mask_threshold=THRESHOLD), CLASSES)
    assert (ours["map_50"], ours["ap_50_by_class"]) == (0.0, {"one": 0.0, "two": None, "three": None})
    assert ours["mask_reliability"]["count"] == 0


def test_the_best_detection_takes_the_best_instance_and_the_next_one_what_is_left():
    ious = np.array([[0.6, 0.7], [0.9, 0.8], [0.55, 0.55]])
    hits = matched(ious, np.array([0.9, 0.8, 0.7]), np.array([0.5, 0.75]))
    assert hits.tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize(
    ("hits", "instances", "precision"),
    [
        pytest.param([1, 1], 2, 1.0, id="all"),
        # Recall 0.5 at precision 1, so recalls 0 to 0.5: 51 of 101.
        pytest.param([1, 0], 2, 51 / 101, id="half"),
        # Precision 1/2 up to recall 1.
        pytest.param([0, 1], 1, 0.5, id="the second"),
        pytest.param([], 1, 0.0, id="none"),
    ],
)
def test_the_average_precision_by_hand(hits, instances, precision):
    assert average_precision(np.array(hits, dtype=np.float64), instances) == pytest.approx(precision)


def test_weights_count_like_repeated_detections():
    hits = np.array([1.0, 0.0, 1.0])
    weighted = average_precision(hits, 5, np.array([2.0, 0.0, 1.0]))
    assert weighted == pytest.approx(average_precision(np.array([1.0, 1.0, 1.0]), 5))


def test_what_is_kept_for_resampling_gives_the_same_precision_again(scene):
    images, found = scene
    compared = compare(found, images, 3, mask_threshold=THRESHOLD)
    ours = measured(compared, CLASSES)
    for label, name in enumerate(CLASSES[:2], start=1):
        image, hit = unpacked(ours["matches"][name])
        assert hit[-1]
        assert set(image) <= set(range(len(images)))
        instances = sum(int((i.labels == label).sum()) for i in images)
        assert average_precision(hit.astype(float), instances) == pytest.approx(ours["ap_50_by_class"][name])
    assert len(unpacked(ours["matches"]["three"])[0]) == 0


def test_too_much_for_resampling_is_not_kept(scene, monkeypatch):
    monkeypatch.setattr(benchmark_measures, "_LARGEST_MATCHES", 20)
    images, found = scene
    assert measured(compare(found, images, 3, mask_threshold=THRESHOLD), CLASSES)["matches"] is None


def test_pseudo_labels_are_judged_by_class_and_overlap_against_all_that_is_hidden():
    hidden = {
        "a": truth("a", (1, (0, 0, 20, 20)), (2, (30, 30, 50, 50))),
        "b": truth("b", (1, (0, 0, 9, 9)), (1, (20, 20, 40, 40))),
    }
    # A hit, the same again, one of the wrong class, and one that has half of its object.
    made = [
        truth("a", (1, (0, 0, 20, 18)), (1, (1, 0, 20, 20)), (1, (30, 30, 50, 50))),
        truth("b", (1, (20, 20, 32, 40))),
    ]
    assert pseudo_quality(made, hidden) == {
        "instances": 4, "hidden_instances": 4, "precision": 2 / 4, "precision_75": 1 / 4, "recall": 2 / 4,
    }  # fmt: skip
    nothing = pseudo_quality([], hidden)
    assert (nothing["precision"], nothing["precision_75"], nothing["recall"]) == (None, None, 0)
