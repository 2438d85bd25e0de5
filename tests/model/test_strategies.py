"""The strategies: each ranks as its paper says, and always gives as many different images as were asked for."""

import dataclasses
import itertools
import math
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from model import tsp
from model.config import STRATEGY_NAMES, TrainingConfig
from model.dataset import input_hw
from model.empty_images import EmptyImagePolicy
from model.errors import InvalidInputError, TooLargeError
from model.loss_prediction import LossPredictor, ranking_loss
from model.predict import detect
from model.strategies import STRATEGIES, Observation, Observations, Sight, look
from model.strategies.core_set import k_centre_greedy
from model.train import train
from tests.model.examples import ellipse, image, labeled_image, rectangle, tiny_network

OBJECTS = ((1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60)))


LAST_WHEN_EMPTY = ("tsp_expected", "tsp_present")  # nothing was found, so nothing is to be corrected


def observed(score, *feature):
    return Observation(score=score, feature=np.array(feature or (0.0,), dtype=np.float32))


def sight_of(**output):
    """A sight whose output is given: what the network saw does not matter to the strategy."""
    columns = {name: torch.tensor(values, dtype=torch.float32) for name, values in output.items()}
    return Sight(network=tiny_network(), image=image(), output={"feature": torch.zeros(4), **columns})


def seen_by(network, seed=0, queue_threshold=0.0):
    picture = image(seed=seed)
    with torch.inference_mode():
        return Sight(network=network, image=picture, output=network([picture])[0], queue_threshold=queue_threshold)


# --- which detections count


@pytest.mark.parametrize(
    ("threshold", "counted"),
    [
        pytest.param(0.0, [0.9, 0.3, 0.6], id="no threshold"),
        pytest.param(0.3, [0.9, 0.3, 0.6], id="reached exactly"),
        pytest.param(0.5, [0.9, 0.6], id="some"),
        pytest.param(0.95, [], id="none"),
    ],
)
def test_detections_below_the_threshold_do_not_count(threshold, counted):
    output = {**sight_of(**TRIPLETS, predicted_loss=[2.0]).output, "boxes": torch.zeros(3, 4)}
    sight = Sight(network=tiny_network(), image=image(), output=output, queue_threshold=threshold)
    assert sight.counted["scores"].tolist() == pytest.approx(counted)
    assert len(sight.counted["boxes"]) == len(sight.counted["mask_scores"]) == len(counted)
    assert sight.counted["predicted_loss"].tolist() == [2.0]
    assert len(sight.counted["feature"]) == 4
    assert len(sight.output["scores"]) == 3


@pytest.mark.parametrize(
    "name", [name for name in STRATEGIES if name != "learning_loss"]
)  # learning loss looks at no detection
def test_every_strategy_scores_only_what_counts(name):
    strategy = STRATEGIES[name]
    network = tiny_network(**strategy.network_options).eval()
    torch.manual_seed(0)
    everything = strategy.observe(seen_by(network))
    scores = seen_by(network).output["scores"]
    torch.manual_seed(0)
    some = strategy.observe(seen_by(network, queue_threshold=float(scores.median())))
    assert some.score is not None
    assert some.score != everything.score
    assert strategy.observe(seen_by(network, queue_threshold=1.0)).score == (1 if name in LAST_WHEN_EMPTY else None)


def test_a_look_sees_what_the_detector_finds_and_says_what_counts():
    network = tiny_network().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    sight, found = look(network, pixels, queue_threshold=0.5)
    (expected,) = detect(network, [pixels])
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
    assert len(found) == len(sight.output["scores"]) > len(sight.counted["scores"])
    assert sight.image.shape[0] == 3
    assert sight.feature.shape == (320,)


def test_what_is_found_in_an_image_that_was_shrunk_before_is_in_its_own_pixels():
    network = tiny_network().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (250, 350, 3), dtype=np.uint8)
    _, expected = look(network, pixels)
    height, width = input_hw((250, 350), network.config)
    shrunk = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    _, found = look(network, shrunk, image_hw=(250, 350))
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_a_look_at_an_image_that_does_not_fit_into_memory_says_what_to_lower():
    network = tiny_network().eval()

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    network.register_forward_pre_hook(refuse)
    with pytest.raises(TooLargeError, match="Lower the image size"):
        look(network, np.zeros((40, 40, 3), dtype=np.uint8))


# --- many observations


def columns(rows, capacity=None):
    observations = Observations(len(rows) if capacity is None else capacity)
    for row in rows:
        observations.append(row.score, row.feature)
    return observations


def test_observations_by_columns_are_a_sequence_of_what_was_added():
    rows = [observed(0.25, 1.0, 2.0), observed(None, 3.0, 4.0), observed(0.75, 5.0, 6.0)]
    seen = columns(rows, capacity=5)
    assert len(seen) == len(list(seen)) == 3
    for index in (0, 1, 2, -1, -3):
        assert seen[index].score == rows[index].score
        np.testing.assert_array_equal(seen[index].feature, rows[index].feature)
    assert [row.score for row in seen[1:]] == [None, 0.75]
    with pytest.raises(IndexError):
        seen[3]
    assert seen.features.shape == (3, 2)


def test_observations_that_do_not_fit_are_refused():
    seen = columns([observed(0.5, 1.0, 2.0)])
    with pytest.raises(InvalidInputError, match="at most 1 observations"):
        seen.append(0.5, np.zeros(2))
    with pytest.raises(InvalidInputError, match="features of 2 numbers as those before, got 3"):
        columns([observed(0.5, 1.0, 2.0)], capacity=2).append(0.5, np.zeros(3))


@pytest.mark.parametrize("name", ["tsp", "random", "core_set", "hybrid"])
@pytest.mark.parametrize("labelled", [0, 5], ids=["nothing annotated", "five annotated"])
def test_every_strategy_chooses_from_columns_as_from_rows(name, labelled):
    rng = np.random.default_rng(0)
    rows = [observed(None if i % 7 == 0 else rng.random(), *rng.normal(size=8).round(2)) for i in range(60)]
    pool, annotated = rows[labelled:], rows[:labelled]
    strategy, options = STRATEGIES[name], {"seed": 3, "empty_policy": EmptyImagePolicy.MEDIAN}
    expected = strategy.choose(pool, annotated, 12, **options)
    assert strategy.choose(columns(pool), columns(annotated), 12, **options).tolist() == expected.tolist()


# --- random


def test_random_draws_every_ordered_pair_about_equally_often():
    pool = [observed(None) for _ in range(4)]
    draws = Counter(tuple(STRATEGIES["random"].choose(pool, [], 2, seed=seed).tolist()) for seed in range(2400))
    assert set(draws) == set(itertools.permutations(range(4), 2))
    # Twelve pairs, 200 expected each, standard deviation 13.5: five of these.
    assert max(abs(count - 200) for count in draws.values()) < 68


def test_random_repeats_itself_at_a_seed_and_differs_at_another():
    pool = [observed(None) for _ in range(50)]
    first, again, other = (STRATEGIES["random"].choose(pool, [], 20, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 20


# --- class entropy


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        pytest.param([[1 / 3] * 3], 0.0, id="uniform"),
        pytest.param([[0.0, 1.0, 0.0]], 1.0, id="certain"),
        pytest.param([[0.5, 0.5, 0.0]], 1 - math.log(2) / math.log(3), id="torn between two"),
        pytest.param([[1 / 3] * 3, [0.0, 0.0, 1.0]], 0.5, id="mean over the detections"),
    ],
)
def test_class_entropy_is_one_minus_the_mean_softmax_entropy_in_units_of_log_c(probabilities, expected):
    observation = STRATEGIES["class_entropy"].observe(sight_of(class_probabilities=probabilities))
    assert observation.score == pytest.approx(expected, abs=1e-6)


def test_class_entropy_puts_the_uniform_softmax_first():
    softmaxes = [[[0.0, 1.0, 0.0]], [[0.2, 0.7, 0.1]], [[1 / 3] * 3], [[0.3, 0.4, 0.3]]]
    pool = [STRATEGIES["class_entropy"].observe(sight_of(class_probabilities=p)) for p in softmaxes]
    assert STRATEGIES["class_entropy"].choose(pool, [], 4, seed=0).tolist() == [2, 3, 1, 0]


# --- tsp

TRIPLETS = {"scores": [0.9, 0.3, 0.6], "box_scores": [0.8, 0.9, 0.6], "mask_scores": [0.7, 0.1, 0.6]}


def consistent_mean(*values):
    return math.exp(-np.std(values)) * np.mean(values)


def test_tsp_is_the_score_of_the_learning_core():
    columns = [np.array(TRIPLETS[name]) for name in ("scores", "box_scores", "mask_scores")]
    expected = tsp.image_score(tsp.instance_scores(*columns))
    assert STRATEGIES["tsp"].observe(sight_of(**TRIPLETS)).score == pytest.approx(expected, abs=1e-6)
    assert STRATEGIES["hybrid"].observe(sight_of(**TRIPLETS)).score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "used"),
    [
        pytest.param("tsp_without_box", ("scores", "mask_scores"), id="without box"),
        pytest.param("tsp_without_box_and_mask", ("scores",), id="without box and mask"),
    ],
)
def test_tsp_without_some_scores_is_eq_2_and_3_over_the_others(name, used):
    instances = [consistent_mean(*values) for values in zip(*(TRIPLETS[column] for column in used), strict=True)]
    score = STRATEGIES[name].observe(sight_of(**TRIPLETS)).score
    assert score == pytest.approx(consistent_mean(*instances), abs=1e-6)


def test_expected_tsp_adds_up_what_probably_is_there_and_uncertain():
    instances = [consistent_mean(*values) for values in zip(*TRIPLETS.values(), strict=True)]
    expected = sum(c * (1 - s) for c, s in zip(TRIPLETS["scores"], instances, strict=True))
    assert STRATEGIES["tsp_expected"].observe(sight_of(**TRIPLETS)).score == pytest.approx(math.exp(-expected))


def test_present_tsp_believes_in_uncertainty_as_far_as_anything_is_there():
    s = STRATEGIES["tsp"].observe(sight_of(**TRIPLETS)).score
    score = STRATEGIES["tsp_present"].observe(sight_of(**TRIPLETS)).score
    assert score == pytest.approx(1 - (1 - s) * (1 - 0.1 * 0.7 * 0.4))


@pytest.mark.parametrize("name", ["tsp_expected", "tsp_present"])
def test_a_doubtful_speck_does_not_outweigh_an_uncertain_object(name):
    speck = {"scores": [0.21], "box_scores": [0.2], "mask_scores": [0.2]}
    real = {"scores": [0.7], "box_scores": [0.5], "mask_scores": [0.6]}

    def score(strategy, columns):
        return STRATEGIES[strategy].observe(sight_of(**columns)).score

    assert score("tsp", speck) < score("tsp", real)
    assert score(name, speck) > score(name, real)


# --- core-set


def farthest_first(features, centres, count):
    """The definition, point by point; ties go to the lowest index."""
    chosen = []
    while len(chosen) < min(count, len(features)):
        anchors = [*centres, *(features[i] for i in chosen)]
        if not anchors:
            mean = np.mean(features, axis=0)
            distances = {i: -math.dist(f, mean) for i, f in enumerate(features)}
        else:
            distances = {i: min(math.dist(f, a) for a in anchors) for i, f in enumerate(features) if i not in chosen}
        chosen.append(max(distances, key=lambda i: distances[i]))
    return chosen


@pytest.mark.parametrize("with_centres", [pytest.param(False, id="no centres"), pytest.param(True, id="centres")])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 20])
def test_k_centre_greedy_takes_the_farthest_point_each_time(count, with_centres):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        features, centres = rng.normal(size=(9, 3)), rng.normal(size=(2, 3)) if with_centres else None
        expected = farthest_first(features.tolist(), centres.tolist() if centres is not None else [], count)
        assert k_centre_greedy(features, centres, count).tolist() == expected


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16], ids=["float64", "float32", "float16"])
def test_k_centre_greedy_looks_at_every_piece_of_many_points(dtype):
    """More points than are looked at at once; the far ones lie in each of the pieces."""
    rng = np.random.default_rng(1)
    features, far = rng.normal(size=(3000, 4)).astype(dtype), [5, 1023, 1024, 2999]
    for place, index in enumerate(far):
        features[index] = 100 * np.eye(4)[place]
    for centres in (None, rng.normal(size=(2, 4)).astype(dtype)):
        chosen = k_centre_greedy(features, centres, 5).tolist()
        assert set(far) <= set(chosen)


def test_k_centre_greedy_is_within_twice_the_smallest_possible_radius():
    features = np.random.default_rng(3).normal(size=(10, 2))

    def radius(chosen):
        return np.linalg.norm(features[:, None] - features[None, list(chosen)], axis=2).min(axis=1).max()

    best = min(radius(chosen) for chosen in itertools.combinations(range(10), 3))
    assert best <= radius(k_centre_greedy(features, None, 3)) <= 2 * best


@pytest.mark.parametrize("centres", [None, np.zeros((1, 2))], ids=["no centres", "a centre on them"])
def test_k_centre_greedy_takes_each_of_several_equal_points_once(centres):
    assert sorted(k_centre_greedy(np.zeros((5, 2)), centres, 9).tolist()) == [0, 1, 2, 3, 4]


def test_k_centre_greedy_leaves_duplicates_of_what_it_has_for_last():
    features = np.array([[0.0], [0.0], [5.0], [5.0], [9.0]])
    assert k_centre_greedy(features, np.array([[9.0]]), 5).tolist()[:2] == [0, 2]


def test_core_set_starts_far_from_the_annotated_images():
    pool = [observed(None, x) for x in (0.0, 1.0, 10.0, 4.0)]
    assert STRATEGIES["core_set"].choose(pool, [observed(None, 0.5)], 2, seed=0).tolist() == [2, 3]


# --- hybrid


def test_hybrid_picks_only_among_the_most_uncertain():
    rng = np.random.default_rng(0)
    pool = [observed(score, *rng.normal(size=3)) for score in rng.random(60)]
    lowest = np.argsort([o.score for o in pool])[: 4 * 5]
    chosen = STRATEGIES["hybrid"].choose(pool, [], 5, seed=0)
    assert set(chosen.tolist()) <= set(lowest.tolist())
    assert len(set(chosen.tolist())) == 5


@pytest.mark.parametrize("labelled", [[], [observed(None, 50.0, 50.0)]], ids=["nothing annotated", "one annotated"])
def test_hybrid_takes_one_of_several_near_duplicates_before_the_others(labelled):
    duplicates = [observed(0.1, 0.0, 0.001 * i) for i in range(5)]
    others = [observed(0.2, 10.0, 0.0), observed(0.2, 0.0, 10.0)]
    certain = [observed(0.9, 0.0, 0.0)] * 7
    pool = [*duplicates, *others, *certain]
    chosen = STRATEGIES["hybrid"].choose(pool, labelled, 3, seed=0).tolist()
    assert {5, 6} < set(chosen)
    # TSP alone takes three of the duplicates.
    assert STRATEGIES["tsp"].choose(pool, labelled, 3, seed=0).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("images", "candidates"), [(60, 20), (30, 15), (8, 5)])
def test_of_a_small_pool_the_less_uncertain_half_is_no_candidate_of_hybrid(images, candidates):
    """Here the certain ones are far away, where core-set would go."""
    pool = [observed(i / images, 0.001 * i if i < candidates else 100.0 * i) for i in range(images)]
    chosen = STRATEGIES["hybrid"].choose(pool, [], 5, seed=0)
    assert max(chosen) == candidates - 1


# --- MC dropout


def dropouts_of(network):
    return [module for module in network.modules() if isinstance(module, nn.Dropout)]


def test_with_next_to_no_dropout_the_passes_agree_entirely():
    network = tiny_network(dropout=1e-9).eval()
    sight = seen_by(network)
    assert len(sight.output["scores"]) > 0
    assert STRATEGIES["mc_dropout"].observe(sight).score == pytest.approx(1, abs=1e-5)


def test_with_dropout_the_passes_agree_less_and_the_network_is_as_before():
    network = tiny_network(dropout=0.5).eval()
    sight = seen_by(network)
    score = STRATEGIES["mc_dropout"].observe(sight).score
    assert 0 < score < 0.999
    assert [module.generator for module in dropouts_of(network)] == [None, None]
    assert not any(module.training for module in network.modules())
    again = seen_by(network)
    assert torch.equal(sight.output["scores"], again.output["scores"])


def test_mc_dropout_scores_an_image_alike_whatever_else_draws_and_takes_nothing_from_others():
    network = tiny_network(dropout=0.5).eval()
    first = STRATEGIES["mc_dropout"].observe(seen_by(network)).score
    torch.manual_seed(1)  # as a training in another thread might
    before = torch.get_rng_state()
    assert STRATEGIES["mc_dropout"].observe(seen_by(network)).score == first
    assert torch.equal(torch.get_rng_state(), before)
    assert STRATEGIES["mc_dropout"].observe(seen_by(network, seed=1)).score != first


def test_the_seed_decides_what_is_dropped_and_what_is_left_has_the_same_mean():
    network = tiny_network(dropout=0.5).eval()
    with torch.inference_mode():
        scores = {seed: network.stochastic_passes(image(), 1, seed=seed)[0]["scores"].tolist() for seed in (1, 2)}
        assert network.stochastic_passes(image(), 1, seed=1)[0]["scores"].tolist() == scores[1] != scores[2]
    (dropout, _) = dropouts_of(network)
    dropout.generator = torch.Generator().manual_seed(0)
    dropped = dropout(torch.ones(100, 1000))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_the_dropout_is_off_again_after_a_pass_that_failed():
    network = tiny_network(dropout=0.5).eval()
    network.roi_heads.mask_iou_branch[0] = nn.Conv2d(3, 3, 1).eval()  # not as many channels as the features have
    with pytest.raises(RuntimeError):
        network.stochastic_passes(image(), 2, seed=0)
    assert [module.generator for module in dropouts_of(network)] == [None, None]


def test_mc_dropout_has_no_score_where_the_first_pass_finds_nothing():
    network = tiny_network(dropout=0.5, score_threshold=1.0).eval()
    assert STRATEGIES["mc_dropout"].observe(seen_by(network)).score is None


def test_passes_without_dropout_find_what_the_network_finds():
    network = tiny_network().eval()
    picture = image()
    with torch.inference_mode():
        (usual,), passes = network([picture]), network.stochastic_passes(picture, 2, seed=0)
    for output in passes:
        for name in ("boxes", "scores", "class_probabilities", "mask_scores", "roi_masks"):
            torch.testing.assert_close(output[name], usual[name])


@pytest.mark.parametrize(
    ("name", "options"), [("mc_dropout", r"\{'dropout': 0.2\}"), ("learning_loss", r"\{'learning_loss': True\}")]
)
def test_a_network_without_what_a_strategy_looks_at_is_refused(name, options):
    with pytest.raises(InvalidInputError, match=rf"{name}: .* network_options, {options}"):
        STRATEGIES[name].observe(seen_by(tiny_network().eval()))


# --- learning loss


def test_learning_loss_puts_the_highest_predicted_loss_first():
    losses = (0.3, 2.0, -1.0)
    pool = [STRATEGIES["learning_loss"].observe(sight_of(predicted_loss=[loss])) for loss in losses]
    assert STRATEGIES["learning_loss"].choose(pool, [], 3, seed=0).tolist() == [1, 0, 2]


def test_the_score_of_a_predicted_loss_falls_strictly_and_stays_between_0_and_1():
    losses = (-1e6, -50.0, -49.0, -0.5, 0.0, 1e-3, 1.0, 50.0, 51.0, 1e6)
    scores = [STRATEGIES["learning_loss"].observe(sight_of(predicted_loss=[loss])).score for loss in losses]
    assert scores == sorted(set(scores), reverse=True)
    assert 0 < scores[-1] < scores[0] < 1
    assert scores[4] == 0.5


@pytest.mark.parametrize(
    ("predicted", "true", "margin", "expected"),
    [
        pytest.param([3.0, 1.0], [2.0, 1.0], 1.0, 0.0, id="right by more than the margin"),
        pytest.param([1.5, 1.0], [2.0, 1.0], 1.0, 0.5, id="right by less"),
        pytest.param([1.0, 3.0], [2.0, 1.0], 1.0, 3.0, id="wrong"),
        pytest.param([3.0, 1.0], [2.0, 1.0], 5.0, 3.0, id="a larger margin"),
        # pairs: (0, 1) right by 0.5 -> 0.5; (0, 2) right by 2 -> 0; (1, 2) right by 1.5 -> 0
        pytest.param([2.0, 1.5, 0.0], [3.0, 2.0, 1.0], 1.0, 0.5 / 3, id="mean over three pairs"),
        pytest.param([5.0], [1.0], 1.0, 0.0, id="no pair"),
        pytest.param([], [], 1.0, 0.0, id="no image"),
    ],
)
def test_the_ranking_loss_by_hand(predicted, true, margin, expected):
    predictions = torch.tensor(predicted, requires_grad=True)
    loss = ranking_loss(predictions, torch.tensor(true), margin=margin)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert predictions.grad.isfinite().all()


def test_the_loss_predictor_does_not_change_what_the_detector_learns(tmp_path):
    images = [labeled_image(tmp_path, name, (1, ellipse(4 + i, 4, 40, 30))) for i, name in enumerate("abc")]
    images.append(labeled_image(tmp_path, "d", (1, ellipse(8, 8, 30, 40)), pseudo=True))
    config = TrainingConfig(epochs=2, batch_size=2, pseudo_batch_size=1, learning_rate=0.001, gradient_clip=0.1)
    watched, alone = (tiny_network(learning_loss=on) for on in (True, False))
    untrained = {name: tensor.clone() for name, tensor in watched.loss_predictor.state_dict().items()}
    for network in (watched, alone):
        train(network, images, config)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name
    assert any(not torch.equal(untrained[name], t) for name, t in watched.loss_predictor.state_dict().items())


def test_the_loss_predictor_learns_to_rank():
    torch.manual_seed(0)
    predictor = LossPredictor(4)
    levels = {level: torch.rand(40, 4, 3, 3) for level in ("0", "1", "2", "3")}
    true = levels["1"].mean(dim=(2, 3)) @ torch.tensor([3.0, -1.0, 0.0, 2.0])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.01)
    train, test = slice(0, 30), slice(30, 40)

    def right_pairs(part):
        with torch.no_grad():
            predicted = predictor({level: feature[part] for level, feature in levels.items()})
        i, j = torch.triu_indices(len(predicted), len(predicted), offset=1)
        return ((predicted[i] > predicted[j]) == (true[part][i] > true[part][j])).float().mean().item()

    for _ in range(300):
        optimizer.zero_grad()
        ranking_loss(predictor({level: f[train] for level, f in levels.items()}), true[train], margin=0.1).backward()
        optimizer.step()
    assert right_pairs(train) > 0.9
    assert right_pairs(test) > 0.8


# --- all of them


@pytest.fixture(scope="module", params=STRATEGIES)
def strategy_and_sights(request):
    """Each strategy with the network it asks for, and seven images: three in which the network finds nothing."""
    strategy = STRATEGIES[request.param]
    network = tiny_network(**strategy.network_options).eval()
    observations = []
    for seed in range(7):
        network.roi_heads.score_thresh = 1.0 if seed % 2 else 0.05
        observations.append(strategy.observe(seen_by(network, seed)))
    return strategy, observations


@pytest.mark.parametrize("policy", EmptyImagePolicy)
@pytest.mark.parametrize("size", [0, 1, 7])
def test_every_strategy_gives_different_images_of_the_pool(strategy_and_sights, size, policy):
    strategy, observations = strategy_and_sights
    for labelled in ([], observations[:2]):
        for count in (0, 1, 3, 7, 10):
            chosen = strategy.choose(observations[:size], labelled, count, seed=1, empty_policy=policy)
            assert np.issubdtype(chosen.dtype, np.integer)
            assert len(chosen) == len(set(chosen.tolist())) == min(count, size)
            assert set(chosen.tolist()) <= set(range(size))


def test_every_strategy_scores_with_numbers_or_none(strategy_and_sights):
    strategy, observations = strategy_and_sights
    for number, observation in enumerate(observations):
        assert observation.score is None or 0 <= observation.score <= 1
        assert np.isfinite(observation.feature).all()
        assert observation.feature.shape == (320,)
        if strategy.name != "learning_loss":
            when_empty = 1 if strategy.name in LAST_WHEN_EMPTY else None
            assert (observation.score == when_empty) == (number % 2 == 1)


@pytest.mark.parametrize("name", ["mc_dropout", "class_entropy", "tsp", "tsp_without_box", "tsp_without_box_and_mask"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (EmptyImagePolicy.FIRST, [1, 3, 2, 0]),
        (EmptyImagePolicy.LAST, [2, 0, 1, 3]),
        (EmptyImagePolicy.MEDIAN, [2, 1, 3, 0]),
    ],
)
def test_images_without_detections_stand_where_the_policy_says(name, policy, expected):
    pool = [observed(score) for score in (0.9, None, 0.2, None)]
    assert STRATEGIES[name].choose(pool, [], 4, seed=0, empty_policy=policy).tolist() == expected


def test_the_names_are_the_keys():
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())
    assert len(STRATEGIES) == 11


def test_every_strategy_is_named_where_no_network_is_needed():
    assert tuple(STRATEGIES) == STRATEGY_NAMES
