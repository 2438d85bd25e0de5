"""What the benchmark's report says in words, from made-up runs."""

import pytest

from scripts.benchmark_claims import claims
from scripts.benchmark_report import make_report
from scripts.benchmark_text import markdown
from tests.scripts.made_runs import made_run


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
    said = claims(make_report([made_run("tsp+ssl", 0, [0.1] * 3)]))
    assert "tsp+ssl: no prediction was ever trusted, so there were no pseudo labels to learn from." in said


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ((0.6, 0.3), "ends below full supervision (0.500 with all 100 images); each seed by itself: 28, never."),
        ((0.4, 0.3), "ends below full supervision (0.500 with all 100 images); so does each seed's own."),
    ],
)
def test_where_the_mean_curve_ends_below_the_seeds_are_told_apart(last, said):
    full = [made_run("full", seed, [0.5], images=[100]) for seed in range(2)]
    chosen = [made_run("tsp+ssl", seed, [0.1, 0.2, end], precision=0.9) for seed, end in enumerate(last)]
    sentences = claims(make_report([*chosen, *full]))
    assert any(sentence.startswith(f"The mean curve of tsp+ssl {said}") for sentence in sentences)


def test_what_is_alike_for_all_lines_is_told_from_the_lowest_to_the_highest():
    lines = ("tsp", "random", "tsp+ssl")
    runs = [made_run(line, 0, [0.1, 0.2, 0.3], precision=0.9) for line in lines]
    said = claims(make_report(runs))
    assert "m ranks the true mask IoU with a Spearman correlation of 0.50 (by line)." in said
    assert "Ranking by c x m instead of c: +1.0 points of mAP@[.5:.95] (by line)." in said
    for run in runs:
        run["cycles"][-1]["rescored_map_50_95"] = run["cycles"][-1]["map_50_95"] - 0.0001
    assert "Ranking by c x m instead of c: +0.0 points of mAP@[.5:.95] (by line)." in claims(make_report(runs))
    assert any("Trainings with pseudo labels take 1.50 times as long as those without" in s for s in said)
