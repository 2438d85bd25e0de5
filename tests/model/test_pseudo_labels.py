from pathlib import Path

import numpy as np
import pytest

from model.comparison import compare
from model.config import PseudoLabelConfig
from model.errors import InvalidInputError
from model.geometry import rle_to_mask
from model.pseudo_labels import class_thresholds, image_with_trusted, score_threshold, trusted, with_score_threshold
from model.tsp import instance_scores
from tests.model.examples import detections, labeled_image, rectangle

BOX = [10.0, 10.0, 40.0, 40.0]
ABOVE = {"c": 0.95, "b": 0.95, "m": 0.85}


def one_instance(**scores):
    c, b, m = ({**ABOVE, **scores}[name] for name in "cbm")
    return detections([BOX], class_scores=[c], box_scores=[b], mask_scores=[m])


def pseudo(found, **config):
    return image_with_trusted(found, PseudoLabelConfig(**config), image_id="7", path=Path("7.png"), mask_threshold=0.3)


@pytest.mark.parametrize(
    ("c", "b", "m", "by_text", "by_algorithm_1"),
    [
        pytest.param(0.95, 0.95, 0.85, True, True, id="all above"),
        pytest.param(0.9001, 0.9001, 0.8001, True, True, id="all just above"),
        pytest.param(0.9, 0.95, 0.85, False, True, id="class at its threshold"),
        pytest.param(0.95, 0.9, 0.85, False, True, id="box at its threshold"),
        pytest.param(0.95, 0.95, 0.8, False, True, id="mask at its threshold"),
        pytest.param(0.9, 0.9, 0.8, False, False, id="all at their thresholds"),
        pytest.param(0.9001, 0.1, 0.1, False, True, id="class alone above"),
        pytest.param(0.1, 0.9001, 0.1, False, True, id="box alone above"),
        pytest.param(0.1, 0.1, 0.8001, False, True, id="mask alone above"),
        pytest.param(0.89, 0.89, 0.79, False, False, id="all just below"),
        pytest.param(0.0, 0.0, 0.0, False, False, id="all zero"),
        pytest.param(1.0, 1.0, 1.0, True, True, id="all one"),
    ],
)
def test_which_instances_are_trusted_by_the_text_and_by_algorithm_1(c, b, m, by_text, by_algorithm_1):
    found = one_instance(c=c, b=b, m=m)
    assert trusted(found, PseudoLabelConfig()).tolist() == [by_text]
    assert trusted(found, PseudoLabelConfig(rule="and")).tolist() == [by_text]
    assert trusted(found, PseudoLabelConfig(rule="or")).tolist() == [by_algorithm_1]


def test_the_default_thresholds_are_the_papers():
    config = PseudoLabelConfig()
    assert (config.class_threshold, config.box_threshold, config.mask_threshold) == (0.9, 0.9, 0.8)


@pytest.mark.parametrize(
    "threshold", [{"class_threshold": 0.96}, {"box_threshold": 0.96}, {"mask_threshold": 0.86}], ids=str
)
def test_each_threshold_rules_its_own_score(threshold):
    assert trusted(one_instance(), PseudoLabelConfig()).all()
    assert not trusted(one_instance(), PseudoLabelConfig(**threshold)).any()


def test_trusted_instances_become_labels_with_their_masks_and_the_others_vanish():
    found = detections(
        [BOX, [5, 5, 20, 20], [30.0, 20.0, 60.0, 50.0]], labels=[2, 1, 3], class_scores=[0.99, 0.5, 0.95]
    )
    image = pseudo(found)
    assert image.pseudo
    assert (image.image_id, image.path, image.image_hw) == ("7", Path("7.png"), (64, 64))
    assert image.labels.tolist() == [2, 3]
    for rle, box in zip(image.rles, [(10, 10, 40, 40), (30, 20, 60, 50)], strict=True):
        mask, expected = rle_to_mask(rle), rectangle(*box)
        assert (mask & expected).sum() / (mask | expected).sum() > 0.85


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(detections([]), id="no detections"),
        pytest.param(one_instance(c=0.5), id="nothing trusted"),
        pytest.param(detections([BOX], roi_masks=np.zeros((1, 28, 28), dtype=np.float32)), id="only an empty mask"),
    ],
)
@pytest.mark.parametrize("rule", ["and", "or"])
def test_an_image_without_a_surviving_instance_is_left_out(found, rule):
    if rule == "or" and found.class_scores.tolist() == [0.5]:
        found = one_instance(c=0.5, b=0.5, m=0.5)
    assert len(pseudo(found, rule=rule).labels) == 0


def test_an_instance_without_a_pixel_is_left_out_of_an_image_that_has_others():
    roi_masks = np.ones((2, 28, 28), dtype=np.float32)
    roi_masks[0] = 0.3  # at the threshold is not above it
    image = pseudo(detections([BOX, BOX], labels=[1, 2], roi_masks=roi_masks))
    assert image.labels.tolist() == [2]
    assert len(image.rles) == 1


def test_an_unknown_rule_is_refused():
    with pytest.raises(InvalidInputError, match="'and', 'or' or 'precision', got 'xor'"):
        PseudoLabelConfig(rule="xor")


# --- beyond the paper: what a pseudo label carries, what is ignored, thresholds by class


def test_labels_carry_their_triplets_and_what_is_not_trusted_is_ignored():
    found = detections(
        [BOX, [5, 5, 20, 20], [30.0, 20.0, 60.0, 50.0], [0, 0, 9, 9]],
        class_scores=[0.99, 0.5, 0.95, 0.1],
        box_scores=[0.98, 0.97, 0.2, 0.9],
        mask_scores=[0.85, 0.9, 0.9, 0.9],
    )
    image = pseudo(found)
    assert image.triplets.tolist() == [[0.99, 0.98, 0.85]]
    assert image.ignored_boxes_xyxy.tolist() == [[5, 5, 20, 20], [30, 20, 60, 50]]  # 0.1 is not above 0.1
    assert len(pseudo(found, ignore_threshold=0.5).ignored_boxes_xyxy) == 1


def test_a_trusted_instance_without_a_pixel_is_ignored():
    roi_masks = np.ones((2, 28, 28), dtype=np.float32)
    roi_masks[0] = 0
    image = pseudo(detections([BOX, [0, 0, 9, 9]], roi_masks=roi_masks))
    assert image.ignored_boxes_xyxy.tolist() == [BOX]
    assert len(image.triplets) == 1


def test_for_a_teacher_an_image_without_a_trusted_instance_stays():
    image = image_with_trusted(
        one_instance(c=0.5), PseudoLabelConfig(), image_id="7", path=Path("7.png"), mask_threshold=0.3
    )
    assert (image.labels.shape, image.rles, image.triplets.shape) == ((0,), (), (0, 3))
    assert image.ignored_boxes_xyxy.tolist() == [BOX]


BY_CLASS = PseudoLabelConfig(class_wise_thresholds=True, class_threshold_floor=0.6)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        # means 0.9 and 0.72: 0.9 and 0.9 * 0.72 / 0.9
        pytest.param([0.95, 0.85, 0.72], [1, 1, 2], [0.9, 0.72, 0.9], id="in proportion, none of class 3"),
        pytest.param([0.9, 0.9, 0.9, 0.9, 0.72], [1, 1, 1, 1, 2], [0.9, 0.72, 0.9], id="counts do not matter"),
        pytest.param([0.9, 0.72, 0.1, 0.59], [1, 2, 1, 2], [0.9, 0.72, 0.9], id="below the floor nothing counts"),
        pytest.param([1.0, 0.62], [1, 3], [0.9, 0.9, 0.6], id="never below the floor"),
        pytest.param([0.7, 0.7], [1, 3], [0.9, 0.9, 0.9], id="equally unsure"),
        pytest.param([], [], [0.9, 0.9, 0.9], id="nothing seen"),
        pytest.param([0.3], [2], [0.9, 0.9, 0.9], id="nothing above the floor"),
    ],
)
def test_thresholds_by_class_by_hand(scores, labels, expected):
    result = class_thresholds(np.array(scores), np.array(labels, dtype=np.int64), BY_CLASS, num_classes=3)
    assert result.tolist() == pytest.approx(expected)


def test_each_instance_is_measured_by_the_threshold_of_its_class():
    found = detections([BOX] * 4, labels=[1, 2, 1, 2], class_scores=[0.91, 0.8, 0.8, 0.7])
    assert trusted(found, BY_CLASS, class_thresholds=np.array([0.9, 0.75])).tolist() == [True, True, False, False]
    image = image_with_trusted(
        found, BY_CLASS, image_id="7", path=Path("7.png"), mask_threshold=0.3, class_thresholds=np.array([0.9, 0.75])
    )
    assert image.labels.tolist() == [1, 2]


def test_thresholds_by_class_must_be_there_and_enough():
    with pytest.raises(InvalidInputError, match="expected class_thresholds"):
        trusted(one_instance(), BY_CLASS)
    with pytest.raises(InvalidInputError, match="expected 3 or more"):
        trusted(detections([BOX], labels=[3]), BY_CLASS, class_thresholds=np.array([0.9, 0.9]))


@pytest.mark.parametrize("floor", [-0.1, 0.91])
def test_a_floor_above_the_threshold_or_below_zero_is_refused(floor):
    with pytest.raises(InvalidInputError, match="from 0 to class_threshold"):
        PseudoLabelConfig(class_wise_thresholds=True, class_threshold_floor=floor)


@pytest.mark.parametrize(
    ("right", "precision", "trusted_count"),
    [
        pytest.param([True] * 9, 0.9, 9, id="nine in a row are enough for 0.9"),
        pytest.param([True] * 8, 0.9, 0, id="eight are not"),
        pytest.param([True] * 9 + [False], 0.9, 9, id="the wrong one after them is left out"),
        pytest.param([False] + [True] * 18, 0.9, 19, id="a wrong one in front is made up for"),
        pytest.param([False] * 20, 0.5, 0, id="all wrong"),
        pytest.param([], 0.5, 0, id="nothing seen"),
        pytest.param([True], 0.5, 1, id="one is enough for a half"),
    ],
)
def test_sigma_s_is_the_lowest_with_the_precision(right, precision, trusted_count):
    scores = np.linspace(0.9, 0.5, len(right))
    shuffled = np.random.default_rng(0).permutation(len(right))
    threshold = score_threshold(scores[shuffled], np.array(right, dtype=bool)[shuffled], precision)
    assert (scores > threshold).sum() == trusted_count


def test_equal_scores_are_trusted_together():
    scores, right = np.array([0.9, 0.8, 0.8, 0.8]), np.array([True, True, True, False])
    assert (scores > score_threshold(scores, right, 0.6)).sum() == 4


def test_by_precision_the_threshold_counts_and_no_other():
    scores = instance_scores(np.array([0.6]), np.array([0.7]), np.array([0.8]))[0]
    found = one_instance(c=0.6, b=0.7, m=0.8)
    for threshold, expected in ((scores - 1e-6, True), (scores, False), (1.0, False)):
        config = PseudoLabelConfig(rule="precision", score_threshold=threshold, class_threshold=1)
        assert trusted(found, config).tolist() == [expected]


def test_what_is_right_has_the_class_and_half_of_the_mask(tmp_path):
    truth = labeled_image(tmp_path, "7", (1, rectangle(10, 10, 40, 40)), (1, rectangle(50, 50, 58, 58)))
    found = detections([BOX] * 3, labels=[1, 2, 1], class_scores=[0.9, 0.8, 0.7], image_hw=truth.image_hw)
    compared = compare({"7": found}, [truth], 2, mask_threshold=0.3)
    adapted = with_score_threshold(PseudoLabelConfig(rule="precision", precision=0.4), compared)
    # The best one is right, the next of another class, the last a duplicate: 1 / 2, then 1 / 3, then 1 / 4.
    assert trusted(found, adapted).tolist() == [True, False, False]
    assert with_score_threshold(PseudoLabelConfig(), compared) == PseudoLabelConfig()


def test_how_much_of_a_mask_makes_it_right_can_be_chosen(tmp_path):
    truth = labeled_image(tmp_path, "7", (1, rectangle(10, 10, 40, 40)))
    found = detections([[10, 10, 40, 34]], labels=[1], image_hw=truth.image_hw)  # 0.8 of it
    compared = compare({"7": found}, [truth], 1, mask_threshold=0.3)
    for iou, expected in ((0.75, True), (0.85, False)):
        config = PseudoLabelConfig(rule="precision", precision=0.4, precision_iou=iou)
        assert trusted(found, with_score_threshold(config, compared)).tolist() == [expected]


@pytest.mark.parametrize(
    "options",
    [{"precision": 0.0}, {"precision": 1.0}, {"precision_iou": 1.0}, {"class_wise_thresholds": True}],
    ids=str,
)
def test_rules_that_cannot_be_are_refused(options):
    with pytest.raises(InvalidInputError, match="expected"):
        PseudoLabelConfig(rule="precision", **options)
