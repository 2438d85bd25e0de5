"""Duplicates among detections, told by their masks."""

import numpy as np
import pytest

from model import duplicates
from model.duplicates import distinct
from model.types import Detections

FULL = np.ones((28, 28), dtype=np.float32)
LEFT = np.concatenate([FULL[:, :14], 0 * FULL[:, :14]], axis=1)


def detections(*instances):
    """Each (box, mask, label, class score), in an image of 100 x 100 px."""
    boxes, masks, labels, scores = zip(*instances, strict=True) if instances else ((), (), (), ())
    count = len(instances)
    ones = np.ones(count, dtype=np.float32)
    return Detections(
        image_hw=(100, 100),
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(count, 4),
        labels=np.array(labels, dtype=np.int64),
        class_scores=np.array(scores, dtype=np.float32),
        box_scores=ones,
        mask_scores=ones,
        roi_masks=np.array(masks, dtype=np.float32).reshape(count, 28, 28),
    )


BOX, SHIFTED, INSIDE, APART = (10, 10, 50, 50), (14, 10, 54, 50), (12, 12, 26, 26), (60, 60, 90, 90)


@pytest.mark.parametrize(
    ("instances", "kept"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(BOX, FULL, 1, 0.9), (SHIFTED, FULL, 1, 0.8)], [True, False], id="nearly the same"),
        pytest.param([(BOX, FULL, 1, 0.5), (SHIFTED, FULL, 1, 0.8)], [False, True], id="the better score stays"),
        pytest.param([(BOX, FULL, 1, 0.9), (SHIFTED, FULL, 2, 0.8)], [True, True], id="another class"),
        pytest.param([(BOX, FULL, 1, 0.9), (INSIDE, FULL, 1, 0.8)], [True, False], id="a part of it"),
        pytest.param([(INSIDE, FULL, 1, 0.9), (BOX, FULL, 1, 0.8)], [True, False], id="a whole around it"),
        pytest.param([(BOX, FULL, 1, 0.9), (APART, FULL, 1, 0.8)], [True, True], id="far apart"),
        pytest.param([(BOX, LEFT, 1, 0.9), (BOX, FULL - LEFT, 1, 0.8)], [True, True], id="one box, other halves"),
    ],
)
def test_of_two_detections_of_one_instance_the_better_one_is_kept(instances, kept):
    assert distinct(detections(*instances), mask_threshold=0.3).tolist() == kept


@pytest.mark.parametrize("seed", range(20))
def test_only_masks_that_may_meet_are_compared(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 90, (40, 2))
    boxes = np.concatenate([low, np.minimum(low + rng.uniform(0.5, 30, (40, 2)), 100)], axis=1)
    boxes[1::4] = np.round(boxes[::4])  # nearly the same ones, and sides that touch
    masks = rng.uniform(size=(40, 28, 28)) ** 0.3
    labels, scores = rng.integers(1, 3, 40), rng.uniform(size=40)
    found = detections(*zip(boxes, masks, labels, scores, strict=True))
    quickly = distinct(found, mask_threshold=0.3)
    same_class = (found.labels[:, None] == found.labels) & ~np.eye(40, dtype=bool)
    assert (duplicates._meet(found) < same_class).any()
    monkeypatch.setattr(duplicates, "_meet", lambda _: same_class)
    assert quickly.tolist() == distinct(found, mask_threshold=0.3).tolist()
    assert not quickly.all()
