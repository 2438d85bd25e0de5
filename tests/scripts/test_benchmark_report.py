"""The tables of the benchmark's report, from made-up runs."""

import numpy as np
import pytest

from model.comparison import Compared
from scripts.benchmark_claims import claims
from scripts.benchmark_measures import matches
from scripts.benchmark_report import make_report
from scripts.benchmark_statistics import (
    holm,
)
from tests.scripts.made_runs import made_run


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
