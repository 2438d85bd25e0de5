"""The statistics of the benchmark's report, by hand."""

import math

import numpy as np
import pytest

from model.comparison import resampled_map_50
from scripts.benchmark_statistics import (
    area_under,
    bootstrap_p,
    half_width,
    holm,
    images_to_reach,
    paired_t_p,
    smallest_sign_p,
    student_p,
    student_quantile,
)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042)])
def test_students_t_is_that_of_the_tables(degrees, t):
    assert student_quantile(degrees) == pytest.approx(t, abs=0.0006)
    assert student_p(t, degrees) == pytest.approx(0.05, abs=1e-4)


def test_students_t_with_one_degree_is_cauchys():
    assert student_p(1, 1) == pytest.approx(0.5)
    assert student_p(-3, 1) == pytest.approx(1 - 2 * math.atan(3) / math.pi)


def test_the_half_width_of_two_values():
    # 0.2 apart: standard deviation 0.1414, standard error 0.1, t(1) = 12.706.
    assert half_width(np.array([[0.1, 0.5], [0.3, 0.7]])) == pytest.approx([1.2706] * 2, abs=1e-4)
    assert half_width(np.array([0.3])) == 0


def test_the_paired_t_test_by_hand():
    # Mean 2, standard deviation 1, so t = 2 sqrt(3) with 2 degrees: p = 1 - t / sqrt(2 + t^2).
    assert paired_t_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_t_p(np.array([0.0, 0.0])) == 1
    assert paired_t_p(np.array([0.5, 0.5])) == 0


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        pytest.param([0.0, 0.0, 0.0], 1.0, id="no difference"),
        pytest.param([0.1, 0.11, 0.12], 0.0001, id="far from zero against the spread"),
        # Only three times the largest is as far from the mean as the mean is from zero: one case of 27.
        pytest.param([0.1, 1.0, 5.0], 1 / 27, id="one sign, one large"),
        # Centred -1, 0, 1: |sum of three draws| >= 1.5 in 8 of 27 cases (sums 2, 3, -2, -3: 3 + 1 + 3 + 1).
        pytest.param([-0.5, 0.5, 1.5], 8 / 27, id="half a spread"),
    ],
)
def test_the_bootstrap_by_hand(differences, p):
    assert bootstrap_p(np.array(differences)) == pytest.approx(p, abs=1e-4 if p in (0.0001, 1) else 0.02)


def test_the_bootstrap_of_three_seeds_is_surer_than_the_t_test_and_than_any_test_of_signs():
    differences = np.array([0.01, 0.02, 0.03])
    assert bootstrap_p(differences) < 0.001 < 0.05 < paired_t_p(differences) < smallest_sign_p(3) == 0.25


def test_holm_by_hand():
    # 0.01 x 3, 0.03 x 2, and 0.04 x 1 is not below the one before it.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("images", "heights", "area"),
    [
        pytest.param((10, 20, 30), [0.0, 0.4, 0.4], 0.3, id="even"),
        pytest.param((10, 20, 40), [0.0, 0.4, 0.4], (2 + 8) / 30, id="uneven"),
        pytest.param((10,), [0.3], 0.3, id="one cycle"),
        pytest.param((9, 9), [0.2, 0.4], 0.3, id="nothing left to annotate"),
    ],
)
def test_the_area_under_a_curve_by_hand(images, heights, area):
    assert area_under(images, np.array([heights, heights])) == pytest.approx([area, area])


@pytest.mark.parametrize(
    ("target", "images"), [(0.05, 10), (0.1, 10), (0.2, 15), (0.3, 20), (0.35, 25), (0.4, 30), (0.41, None)]
)
def test_the_images_to_reach_a_height_lie_on_the_line_between_cycles(target, images):
    reached = images_to_reach([10, 20, 30], np.array([0.1, 0.3, 0.4]), target)
    assert reached == (None if images is None else pytest.approx(images))


@pytest.mark.parametrize(("heights", "images"), [([0.5, 0.3, 0.5], 25), ([0.5, 0.5, 0.3], None)])
def test_a_curve_that_falls_again_has_not_reached_its_height_yet(heights, images):
    assert images_to_reach([10, 20, 30], np.array(heights), 0.4) == (None if images is None else pytest.approx(images))


def test_a_resampled_test_set_counts_each_image_as_often_as_it_is_drawn():
    # Image 0: found. Image 1: missed. So the precision is 1 up to a recall of the share of the draws that are image 0.
    found = {"a": (np.array([0]), np.array([True]))}
    heights = resampled_map_50(found, {"a": [1, 1]}, 2000)
    assert set(np.round(heights, 6)) == {0.0, round(51 / 101, 6), 1.0}
    assert np.mean(heights == 1) == pytest.approx(0.25, abs=0.04)


def test_a_class_that_a_resampled_set_lacks_is_left_out_of_its_mean():
    none = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    found = {"a": (np.array([0]), np.array([True])), "b": none}
    heights = resampled_map_50(found, {"a": [1, 0], "b": [0, 1]}, 500)
    # Both classes: (1 + 0) / 2; only a: 1; only b: 0.
    assert set(np.round(heights, 3)) == {0.0, 0.5, 1.0}
