"""Predicted against true IoUs: rank correlation and calibration by hand, true IoUs by brute force."""

import numpy as np
import pytest

from model.calibration import Calibration, fit_calibration, reliability, true_ious
from model.errors import InvalidInputError
from tests.model.examples import detections, labeled_image, rectangle


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        pytest.param([0.1, 0.4, 0.9], [0.2, 0.3, 0.4], 1.0, id="same order"),
        pytest.param([0.1, 0.4, 0.9], [0.9, 0.5, 0.1], -1.0, id="opposite order"),
        # 1 - 6 (0 + 1 + 1) / (3 * 8)
        pytest.param([0.1, 0.4, 0.9], [0.1, 0.9, 0.4], 0.5, id="one exchange"),
        # Ranks 1.5, 1.5, 3 and 1, 2, 3: covariance 1.5, variances 1.5 and 2.
        pytest.param([0.1, 0.1, 0.9], [0.1, 0.4, 0.9], 1.5 / np.sqrt(1.5 * 2), id="a tie"),
        # Ranks 1.5, 1.5, 3.5, 3.5 and 2.5, 1, 2.5, 4.
        pytest.param([0, 0, 1, 1], [0.5, 0.1, 0.5, 0.9], 3 / np.sqrt(4 * 4.5), id="ties on both sides"),
        pytest.param([0.5, 0.5, 0.5], [0.1, 0.4, 0.9], None, id="constant prediction"),
        pytest.param([0.1, 0.4, 0.9], [0.5, 0.5, 0.5], None, id="constant truth"),
        pytest.param([0.5], [0.5], None, id="one detection"),
    ],
)
def test_spearman_by_hand(predicted, true, expected):
    result = reliability(np.array(predicted), np.array(true))
    assert result.spearman == (None if expected is None else pytest.approx(expected))
    assert result.count == len(predicted)


def test_the_calibration_error_weighs_the_gap_of_each_bin_by_its_count():
    result = reliability(np.array([0.05, 0.61, 0.63, 0.68]), np.array([0.25, 0.9, 0.8, 0.7]))
    assert result.bins == (
        (pytest.approx(0.05), pytest.approx(0.25), 1),
        (pytest.approx(0.64), pytest.approx(0.8), 3),
    )
    assert result.calibration_error == pytest.approx((1 * 0.2 + 3 * 0.16) / 4)


@pytest.mark.parametrize(("value", "alone"), [(0.0, True), (0.1, False), (1.0, False)])
def test_the_ends_of_the_bins_belong_to_the_upper_one_and_one_to_the_last(value, alone):
    result = reliability(np.array([value, 0.15, 0.95]), np.zeros(3))
    assert len(result.bins) == (3 if alone else 2)


def test_perfect_predictions_have_no_calibration_error():
    values = np.random.default_rng(0).random(100)
    result = reliability(values, values)
    assert result.calibration_error == pytest.approx(0)
    assert result.spearman == pytest.approx(1)
    assert sum(count for _, _, count in result.bins) == 100


def test_without_detections_there_is_nothing_to_say():
    result = reliability(np.array([]), np.array([]))
    assert (result.spearman, result.calibration_error, result.bins, result.count) == (None, None, (), 0)


@pytest.mark.parametrize(
    ("predicted", "true"),
    [pytest.param(np.zeros(2), np.zeros(3), id="lengths"), pytest.param(np.zeros((2, 1)), np.zeros((2, 1)), id="axes")],
)
def test_columns_that_do_not_fit_are_refused(predicted, true):
    with pytest.raises(InvalidInputError, match="same shape"):
        reliability(predicted, true)


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def test_the_true_ious_are_those_of_the_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(20):
        x0, y0 = rng.integers(2, 20, 2)
        truth = rectangle(x0, y0, x0 + 30, y0 + 24)
        dx, dy, dw = rng.integers(-2, 3, 3)
        box = [x0 + dx, y0 + dy, x0 + dx + 30 + dw, y0 + dy + 24]
        image = labeled_image(tmp_path, f"{number}", (1, truth))
        found = detections([[float(side) for side in box]], box_scores=[0.7], mask_scores=[0.6])
        columns = true_ious({image.image_id: found}, [image], mask_threshold=0.3)
        expected = iou(rectangle(*box), truth)  # the detection's mask fills its box
        assert columns["box_ious"].tolist() == [pytest.approx(expected)]
        assert columns["mask_ious"].tolist() == [pytest.approx(expected)]
        assert columns["box_scores"].tolist() == [0.7]
        assert columns["mask_scores"].tolist() == [0.6]


def test_a_half_empty_mask_has_a_lower_iou_than_its_box(tmp_path):
    image = labeled_image(tmp_path, "a", (1, rectangle(10, 10, 38, 38)))
    mask = np.zeros((1, 28, 28), dtype=np.float32)
    mask[:, :14] = 1
    found = detections([[10, 10, 38, 38]], roi_masks=mask)
    columns = true_ious({"a": found}, [image], mask_threshold=0.5)
    assert columns["box_ious"].tolist() == [1.0]
    assert columns["mask_ious"][0] == pytest.approx(0.5, abs=0.03)


def test_the_instance_of_the_best_box_is_the_one_compared_with(tmp_path):
    image = labeled_image(tmp_path, "a", (1, rectangle(0, 0, 30, 30)), (1, rectangle(4, 0, 34, 30)))
    columns = true_ious({"a": detections([[4, 0, 34, 30]])}, [image], mask_threshold=0.3)
    assert columns["box_ious"].tolist() == columns["mask_ious"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("box", "label", "counts"),
    [
        pytest.param([10, 10, 30, 30], 1, True, id="on the instance"),
        pytest.param([10, 10, 30, 30], 2, False, id="another class in the picture"),
        pytest.param([10, 10, 30, 30], 3, False, id="a class that the picture lacks"),
        pytest.param([10, 10, 20, 30], 1, True, id="box IoU of exactly one half"),
        pytest.param([10, 10, 19, 30], 1, False, id="box IoU below one half"),
    ],
)
def test_only_detections_on_an_instance_of_their_class_count(tmp_path, box, label, counts):
    image = labeled_image(tmp_path, "a", (1, rectangle(10, 10, 30, 30)), (2, rectangle(40, 40, 60, 60)))
    columns = true_ious({"a": detections([box], labels=[label])}, [image], mask_threshold=0.3)
    assert all(len(column) == int(counts) for column in columns.values())


def test_images_without_instances_or_detections_add_nothing(tmp_path):
    empty = labeled_image(tmp_path, "empty")
    missed = labeled_image(tmp_path, "missed", (1, rectangle(10, 10, 30, 30)))
    found = {"empty": detections([[0, 0, 9, 9]]), "missed": detections([])}
    columns = true_ious(found, [empty, missed], mask_threshold=0.3)
    assert {name: column.shape for name, column in columns.items()} == dict.fromkeys(
        ("box_scores", "mask_scores", "box_ious", "mask_ious"), (0,)
    )


# --- calibration after the fact


def pairs(count, slope, intercept, *, noise=0.05, seed=0):
    """Predicted IoUs and true ones that follow a known map of them, with noise."""
    rng = np.random.default_rng(seed)
    predicted = rng.uniform(0.3, 0.99, count)
    true = Calibration(slope=slope, intercept=intercept)(predicted)
    return predicted, np.clip(true + rng.normal(0, noise, count), 0, 1)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -0.7), (2.0, 1.0)])
def test_a_known_map_is_found_again(slope, intercept):
    found = fit_calibration(*pairs(4000, slope, intercept, noise=0))
    assert found.slope == pytest.approx(slope, abs=0.06)
    assert found.intercept == pytest.approx(intercept, abs=0.06)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -0.7), (2.0, 1.0), (1.0, -1.5)])
def test_on_other_images_the_error_falls_and_the_order_stays(slope, intercept):
    calibration = fit_calibration(*pairs(60, slope, intercept))
    predicted, true = pairs(500, slope, intercept, seed=1)
    before, after = reliability(predicted, true), reliability(calibration(predicted), true)
    assert after.calibration_error < 0.5 * before.calibration_error
    assert after.spearman == pytest.approx(before.spearman)


def test_by_default_and_without_pairs_nothing_changes():
    scores = np.array([0.01, 0.3, 0.99])
    assert Calibration()(scores) == pytest.approx(scores)
    assert fit_calibration(np.array([]), np.array([])) == Calibration()


def test_the_minimum_is_where_the_gradient_vanishes():
    predicted, true = pairs(40, 0.6, 0.4)
    found = fit_calibration(predicted, true, prior=2.0)
    residual = found(predicted) - true
    logits = np.log(predicted / (1 - predicted))
    assert (residual * logits).sum() + 2 * (found.slope - 1) == pytest.approx(0, abs=1e-3)
    assert residual.sum() + 2 * found.intercept == pytest.approx(0, abs=1e-3)


def test_few_pairs_change_little():
    one = fit_calibration(np.array([0.9]), np.array([0.1]))
    assert 0.4 < one(np.array([0.9]))[0] < 0.9


def test_an_order_that_is_wrong_is_flattened_and_ends_stay_finite():
    predicted = np.linspace(0, 1, 50)
    calibration = fit_calibration(predicted, 1 - predicted)
    assert calibration.slope == pytest.approx(0.05)
    result = calibration(predicted)
    assert ((result > 0) & (result < 1)).all()
    assert (np.diff(result) >= 0).all()


def test_a_flattened_map_has_the_best_intercept():
    """At the least slope the loss must not fall by moving the intercept alone."""
    predicted = np.random.default_rng(0).uniform(0.5, 0.99, 300)
    true = 1 - 0.6 * (predicted - 0.5)
    best = fit_calibration(predicted, true)
    assert best.slope == pytest.approx(0.05)
    gradient = (best(predicted) - true).sum() + best.intercept  # the prior's part is the intercept itself
    assert gradient == pytest.approx(0, abs=1e-3)
    assert best(predicted).mean() == pytest.approx(true.mean(), abs=0.01)


def test_calibration_refuses_columns_that_do_not_fit():
    with pytest.raises(InvalidInputError, match="same shape"):
        fit_calibration(np.zeros(2), np.zeros(3))
