"""The gate: which new versions are refused, and how surely."""

import numpy as np
import pytest

from model.comparison import Compared
from model.config import FEWEST_IMAGES
from model.gate import judge

MARGIN = 0.02


def seen(image, *, found, instances=1, label=1, score=0.9):
    """A class in an image: `found` of its instances are detected, and nothing else is."""
    ious = np.zeros((found, instances))
    ious[np.arange(found), np.arange(found)] = 0.8
    scores = np.full(found, score)
    return Compared(
        image=image, label=label, instances=instances, class_scores=scores, box_scores=scores, mask_scores=scores,
        box_ious=ious, mask_ious=ious,
    )  # fmt: skip


def model(images, found, *, label=1):
    """One instance in each of `images` images; the first `found` are detected."""
    return [seen(image, found=int(image < found), label=label) for image in range(images)]


@pytest.mark.parametrize(
    ("images", "new", "active", "accepted"),
    [
        pytest.param(40, 30, 30, True, id="equally good"),
        pytest.param(40, 38, 10, True, id="better"),
        pytest.param(40, 10, 38, False, id="much worse on many images"),
        pytest.param(40, 29, 30, True, id="a little worse"),
        pytest.param(200, 196, 199, True, id="surely worse, but by less than the margin"),
        pytest.param(200, 170, 199, False, id="surely worse by more than the margin"),
        pytest.param(FEWEST_IMAGES, 0, FEWEST_IMAGES, False, id="nothing is left of it"),
        pytest.param(FEWEST_IMAGES - 1, 0, FEWEST_IMAGES - 1, True, id="too few images to judge"),
        pytest.param(0, 0, 0, True, id="no image"),
    ],
)
def test_a_version_is_refused_only_when_it_is_surely_worse(images, new, active, accepted):
    verdict = judge(model(images, new), model(images, active), ["cell"], images=images, margin=MARGIN)
    assert verdict.accepted is accepted
    assert verdict.images == images
    assert verdict.reason.startswith("accepted" if accepted else "refused")
    if images >= FEWEST_IMAGES:
        assert verdict.new_map_50 == pytest.approx(new / images, abs=0.02)
        assert verdict.active_map_50 == pytest.approx(active / images, abs=0.02)
        assert verdict.low <= verdict.new_map_50 - verdict.active_map_50 <= verdict.high
    else:
        assert f"{FEWEST_IMAGES} validation images" in verdict.reason
        assert verdict.low is None


def test_the_same_model_differs_from_itself_by_nothing_on_any_resampled_set():
    same = model(30, 12)
    verdict = judge(same, same, ["cell"], images=30, margin=0.0)
    assert (verdict.low, verdict.high) == (0, 0)


def test_only_images_with_annotated_instances_count():
    empty = [seen(image, found=0, instances=0) for image in range(100, 200)]
    verdict = judge([*model(9, 0), *empty], [*model(9, 9), *empty], ["cell"], images=200, margin=MARGIN)
    assert verdict.accepted
    assert verdict.images == 9


def test_a_class_that_got_lost_is_a_loss_for_the_mean_over_classes():
    active = [*model(30, 28), *model(30, 28, label=2)]
    new = [*model(30, 29), *model(30, 0, label=2)]
    verdict = judge(new, active, ["cell", "lesion"], images=30, margin=MARGIN)
    assert not verdict.accepted
    assert verdict.new_map_50 == pytest.approx(0.49, abs=0.02)


def test_the_margin_is_what_may_be_lost():
    new, active = model(200, 170), model(200, 199)
    assert not judge(new, active, ["cell"], images=200, margin=0.02).accepted
    assert judge(new, active, ["cell"], images=200, margin=0.2).accepted


def test_equally_good_versions_are_rarely_refused():
    """Nominally 5 % of those that are no worse; the margin makes it fewer."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        new, active = (
            [seen(i, found=int(rng.random() < 0.6), score=float(rng.random())) for i in range(FEWEST_IMAGES)]
            for _ in range(2)
        )
        refused += not judge(new, active, ["cell"], images=FEWEST_IMAGES, margin=MARGIN).accepted
    assert refused <= 8
