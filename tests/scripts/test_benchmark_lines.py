"""Lines of the benchmark as people write them: what is understood, what is refused, and what runs share."""

from dataclasses import replace

import pytest

from model.config import PseudoLabelConfig, TrainingConfig
from scripts.benchmark_lines import (
    RECIPES,
    Experiment,
    Selection,
    changed_from,
    parse_line,
    random_alike,
    settings_of,
    strategy_of,
    supervised_settings,
    supervised_twin,
)

EXPERIMENT = Experiment(
    profile="efficientnet_lite0_fpn",
    weights="none",
    network={},
    training=TrainingConfig.for_cpu(),
    first_batch=3,
    batch=2,
    cycles=2,
)


def settings(line):
    return settings_of(parse_line(line, 5), EXPERIMENT)


@pytest.mark.parametrize(
    ("line", "part", "name", "value"),
    [
        ("tsp+ssl@beta=0.05", "training", "beta", 0.05),
        ("full@epochs=3", "training", "epochs", 3),
        ("tsp@schedule=step", "training", "schedule", "step"),
        ("tsp@milestones=45-49", "training", "milestones", (45, 49)),
        ("tsp@gradient_clip=none", "training", "gradient_clip", None),
        ("tsp@gradient_clip=2", "training", "gradient_clip", 2.0),
        ("tsp+ssl@class_threshold=0.7", "pseudo", "class_threshold", 0.7),
        ("tsp+ssl@rule=or", "pseudo", "rule", "or"),
        ("tsp@first=spread", "selection", "first", "spread"),
        ("tsp@queue_threshold=0.0", "selection", "queue_threshold", 0.0),
        ("tsp@empty_policy=first", "selection", "empty_policy", "first"),
        ("hybrid@candidates=8", "selection", "candidates", 8),
    ],
)
def test_an_option_changes_its_field_and_nothing_else(line, part, name, value):
    plain = settings(line.split("@")[0])
    expected = replace(plain, **{part: replace(getattr(plain, part), **{name: value})})
    assert settings(line) == expected


def test_a_line_has_one_name_however_its_options_are_ordered():
    one, other = parse_line("tsp+ssl@first=spread@beta=0.05", 1), parse_line("tsp+ssl@beta=0.05@first=spread", 1)
    assert one == other
    assert one.folder == "tsp+ssl@beta=0.05@first=spread-seed1"


def test_a_recipe_stands_for_its_options_and_can_be_varied():
    by_name = settings("tsp+ssl_by_precision")
    spelt_out = "@".join(f"{name}={value}" for name, value in RECIPES["ssl_by_precision"].items())
    assert by_name == settings(f"tsp+ssl@{spelt_out}")
    assert parse_line(f"tsp+ssl@{spelt_out}", 1).folder == "tsp+ssl_by_precision-seed1"
    varied = parse_line("tsp+ssl_by_precision@precision=0.8", 1)
    assert varied.line == "tsp+ssl_by_precision@precision=0.8"
    assert settings(varied.line).pseudo == replace(by_name.pseudo, precision=0.8)
    assert supervised_twin(varied).line == "tsp"
    assert random_alike(varied.line) == "random+ssl_by_precision@precision=0.8"
    otherwise = parse_line("tsp+ssl_by_precision@pseudo_every_steps=4", 1)  # varies what the recipe says
    assert otherwise.line == "tsp+ssl_by_precision@pseudo_every_steps=4"
    assert parse_line(otherwise.line, 1) == otherwise
    assert changed_from(otherwise.line) == "tsp+ssl_by_precision"
    few = parse_line("tsp+ssl@beta=0.5@rule=precision", 1)  # of five that the recipe has a say on
    assert few.line == "tsp+ssl@beta=0.5@rule=precision"


def test_the_seed_of_the_run_is_that_of_its_training():
    assert settings("tsp").training.seed == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("best", r"expected random, .* or full, got 'best'"),
        ("tsp+sll", "got 'tsp\\+sll'"),
        ("full+ssl", "got 'full\\+ssl'"),
        ("tsp@betta=1", r"there is no option 'betta' for tsp; there are .*epochs"),
        (
            "tsp@beta=0.05",
            r"there is no option 'beta' for tsp; with \+ssl there is; there are batch_size",
        ),  # without pseudo labels it would change nothing
        ("full@first=spread", r"there is no option 'first' for full;"),
        ("tsp@candidates=8", r"there is no option 'candidates' for tsp;"),
        ("tsp@seed=1", r"there is no option 'seed'"),
        ("tsp@epochs=few", "epochs: expected a whole number, got 'few'"),
        ("tsp@epochs", "epochs: expected a whole number, got ''"),
        ("tsp@epochs=0", "epochs: expected at least 1, got 0"),
        ("tsp@first=best", "first: expected random or spread, got 'best'"),
        ("tsp@empty_policy=never", "empty_policy: expected first, last, median, got 'never'"),
        ("tsp@queue_threshold=2", "queue_threshold: expected 0 to 1, got 2"),
        ("hybrid@candidates=0", "candidates: expected at least 1, got 0"),
        ("tsp@milestones=45,49", "milestones: expected numbers with '-' between them"),
        ("tsp@epochs=1@epochs=2", "gives an option twice"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(line, message):
    with pytest.raises(ValueError, match=message):
        parse_line(line, 0)


def test_the_hybrid_strategy_gets_its_candidates_and_the_others_stay_as_they_are():
    assert strategy_of(parse_line("hybrid", 0), Selection(candidates=8)).candidates == 8
    assert strategy_of(parse_line("hybrid", 0), Selection()).candidates == 4


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("tsp+ssl", True),
        ("tsp+ssl@beta=0.05@class_threshold=0.5", True),
        ("tsp@queue_threshold=0.5", True),
        ("tsp@epochs=3", False),
        ("tsp@ema_decay=0.9", False),  # averages the weights also without pseudo labels
    ],
)
def test_cycles_without_pseudo_labels_are_shared_when_they_are_trained_alike(line, same):
    assert (supervised_settings(settings(line)) == supervised_settings(settings("random"))) == same


def test_the_twin_without_pseudo_labels_keeps_only_what_concerns_it():
    name = parse_line("tsp+ssl@beta=0.05@class_threshold=0.5@first=spread", 2)
    assert supervised_twin(name) == parse_line("tsp@first=spread", 2)


def test_the_defaults_are_the_papers():
    assert settings("tsp+ssl").pseudo == PseudoLabelConfig()
    assert settings("tsp+ssl").training.beta == 0.01
