"""The benchmark's report: statistics by hand, tables from made-up runs, and what is said of them."""

import json
import math

import numpy as np
import pytest
from matplotlib import pyplot as plt

from model.comparison import Compared, resampled_map_50
from scripts.benchmark_claims import claims
from scripts.benchmark_lines import parse_line
from scripts.benchmark_measures import matches
from scripts.benchmark_plots import _figure_2, _figure_reliability
from scripts.benchmark_report import make_report, write_report, write_reports
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
from scripts.benchmark_text import markdown

# --- statistics


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


# --- tables


def made_run(line, seed, heights, images=(10, 20, 30), instances=2, precision=None, **settings):
    """What a run with these values of mAP@0.5 would leave."""
    reliability = {"spearman": 0.5, "calibration_error": 0.1, "bins": [[0.55, 0.5, 6], [0.9, 0.8, 3]], "count": 9}
    shared = {"data": "made up", "pool_images": 100, "pool_instances": 300, "test_images": 2, "profile": "p",
              "pool": "digest", "test": "digest",
              "weights": "none", "first_batch": 10, "batch": 10, "cycles": 3, "network": {"min_size": 64},
              "training": {"epochs": 1, "min_steps": 2, "batch_size": 3}}  # fmt: skip
    name = parse_line(line, seed)
    clocks = {"cpu": 3.0 if name.semi_supervised else 2.0, "wall": 4.0}
    cycles = [
        {"number": n, "annotated_images": count, "annotated_instances": instances * count,
         "annotated_vertices": 10 * count, "new_images": 10, "new_empty_images": n, "annotated": [f"{seed}-{n}"],
         "pseudo_images": 4 if name.semi_supervised and n > 1 else 0,
         "pseudo_quality": {"instances": 5, "precision": precision, "recall": 0.2} if n > 1 and precision else None,
         "seconds": {"training": clocks, "evaluation": clocks, **({"scoring": clocks} if n < len(heights) else {})},
         "map_50": height, "map_50_95": height / 2, "ap_50_by_class": {"a": height, "b": None},
         "rescored_map_50": height, "rescored_map_50_95": height / 2 + 0.01,
         "box_reliability": reliability, "mask_reliability": {**reliability, "bins": []}, "matches": None}
        for n, (count, height) in enumerate(zip(images, heights, strict=False), start=1)
    ]  # fmt: skip
    return {
        "strategy": name.strategy,
        "semi_supervised": name.semi_supervised,
        "options": dict(name.options),
        "line": line,
        "seed": seed,
        "settings": {**shared, **settings},
        "test_instances": {"a": [1, 1], "b": [0, 0]},
        "cycles": cycles,
    }


def write_runs(folder, *runs):
    for state in runs:
        path = folder / f"{state['line']}-seed{state['seed']}" / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(state))


def test_a_line_has_means_intervals_areas_and_the_images_to_reach_full_supervision():
    runs = [made_run("tsp", 0, [0.1, 0.3, 0.5]), made_run("tsp", 1, [0.3, 0.5, 0.7])]
    full = made_run("full", 0, [0.5], images=[100])
    report = make_report([*runs, full, made_run("random", 0, [0.2])])
    assert list(report["lines"]) == ["tsp"]
    assert report["unfinished"] == [{"run": "random-seed0", "cycles": 1, "of": 3}]
    line = report["lines"]["tsp"]
    assert line["seeds"] == [0, 1]
    assert line["map_50"] == pytest.approx([0.2, 0.4, 0.6])
    assert line["map_50_half_width_95"] == pytest.approx([1.2706] * 3, abs=1e-4)
    assert line["area_under_curve"] == pytest.approx(0.4)
    assert {share: value["images"] for share, value in line["images_to_reach"].items()} == pytest.approx(
        {"80": 20, "90": 23, "95": 24, "100": 25}  # of 22.5 and 23.75: nobody annotates half an image
    )
    assert line["images_to_reach"]["90"] == {
        "images": 23,
        "share_of_images": pytest.approx(0.23),
        "share_of_instances": pytest.approx(2 * 22.5 / 300),
        "from_the_first_cycle": False,
        "images_by_seed": [28, 18],
    }
    assert line["over_full_supervision"] == [  # of the one seed that both have
        {"difference": pytest.approx(value), "half_width_95": 0.0, "seeds": 1} for value in (-0.4, -0.2, 0.0)
    ]
    assert line["annotated_instances"] == [20, 40, 60]
    assert line["seconds"] == {"training": 6, "evaluation": 6, "scoring": 4}
    assert line["empty_images_share"] == pytest.approx((2 + 3) / 20)
    full = report["full_supervision"]
    assert (full["map_50"], full["images"]) == (0.5, 100)
    assert (full["annotation_minutes"], full["annotation_dollars"]) == (400, 850)
    assert report["comparisons"] == []


def test_annotation_costs_the_papers_rates_by_image_and_as_much_for_the_whole_pool_by_instance():
    line = make_report([made_run("tsp", 0, [0.1, 0.2, 0.3], instances=6)])["lines"]["tsp"]
    assert (line["annotation_minutes"], line["annotation_dollars"]) == (120, 255)
    # 180 instances where 30 images of the pool have 90.
    assert (line["annotation_minutes_by_instance"], line["annotation_dollars_by_instance"]) == (240, 510)
    assert line["map_50_per_100_instances"] == pytest.approx(0.3 * 100 / 180)
    assert line["map_50_per_1000_vertices"] == pytest.approx(0.3 * 1000 / 300)


def test_pseudo_labels_cost_time_against_the_same_line_without_them():
    lines = ("tsp", "tsp+ssl@beta=0.05", "random+ssl")
    report = make_report([made_run(line, 0, [0.1] * 3, precision=0.9) for line in lines])
    assert report["lines"]["tsp+ssl@beta=0.05"]["training_time_over_supervised"] == pytest.approx(1.5)
    assert report["lines"]["random+ssl"]["training_time_over_supervised"] is None
    assert report["lines"]["tsp"]["training_time_over_supervised"] is None
    assert [cycle["precision"] for cycle in report["lines"]["random+ssl"]["pseudo"]] == [None, 0.9, 0.9]


def test_seconds_that_were_lost_count_like_those_of_the_other_cycles():
    run = made_run("tsp", 0, [0.1] * 3)
    run["cycles"][2]["seconds"]["training"] = None
    assert make_report([run])["lines"]["tsp"]["seconds"]["training"] == 6


def test_the_differences_to_random_are_paired_by_seed():
    runs = [made_run("random", seed, [0.1, 0.1 + seed, 0.2]) for seed in (0, 1, 2)]
    runs += [made_run("tsp", seed, [0.1, 0.15 + seed, 0.25 + seed / 10]) for seed in (0, 1)]
    line = make_report(runs)["lines"]["tsp"]
    assert line["second_cycle_over_random"]["difference"] == pytest.approx(0.05)
    assert line["second_cycle_over_random"]["half_width_95"] == pytest.approx(0, abs=1e-9)
    assert line["second_cycle_over_random"]["seeds"] == 2
    assert line["last_cycle_over_random"]["difference"] == pytest.approx(0.1)


def test_lines_that_are_the_same_runs_count_once_in_the_correction():
    curves = {"random": 0.1, "random+ssl": 0.1, "tsp": 0.3, "tsp@empty_policy=last": 0.3, "core_set": 0.2}
    runs = [
        made_run(line, seed, [height + seed * (0.01 + height / 50)] * 3)
        for line, height in curves.items()
        for seed in range(3)
    ]
    report = make_report(runs)
    found = {(c["one"], c["other"]): c for c in report["comparisons"]}
    # tsp and core_set against random are two; all others are the same as one of these, or no difference at all.
    p_values = [found[line, "random"]["p"] for line in ("tsp", "core_set")]
    corrected = dict(zip(("tsp", "core_set"), holm(p_values), strict=True))
    for line, expected in (*corrected.items(), ("tsp@empty_policy=last", corrected["tsp"])):
        for other in ("random", "random+ssl"):
            assert found[line, other]["p_holm"] == expected
    assert found["tsp@empty_policy=last", "tsp"]["p_holm"] == 1
    told = claims(report)
    assert "**tsp@empty_policy=last** is the same as tsp (3 seeds): what it does otherwise changed nothing." in told
    assert "**random+ssl** is the same as random (3 seeds): what it does otherwise changed nothing." in told


def test_lines_that_measure_the_same_from_other_images_are_not_the_same_runs():
    """Where nothing is learnt, all lines measure 0."""
    runs = [made_run(line, seed, [0.0] * 3) for line in ("random", "tsp") for seed in range(2)]
    runs[-1]["cycles"][1]["annotated"] = ["another"]
    assert "**tsp** measures the same as random (2 seeds), from other images." in claims(make_report(runs))


def test_lines_are_compared_with_random_with_random_ssl_and_with_their_twin_and_corrected_together():
    heights = {"random": 0.1, "random+ssl": 0.2, "tsp": 0.3, "tsp+ssl@beta=0.05": 0.5, "core_set": 0.4}
    runs = [
        made_run(line, seed, [height + seed * (0.001 + height / 50)] * 3)
        for line, height in heights.items()
        for seed in (0, 1, 2)
        if (line, seed) not in {("core_set", 1), ("core_set", 2)}  # one seed is too few
    ]
    found = make_report(runs)["comparisons"]
    assert sorted((c["one"], c["other"]) for c in found) == [
        ("random+ssl", "random"),
        ("tsp", "random"),
        ("tsp", "random+ssl"),
        ("tsp+ssl@beta=0.05", "random"),
        ("tsp+ssl@beta=0.05", "random+ssl"),
        ("tsp+ssl@beta=0.05", "tsp"),
    ]
    assert {c["seeds"] for c in found} == {3}
    assert next(c for c in found if c["other"] == "tsp")["difference"] == pytest.approx(0.2 + 0.2 / 50)
    smallest = min(found, key=lambda c: c["p"])
    assert smallest["p_holm"] == pytest.approx(6 * smallest["p"])
    assert all(c["bootstrap_p_holm"] >= c["bootstrap_p"] for c in found)


def test_pseudo_labels_by_another_recipe_are_compared_with_random_images_by_the_same():
    recipe = "+ssl@beta=0.5@rule=precision"
    heights = {"random": 0.1, "random" + recipe: 0.2, "tsp" + recipe: 0.5}
    report = make_report(
        [made_run(line, seed, [h + seed * h / 50] * 3) for line, h in heights.items() for seed in (0, 1)]
    )
    pairs = {(c["one"], c["other"]) for c in report["comparisons"]}
    assert ("tsp" + recipe, "random" + recipe) in pairs
    said = claims(report)
    assert any(claim.startswith(f"**tsp{recipe}**") and f"than random{recipe}" in claim for claim in said)
    assert any(f"At the second cycle tsp{recipe} is" in claim for claim in said)


def test_a_comparison_has_an_interval_over_the_test_images_when_the_matches_are_there():
    runs = [made_run(line, seed, [0.1 + seed / 10] * 3) for line in ("random", "tsp") for seed in (0, 1)]
    for run in runs:  # tsp finds the one instance of each test image at one of two seeds, random none
        found = [perfect(image) for image in (0, 1)] if run["line"] == "tsp" and run["seed"] == 0 else []
        run["cycles"][-1]["matches"] = matches(found, ("a", "b"))
    begun = {**runs[0], "line": "hybrid", "strategy": "hybrid"}  # a line that has only one of them changes nothing
    for known in (runs, [*runs, begun]):
        [comparison] = make_report(known)["comparisons"]
        assert comparison["test_images_interval_95"] == [0.5, 0.5]


def perfect(image):
    """A detection in that image which is its instance of the class a."""
    one = np.array([1.0])
    scores = {"class_scores": one, "box_scores": one, "mask_scores": one}
    return Compared(image=image, label=1, instances=1, **scores, box_ious=one[:, None], mask_ious=one[:, None])


def test_reliability_is_put_together_over_all_runs():
    runs = [made_run("tsp", seed, [0.1] * 3) for seed in (0, 1)]
    runs[1]["cycles"][-1]["box_reliability"]["bins"] = [[0.52, 0.6, 2]]
    assert make_report(runs)["reliability"] == {
        "box": [pytest.approx([(0.55 * 6 + 0.52 * 2) / 8, (0.5 * 6 + 0.6 * 2) / 8, 8]), pytest.approx([0.9, 0.8, 3])],
        "mask": [],
    }


# --- words


def test_the_report_says_what_cannot_be_told_apart_what_only_seems_and_what_is():
    noise = {0: -0.004, 1: 0.0, 2: 0.004, 3: 0.0}
    gains = {"random": 0.0, "tsp": 0.1, "core_set": 0.003, "hybrid": 0.006}
    heights = {
        (line, seed): [0.2 + gain + (noise[seed] if line in ("core_set", "hybrid") else 0.0001 * seed)] * 3
        for line, gain in gains.items()
        for seed in noise
    }
    said = claims(make_report([made_run(line, seed, values) for (line, seed), values in heights.items()]))
    assert any("**tsp** is better than random" in sentence for sentence in said)
    assert any("**core_set** cannot be told apart from random" in sentence for sentence in said)
    assert any("**hybrid** looks better than random, but not after correction" in sentence for sentence in said)
    assert any("With 4 seeds even 4 differences of one sign come by chance with p = 0.125" in s for s in said)


def test_pseudo_labels_of_randomly_chosen_images_are_held_against_random():
    heights = {"random": 0.2, "random+ssl": 0.1}
    runs = [
        made_run(line, seed, [height + 0.001 * seed * height] * 3, precision=0.9)
        for line, height in heights.items()
        for seed in range(3)
    ]
    report = make_report(runs)
    [said] = [sentence for sentence in claims(report) if "**random+ssl**" in sentence]
    assert said.startswith("**random+ssl** is worse than random (-0.100 ")
    assert "| `random+ssl` | `random` | 3 | -0.100 " in markdown(report, {})


@pytest.mark.parametrize(
    ("heights", "said"),
    [
        pytest.param(
            [0.1, 0.3, 0.5],
            "The mean curve of tsp+ssl reaches full supervision (0.300 with all 100 images) at 20 images (20 % of the "
            "pool's images, 13 % of its instances). Minus full supervision of the same seed, by cycle: -0.200, +0.000, "
            "+0.200.",
            id="reached",
        ),
        pytest.param([0.4, 0.4, 0.4], "images) at or before 10 images (10 %", id="at once"),
        pytest.param(
            [0.1, 0.2, 0.27],
            "The mean curve of tsp+ssl ends below full supervision (0.300 with all 100 images). Minus",
            id="not reached",
        ),
    ],
)
def test_the_claim_that_few_labels_do_what_all_do_is_checked(heights, said):
    report = make_report([made_run("tsp+ssl", 0, heights, precision=0.9), made_run("full", 0, [0.3], images=[100])])
    assert any(said in sentence for sentence in claims(report))


def test_the_labels_for_what_random_ones_bring_are_those_of_the_same_seeds():
    random = [made_run("random", 0, [0.1, 0.2, 0.4]), made_run("random", 1, [0.1, 0.2, 0.2])]
    chosen = [made_run("tsp+ssl", seed, [0.1, 0.4, 0.4], instances=3, precision=0.9) for seed in range(3)]
    report = make_report([*random, *chosen])
    assert report["lines"]["random"]["images_to_reach_random"]["images"] == 30
    # The mean of the two seeds that both have ends at 0.3: after two thirds of the way from 0.1 to 0.4.
    assert report["lines"]["tsp+ssl"]["images_to_reach_random"] == {
        "images": 17,
        "share_of_images": pytest.approx(17 / 30),
        "share_of_instances": pytest.approx(3 * (10 + 20 / 3) / 60),
        "from_the_first_cycle": False,
        "images_by_seed": [20, 14],
    }
    said = (
        "The mean curve of tsp+ssl reaches random's last cycle at 17 images (57 % of random's images, 83 % of its "
        "instances; each seed by itself: 20, 14)."
    )
    assert any(sentence.startswith(said) for sentence in claims(report))
    assert "| `tsp+ssl` | 17 images: 57 %, 83 % of the instances (2 of 2) |" in markdown(report, {})


def test_a_seed_that_gets_there_counts_although_the_mean_does_not():
    full = [made_run("full", seed, [0.5], images=[100]) for seed in range(2)]
    report = make_report([made_run("tsp", 0, [0.1, 0.2, 0.6]), made_run("tsp", 1, [0.1, 0.2, 0.3]), *full])
    reached = report["lines"]["tsp"]["images_to_reach"]["100"]
    assert (reached["images"], reached["images_by_seed"]) == (None, [28, None])
    assert "| not reached (1 of 2) |" in markdown(report, {})


def test_a_line_that_trains_another_network_is_told_by_its_first_cycle():
    """core_set's may differ in a digit when another machine has trained it."""
    lines = {"random": [0.1, 0.2, 0.3], "mc_dropout": [0.05, 0.2, 0.3], "core_set": [0.11, 0.3, 0.3]}
    report = make_report([made_run(line, 0, heights) for line, heights in lines.items()])
    told = [sentence for sentence in claims(report) if "in the first cycle already" in sentence]
    assert len(told) == 1
    assert told[0].startswith("mc_dropout is -0.050 against random in the first cycle already, on the same images")


@pytest.mark.parametrize(("end", "is_target"), [(0.019, False), (0.03, True)])
def test_random_images_that_taught_next_to_nothing_are_no_target(end, is_target):
    runs = [made_run("random", 0, [0.001, 0.002, end]), made_run("tsp+ssl", 0, [0.001, 0.01, 0.1], precision=0.9)]
    report = make_report(runs)
    assert (report["lines"]["tsp+ssl"]["images_to_reach_random"] is not None) == is_target
    assert any("random's last cycle" in sentence for sentence in claims(report)) == is_target


def test_another_first_batch_is_not_taken_for_another_network():
    other = made_run("mc_dropout@first=spread", 0, [0.3, 0.3, 0.3])
    other["cycles"][0]["annotated"] = ["others"]
    report = make_report([made_run("random", 0, [0.1, 0.2, 0.3]), other])
    assert report["lines"]["mc_dropout@first=spread"]["first_cycle_over_random"] is None


def test_a_line_is_compared_with_the_one_that_it_changes_in_one_way():
    lines = ("random", "tsp", "tsp+ssl", "tsp@first=spread", "tsp_without_box", "tsp_without_box_and_mask+ssl")
    report = make_report([made_run(line, seed, [0.1, 0.2, 0.3]) for line in lines for seed in range(2)])
    pairs = {(c["one"], c["other"]) for c in report["comparisons"]}
    assert {
        ("tsp@first=spread", "tsp"),
        ("tsp_without_box", "tsp"),
        ("tsp_without_box_and_mask+ssl", "tsp+ssl"),
    } < pairs
    assert all(one != other for one, other in pairs)


@pytest.mark.parametrize(
    ("full", "said", "random_is_target"),
    [
        pytest.param(
            [0.0, 0.01, 0.002], "(0.004 ± 0.013) cannot be told apart from 0: it is no reference", False, id="0"
        ),
        pytest.param([0.019], "(0.019) cannot be told apart from 0: it is no reference", False, id="0, one seed"),
        pytest.param(
            [0.25, 0.26, 0.255],
            "(0.255 ± 0.012) is below random's last cycle (0.400 with 30 images): it is no reference",
            True,
            id="below random",
        ),
    ],
)
def test_nothing_is_said_of_reaching_a_full_supervision_that_is_no_reference(full, said, random_is_target):
    runs = [made_run(line, 0, [0.1, 0.3, 0.4], precision=0.9) for line in ("random", "tsp+ssl")]
    runs += [made_run("full", seed, [height], images=[100]) for seed, height in enumerate(full)]
    report = make_report(runs)
    about_full = [sentence for sentence in claims(report) if "ull supervision" in sentence]
    assert len(about_full) == 1
    assert said in about_full[0]
    assert report["lines"]["tsp+ssl"]["images_to_reach"] == {}
    labels_needed = markdown(report, {}).partition("## Labels needed")[2].partition("## Cost")[0]
    assert "full supervision" not in labels_needed
    row = "| `tsp+ssl` | 30 images: 100 %, 100 % of the instances (1 of 1) |"
    assert (row in labels_needed) == random_is_target
    claimed = [
        sentence.startswith("The mean curve of tsp+ssl reaches random's last cycle") for sentence in claims(report)
    ]
    assert any(claimed) == random_is_target


def test_full_supervision_of_other_seeds_gives_no_differences():
    report = make_report([made_run("tsp+ssl", 0, [0.1, 0.3, 0.5], precision=0.9), made_run("full", 1, [0.3])])
    [said] = [sentence for sentence in claims(report) if "reaches full supervision" in sentence]
    assert said.endswith("of its instances).")


def test_a_seed_that_is_there_at_once_may_have_needed_less():
    runs = [made_run("tsp+ssl", seed, [first, 0.3, 0.5], precision=0.9) for seed, first in enumerate((0.1, 0.4))]
    report = make_report([*runs, *(made_run("full", seed, [0.3], images=[100]) for seed in range(2))])
    assert any("; each seed by itself: 20, at most 10)" in sentence for sentence in claims(report))


def test_pseudo_labels_that_never_came_about_are_mentioned():
    assert any("no pseudo labels" in s for s in claims(make_report([made_run("tsp+ssl", 0, [0.1] * 3)])))


# --- files


def test_the_report_is_written_beside_the_runs_with_all_its_figures(tmp_path, capsys):
    lines = ("random", "tsp", "random+ssl", "tsp+ssl", "tsp+ssl@beta=0.05", "tsp@first=spread")
    runs = [made_run(line, seed, [0.1, 0.2 + seed / 50, 0.3], precision=0.9) for line in lines for seed in (0, 1)]
    write_runs(tmp_path, *runs, made_run("full", 0, [0.4], images=[100]), made_run("hybrid", 0, [0.1]))
    report = write_report(tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    pictures = {"figure2.png", "figure4.png", "options.png", "cost.png", "pseudo.png", "reliability.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    for picture in pictures:
        assert f"]({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / picture).stat().st_size < 200_000
    output = capsys.readouterr()
    assert output.out == ""
    assert all(name in output.err for name in {"report.md", "report.json", *pictures})
    assert "- `hybrid-seed0`: 1 of 3 cycles" in text
    for line in lines:
        assert f"| `{line}` |" in text


@pytest.mark.parametrize(
    ("lines", "drawn"),
    [
        pytest.param(["random", "tsp", "tsp+ssl", "tsp_expected"], False, id="only what Figure 2 shows"),
        pytest.param(["tsp", "tsp_without_box"], True, id="without a score"),
        pytest.param(["tsp", "random+ssl"], True, id="pseudo labels with another strategy"),
        pytest.param(["tsp", "tsp+ssl@beta=0.05"], True, id="another beta"),
    ],
)
def test_the_figure_of_ablations_is_drawn_only_if_there_are_any(tmp_path, lines, drawn):
    write_runs(tmp_path, *(made_run(line, 0, [0.1, 0.2, 0.3]) for line in lines))
    write_report(tmp_path)
    assert (tmp_path / "figure4.png").exists() == drawn


@pytest.mark.parametrize("twins_line", ["tsp+ssl", "tsp+ssl_by_precision"])
def test_a_line_can_be_told_from_its_twin_with_pseudo_labels_and_no_interval_is_cut(twins_line):
    heights = {0: [0.1, 0.1, 0.1], 1: [0.1, 0.2, 0.4]}  # 0.25 +- 1.9 at the end
    report = make_report([made_run(line, seed, heights[seed]) for line in ("tsp", twins_line) for seed in heights])
    figure = _figure_2(report)
    [axes] = figure.axes
    one, twin = (container.lines[0] for container in axes.containers)
    assert one.get_markerfacecolor() != twin.get_markerfacecolor() == one.get_color() == twin.get_color()
    below, above = axes.get_ylim()
    for line in report["lines"].values():
        for height, width in zip(line["map_50"], line["map_50_half_width_95"], strict=True):
            assert below < height - width <= height + width < above
    plt.close(figure)


def test_the_figure_of_reliability_says_whose_it_is():
    for lines, said in (
        (["tsp"], "Last cycle of tsp, 1 seed"),
        (["tsp", "random"], "Last cycle of 2 lines together, 1 seed"),
    ):
        figure = _figure_reliability(make_report([made_run(line, 0, [0.1, 0.2, 0.3]) for line in lines]))
        assert figure.get_suptitle() == said
        plt.close(figure)


def test_a_report_of_unfinished_runs_says_so(tmp_path):
    write_runs(tmp_path, made_run("random", 0, [0.2]))
    report = write_report(tmp_path)
    assert report["lines"] == {}
    assert "No line is finished." in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_every_table_of_a_single_finished_run_can_be_written():
    text = markdown(make_report([made_run("tsp", 0, [0.1, 0.2, 0.3])]), {})
    assert "| `tsp` | 1 |" in text
    assert "Anchor sizes and the number of detections come from the labels of the whole pool" in text


def test_what_is_alike_for_all_lines_is_told_from_the_lowest_to_the_highest():
    lines = ("tsp", "random", "tsp+ssl")
    said = claims(make_report([made_run(line, 0, [0.1, 0.2, 0.3], precision=0.9) for line in lines]))
    assert "m ranks the true mask IoU with a Spearman correlation of 0.50 (by line)." in said
    assert "Ranking by c x m instead of c: +1.0 points of mAP@[.5:.95] (by line)." in said
    assert any("Trainings with pseudo labels take 1.50 times as long as those without" in s for s in said)


@pytest.mark.parametrize("lines", [["random"], ["random", "tsp", "full"]])
def test_runs_of_a_single_cycle_have_a_report(tmp_path, lines):
    write_runs(tmp_path, *(made_run(line, 0, [0.2], cycles=1) for line in lines))
    report = write_report(tmp_path)
    assert set(report["lines"]) == {*lines} - {"full"}
    for line in report["lines"]:
        assert report["lines"][line]["second_cycle_over_random"] is None
        assert f"| `{line}` | 1 |" in (tmp_path / "report.md").read_text()


def test_runs_of_different_settings_are_not_compared(tmp_path):
    write_runs(tmp_path, made_run("random", 0, [0.1] * 3), made_run("tsp", 0, [0.2] * 3, profile="q"))
    with pytest.raises(ValueError, match="random-seed0 and tsp-seed0 were made with different settings"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("{ not", "got what is no JSON", id="no JSON"),
        pytest.param("{}", "got other JSON", id="an empty object"),
        pytest.param("[]", "got other JSON", id="a list"),
        pytest.param(json.dumps({**made_run("random", 0, [0.1]), "settings": {}}), "got other", id="no settings"),
        pytest.param(json.dumps({**made_run("random", 0, [0.1]), "cycles": [{}]}), "got other", id="an empty cycle"),
    ],
)
def test_a_damaged_run_is_named_with_what_to_do(tmp_path, text, said):
    folder = tmp_path / "random-seed0"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        write_report(tmp_path)
    assert str(refused.value).startswith(f"{folder / 'run.json'}: expected the run.json of a run")
    assert str(refused.value).endswith("delete it, and the same command makes it anew")


def test_a_run_that_cannot_be_read_is_not_to_be_deleted(tmp_path):
    (tmp_path / "random-seed0" / "run.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory$"):
        write_report(tmp_path)


def test_a_folder_of_benchmarks_gets_a_report_each(tmp_path):
    for name in ("one", "two"):
        write_runs(tmp_path / name, made_run("random", 0, [0.1] * 3, data=name))
    assert [path.name for path in write_reports(tmp_path)] == ["one", "two"]
    assert (tmp_path / "two" / "report.md").read_text().startswith("# Label efficiency on two")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected results .* found none; `benchmark run` makes them"):
        write_reports(tmp_path)
