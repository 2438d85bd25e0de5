"""The choice of the next images: what it looks at, and that it is Algorithm 1's."""

from dataclasses import replace

import numpy as np
import pytest

from model.config import PseudoLabelConfig
from model.dataset import load_image
from model.pseudo_labels import image_with_trusted
from model.strategies import STRATEGIES, Strategy, look
from model.tsp import instance_scores
from scripts.benchmark_choice import choose_next
from scripts.benchmark_lines import Selection
from tests.model.examples import tiny_network
from tests.scripts.examples import EXPERIMENT

SETTINGS = replace(EXPERIMENT, selection=Selection(queue_threshold=0))


class Watched(Strategy):
    """A strategy, and all that it observed."""

    name = "watched"

    def __init__(self, name):
        self.strategy, self.observed = STRATEGIES[name], []

    def observe(self, sight):
        self.observed.append(self.strategy.observe(sight))
        return self.observed[-1]

    def choose(self, *images, **options):
        return self.strategy.choose(*images, **options)


@pytest.fixture(scope="module")
def network():
    return tiny_network(num_classes=4, detections_per_image=8).eval()


@pytest.fixture
def files(sets):
    """Three annotated images and six that are not, as the choice gets them, and who annotates them."""
    images = {image.image_id: image for image in sets.pool.images}
    paths = [(image_id, image.path) for image_id, image in images.items()]
    return {
        "labelled": dict(paths[:3]),
        "unlabelled": dict(paths[3:]),
        "annotate": lambda ids: [images[image_id] for image_id in ids],
    }


@pytest.mark.parametrize(
    ("name", "semi_supervised", "looks"),
    [
        pytest.param("random", False, 0, id="random chooses blindly"),
        pytest.param("random", True, 6, id="pseudo labels take a look at every image that is left"),
        pytest.param("tsp", False, 6, id="scores too"),
        pytest.param("tsp", True, 6, id="one look is enough for both"),
        pytest.param("core_set", False, 9, id="what compares images looks at the annotated ones as well"),
    ],
)
def test_no_image_is_looked_at_more_than_once(network, files, name, semi_supervised, looks):
    strategy = Watched(name)
    choice = choose_next(network, strategy, SETTINGS, **files, semi_supervised=semi_supervised, seed=0)
    assert len(set(choice.new_ids)) == 2
    assert set(choice.new_ids) < set(files["unlabelled"])
    assert len({observation.feature.tobytes() for observation in strategy.observed}) == looks
    assert len(strategy.observed) == looks


def test_the_lowest_scores_are_annotated_and_the_rest_is_pseudo_labelled(network, files):
    strategy = Watched("tsp")
    choice = choose_next(network, strategy, SETTINGS, **files, semi_supervised=True, seed=0)
    scores = {i: observed.score for i, observed in zip(files["unlabelled"], strategy.observed, strict=True)}
    assert None not in scores.values()
    lowest = sorted(scores, key=scores.get)[:2]
    rest = [image_id for image_id in scores if image_id not in lowest]
    assert choice.new_ids == lowest
    # Every detection passes thresholds of zero.
    assert [(image.image_id, image.pseudo) for image in choice.pseudo] == [(image_id, True) for image_id in rest]
    assert choice.queue["chosen"]["mean"] == pytest.approx(sum(scores[i] for i in lowest) / 2)
    assert choice.queue["rest"]["quartiles"][0] == min(scores[i] for i in rest)
    assert choice.queue["rest"]["images"] == 4


def test_without_semi_supervision_nothing_is_labelled_by_the_network(network, files):
    choice = choose_next(network, STRATEGIES["tsp"], SETTINGS, **files, semi_supervised=False, seed=0)
    assert (choice.pseudo, choice.class_thresholds) == ([], None)


@pytest.mark.parametrize(("threshold", "without_score"), [(0, [0, 0]), (1, [2, 4])])
def test_only_detections_of_some_confidence_count_in_the_queue(network, files, threshold, without_score):
    settings = replace(SETTINGS, selection=Selection(queue_threshold=threshold))
    queue = choose_next(network, STRATEGIES["tsp"], settings, **files, semi_supervised=False, seed=0).queue
    assert [part["without_score"] for part in queue.values()] == without_score


def test_by_precision_what_the_network_saw_in_the_new_images_says_how_far_it_is_trusted(network, files):
    """The oracle draws what the network saw in the chosen images, but for the detection that it was least sure of."""
    strategy, precision = STRATEGIES["tsp"], PseudoLabelConfig(rule="precision", precision=0.6)
    settings = replace(SETTINGS, pseudo=precision)
    asked = []

    def draw_what_was_seen(ids):
        asked.extend(ids)
        everything = PseudoLabelConfig(class_threshold=0, box_threshold=0, mask_threshold=0)
        images = []
        for image_id in ids:
            path = files["unlabelled"][image_id]
            _, found = look(network, load_image(path), queue_threshold=0)
            scores = instance_scores(found.class_scores, found.box_scores, found.mask_scores)
            found = found.select(np.flatnonzero(scores > scores.min()))
            images.append(image_with_trusted(found, everything, image_id=image_id, path=path, mask_threshold=0.3))
        return images

    choice = choose_next(
        network, strategy, settings, **{**files, "annotate": draw_what_was_seen}, semi_supervised=True, seed=0
    )
    assert asked == choice.new_ids
    assert 0 < choice.trust.score_threshold < 1
    assert choice.pseudo
    for image in choice.pseudo:
        assert (instance_scores(*image.triplets.T) > choice.trust.score_threshold).all()
    nothing_right = choose_next(
        network,
        strategy,
        settings,
        **{**files, "annotate": lambda ids: [replace(i, labels=i.labels[:0], rles=()) for i in files["annotate"](ids)]},
        semi_supervised=True,
        seed=0,
    )
    assert (nothing_right.trust.score_threshold, nothing_right.pseudo) == (1.0, [])
