import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.empty_images import EmptyImagePolicy
from model.errors import EmptyImageError, InvalidInputError
from model.strategies import Observation
from model.strategies.base import Candidates
from model.tsp import image_score, instance_scores

UNIT = st.floats(0, 1, width=64)
KINDS = [
    pytest.param(lambda values: np.array(values, dtype=np.float32), 1e-6, id="float32 array"),
    pytest.param(lambda values: np.array(values, dtype=np.float64), 1e-12, id="float64 array"),
    pytest.param(lambda values: torch.tensor(values, dtype=torch.float32), 1e-6, id="float32 tensor"),
    pytest.param(lambda values: torch.tensor(values, dtype=torch.float64), 1e-12, id="float64 tensor"),
]

# c, b, m -> s, by hand
EQUATION_2 = [
    # mean (0.9 + 0.6 + 0.3) / 3 = 0.6; deviations 0.3, 0, -0.3; variance 0.18 / 3 = 0.06; std 0.2449489742783178;
    # exp(-0.2449489742783178) = 0.782744477324747; times 0.6
    pytest.param((0.9, 0.6, 0.3), 0.469646686394849, id="three different scores"),
    # std 0, exp(-0) = 1, mean 0.8
    pytest.param((0.8, 0.8, 0.8), 0.8, id="scores that agree"),
    pytest.param((1.0, 1.0, 1.0), 1.0, id="full confidence"),
    pytest.param((0.0, 0.0, 0.0), 0.0, id="no confidence"),
    # mean 1/3; variance ((2/3)^2 + 2 (1/3)^2) / 3 = (4/9 + 2/9) / 3 = 2/9; std 0.4714045207910317;
    # exp(-0.4714045207910317) = 0.624125055778261; over 3
    pytest.param((1.0, 0.0, 0.0), 0.208041685259420, id="one sure, two against"),
]


@pytest.mark.parametrize(("as_kind", "tolerance"), KINDS)
@pytest.mark.parametrize(("triplet", "expected"), EQUATION_2)
def test_instance_score_equals_equation_2_computed_by_hand(triplet, expected, as_kind, tolerance):
    c, b, m = (as_kind([score]) for score in triplet)
    scores = instance_scores(c, b, m)
    assert type(scores) is type(c)
    assert scores.dtype == c.dtype
    assert float(scores[0]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("as_kind", "tolerance"), KINDS)
def test_instances_are_scored_independently_and_in_order(as_kind, tolerance):
    c, b, m = as_kind([0.9, 0.8, 1.0]), as_kind([0.6, 0.8, 0.0]), as_kind([0.3, 0.8, 0.0])
    expected = [0.469646686394849, 0.8, 0.208041685259420]
    assert instance_scores(c, b, m).tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("as_kind", "tolerance"), KINDS)
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # mean 0.6; deviations 0.2, -0.2; std 0.2; exp(-0.2) = 0.818730753077982; times 0.6
        pytest.param([0.8, 0.4], 0.491238451846789, id="two instances"),
        # mean 0.5; variance (0.16 + 0.04 + 0.04 + 0.16) / 4 = 0.1; std 0.31622776601683794;
        # exp(-0.31622776601683794) = 0.728893414110025; times 0.5
        pytest.param([0.9, 0.7, 0.3, 0.1], 0.364446707055012, id="four instances"),
        pytest.param([0.7], 0.7, id="one instance has no spread"),
        pytest.param([0.0, 0.0], 0.0, id="worthless instances"),
    ],
)
def test_image_score_equals_equation_3_computed_by_hand(scores, expected, as_kind, tolerance):
    assert image_score(as_kind(scores)) == pytest.approx(expected, abs=tolerance)


def test_the_deviation_is_that_of_the_population_not_of_a_sample():
    # ddof = 1 would give std sqrt(0.04 + 0.04) = 0.2828 instead of 0.2, and S = 0.4522
    assert image_score(np.array([0.8, 0.4])) == pytest.approx(0.6 * math.exp(-0.2))


def test_an_image_with_steady_instances_scores_higher_than_one_with_the_same_mean_and_more_spread():
    steady, spread = image_score(np.array([0.6, 0.6])), image_score(np.array([0.9, 0.3]))
    assert spread < steady


@pytest.mark.parametrize("empty", [np.zeros(0), np.zeros(0, dtype=np.float32), torch.zeros(0)], ids=str)
def test_an_image_without_instances_has_no_score_unless_one_is_given(empty):
    assert len(instance_scores(empty, empty, empty)) == 0
    with pytest.raises(EmptyImageError, match="at least one detection"):
        image_score(empty)
    assert image_score(empty, when_empty=0.25) == 0.25


def pool_scores(pool, policy):
    """The scores of a pool, from the instance scores of each image."""
    scores = [image_score(instances) if len(instances) else None for instances in pool]
    seen = [Observation(score=score, feature=np.zeros(1)) for score in scores]
    return Candidates(pool=seen, labelled=[], count=1, seed=0, empty_policy=policy).scores


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param(EmptyImagePolicy.FIRST, [0.2, 0.0, 0.6, 0.0, 0.9], id="first"),
        pytest.param(EmptyImagePolicy.LAST, [0.2, 1.0, 0.6, 1.0, 0.9], id="last"),
        pytest.param(EmptyImagePolicy.MEDIAN, [0.2, 0.6, 0.6, 0.6, 0.9], id="median"),
        pytest.param("last", [0.2, 1.0, 0.6, 1.0, 0.9], id="the text of a policy"),
    ],
)
def test_a_policy_places_images_without_detections_in_the_pool(policy, expected):
    pool = [np.array([0.2]), np.zeros(0), np.array([0.6]), np.zeros(0), np.array([0.9])]
    assert pool_scores(pool, policy).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(EmptyImagePolicy.FIRST, 0.0), (EmptyImagePolicy.LAST, 1.0), (EmptyImagePolicy.MEDIAN, 0.0)],
)
def test_a_pool_of_nothing_but_empty_images_has_scores(policy, expected):
    assert pool_scores([np.zeros(0), np.zeros(0)], policy).tolist() == [expected, expected]
    assert pool_scores([], policy).shape == (0,)


def test_an_unknown_policy_is_refused_even_if_no_image_is_empty():
    with pytest.raises(ValueError, match="middle"):
        pool_scores([np.array([0.5])], "middle")


@pytest.mark.parametrize(
    ("c", "b", "m", "message"),
    [
        pytest.param([0.5, 0.5], [0.5], [0.5, 0.5], "2 class_scores, 1 box_scores, 2 mask_scores", id="other lengths"),
        pytest.param([[0.5]], [0.5], [0.5], r"class_scores: expected shape \(N,\), got \(1, 1\)", id="a matrix"),
        pytest.param([0.5], [1.5], [0.5], "box_scores: expected values in .0, 1., got 1.5", id="above 1"),
        pytest.param([0.5], [0.5], [-0.1], "mask_scores: expected values in .0, 1., got -0.1", id="below 0"),
        pytest.param([0.5], [0.5], [math.nan], "mask_scores: expected values in .0, 1., got nan", id="NaN"),
        pytest.param([math.inf], [0.5], [0.5], "class_scores: expected values in .0, 1., got inf", id="infinity"),
    ],
)
def test_scores_of_the_wrong_shape_or_range_are_refused_by_name(c, b, m, message):
    with pytest.raises(InvalidInputError, match=message):
        instance_scores(np.array(c), np.array(b), np.array(m))


@pytest.mark.parametrize("scores", [0.5, [[0.5]], [1.01], [math.nan]], ids=str)
def test_an_image_score_of_bad_instance_scores_is_refused(scores):
    with pytest.raises(InvalidInputError, match="instance_scores"):
        image_score(np.array(scores))


@given(st.lists(st.tuples(UNIT, UNIT, UNIT), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_scores_stay_in_the_unit_interval_and_ignore_order(triplets, random):
    c, b, m = np.array(triplets).T
    scores = instance_scores(c, b, m)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert instance_scores(m, c, b) == pytest.approx(scores, abs=1e-12)
    shuffled = scores.tolist()
    random.shuffle(shuffled)
    score = image_score(scores)
    assert 0 <= score <= 1
    assert image_score(np.array(shuffled)) == pytest.approx(score, abs=1e-12)


@given(st.lists(UNIT, min_size=1, max_size=20))
def test_neither_score_exceeds_the_mean(scores):
    values = np.array(scores)
    assert image_score(values) <= values.mean() + 1e-12


@given(st.lists(UNIT, min_size=1, max_size=20), st.floats(0, 1))
def test_raising_all_scores_alike_raises_the_image_score(scores, share):
    values = np.array(scores)
    raised = values + share * (1 - values.max())
    assert image_score(raised) >= image_score(values) - 1e-12


@given(st.lists(st.lists(UNIT, max_size=5), max_size=6), st.sampled_from(EmptyImagePolicy))
def test_a_pool_never_contains_nan(pool, policy):
    scores = pool_scores([np.array(image, dtype=np.float64) for image in pool], policy)
    assert scores.shape == (len(pool),)
    assert ((scores >= 0) & (scores <= 1)).all()
