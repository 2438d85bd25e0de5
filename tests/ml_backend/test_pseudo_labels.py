"""What is kept of unlabelled images and decided later is what would have been decided at once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_backend.pseudo_labels import (
    kept_detections,
    only_masks_are_needed,
    seen_image,
    thresholds_by_class,
    trust_by,
    with_trusted,
)
from model.config import PseudoLabelConfig, TrainingConfig
from model.geometry import polygons_to_rle
from model.pseudo_labels import class_thresholds, image_with_trusted
from model.types import Detections

HW = (48, 64)
NAMES = ("cell", "lesion")
SQUARE = polygons_to_rle([np.array([[8.0, 8.0], [30.0, 8.0], [30.0, 30.0], [8.0, 30.0]])], HW)


def detections(triplets: list[tuple[float, float, float]], labels: list[int] | None = None) -> Detections:
    """Rectangles side by side, with these scores c, b, m."""
    count = len(triplets)
    left = np.arange(count) * 0.5
    columns = np.array(triplets, dtype=np.float64).reshape(count, 3).T
    return Detections(
        image_hw=HW,
        boxes_xyxy=np.stack([left, left + 1, left + 20, left + 30], axis=1),
        labels=np.array(labels or [1] * count, dtype=np.int64),
        class_scores=columns[0],
        box_scores=columns[1],
        mask_scores=columns[2],
        roi_masks=np.ones((count, 28, 28), dtype=np.float32),
    )


def line(found: Detections, config: PseudoLabelConfig, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A line of the scores file as it is read again."""
    kept = kept_detections(found, config, class_names=names, mask_threshold=0.3)
    whole = {"image": "i", "path": "/i.png", "image_hw": list(HW), "detections": kept}
    return json.loads(json.dumps(whole, allow_nan=False))


def old_line(labels: list[str]) -> dict[str, Any]:
    pseudo = {"labels": labels, "rles": [SQUARE] * len(labels)} if labels else None
    return {"image": "i", "path": "/i.png", "image_hw": list(HW), "pseudo": pseudo}


CONFIGS = [
    pytest.param(PseudoLabelConfig(), id="as in the paper"),
    pytest.param(PseudoLabelConfig(rule="or", ignore_threshold=0.3), id="or"),
    pytest.param(PseudoLabelConfig(ignore_threshold=0.95), id="hardly anything is in doubt"),
    pytest.param(
        PseudoLabelConfig(class_wise_thresholds=True, class_threshold_floor=0.4, box_threshold=0.3, mask_threshold=0.2),
        id="thresholds by class",
    ),
    pytest.param(PseudoLabelConfig(rule="precision", score_threshold=0.6), id="by precision"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_decided_later_is_what_would_have_been_decided_at_once(config: PseudoLabelConfig) -> None:
    random = np.random.default_rng(0)
    triplets = (random.random((60, 3)) ** 0.3).round(6)  # as precise as what is kept
    found = detections([tuple(row) for row in triplets.tolist()], random.integers(1, 3, 60).tolist())
    seen = seen_image(line(found, config), NAMES, only_masks=False)
    thresholds = thresholds_by_class([seen], config, num_classes=2)
    at_once = None
    if config.class_wise_thresholds:
        at_once = class_thresholds(found.class_scores, found.labels, config, num_classes=2)
        assert thresholds is not None
        assert thresholds.tolist() == at_once.tolist()
    decided = with_trusted(seen, config, thresholds)
    expected = image_with_trusted(
        found, config, image_id="i", path=Path("/i.png"), mask_threshold=0.3, class_thresholds=at_once
    )
    assert 0 < len(decided.labels) < 60
    assert decided.pseudo
    assert (decided.labels.tolist(), decided.rles) == (expected.labels.tolist(), expected.rles)
    for mine, theirs in (
        (decided.triplets, expected.triplets),
        (decided.ignored_boxes_xyxy, expected.ignored_boxes_xyxy),
    ):
        assert mine is not None
        assert theirs is not None
        assert mine.tolist() == theirs.tolist()


def test_masks_are_kept_of_what_could_be_trusted_only_and_nothing_of_hopeless_detections() -> None:
    found = detections([(0.95, 0.95, 0.9), (0.6, 0.95, 0.9), (0.95, 0.5, 0.9), (0.2, 0.1, 0.1), (0.08, 0.9, 0.9)])
    kept = line(found, PseudoLabelConfig())["detections"]
    assert [c for c, _, _ in kept["triplets"]] == [0.95, 0.6, 0.95, 0.2]
    assert [rle is not None for rle in kept["rles"]] == [True, False, False, False]
    kept = line(found, PseudoLabelConfig(class_wise_thresholds=True))["detections"]
    assert [rle is not None for rle in kept["rles"]] == [True, True, False, False]


def test_a_detection_without_a_pixel_is_no_label_but_in_doubt() -> None:
    found = detections([(0.95, 0.95, 0.9)])
    found.roi_masks[:] = 0
    decided = with_trusted(
        seen_image(line(found, PseudoLabelConfig()), NAMES, only_masks=False), PseudoLabelConfig(), None
    )
    assert len(decided.labels) == 0
    assert decided.ignored_boxes_xyxy is not None
    assert len(decided.ignored_boxes_xyxy) == 1


def test_what_is_trusted_only_since_the_settings_changed_is_in_doubt() -> None:
    found = detections([(0.95, 0.95, 0.9), (0.6, 0.95, 0.9)])
    seen = seen_image(line(found, PseudoLabelConfig()), NAMES, only_masks=False)
    decided = with_trusted(seen, PseudoLabelConfig(class_threshold=0.5), None)
    assert len(decided.labels) == 1
    assert decided.ignored_boxes_xyxy is not None
    assert decided.ignored_boxes_xyxy.tolist() == found.boxes_xyxy[1:].tolist()
    stricter = with_trusted(seen, PseudoLabelConfig(class_threshold=0.97), None)
    assert len(stricter.labels) == 0


def test_labels_are_renumbered_and_classes_that_are_gone_are_nothing() -> None:
    found = detections([(0.95, 0.95, 0.9)] * 3 + [(0.5, 0.5, 0.5)], [1, 2, 3, 2])
    whole = line(found, PseudoLabelConfig(), ("lesion", "gone", "cell"))
    decided = with_trusted(seen_image(whole, NAMES, only_masks=False), PseudoLabelConfig(), None)
    assert decided.labels.tolist() == [2, 1]
    assert decided.ignored_boxes_xyxy is not None
    assert decided.ignored_boxes_xyxy.shape == (0, 4)


def test_an_image_in_which_nothing_was_found_has_no_labels() -> None:
    decided = with_trusted(
        seen_image(line(detections([]), PseudoLabelConfig()), NAMES, only_masks=False), PseudoLabelConfig(), None
    )
    assert (len(decided.labels), decided.image_hw, decided.image_id) == (0, HW, "i")


@pytest.mark.parametrize(
    ("labels", "only_masks", "expected"),
    [
        pytest.param(["lesion", "gone", "cell"], True, [2, 1], id="labels"),
        pytest.param([], True, [], id="none"),
        pytest.param(["lesion"], False, [], id="more is needed than it says"),
    ],
)
def test_lines_of_older_releases_teach_what_they_can(labels: list[str], only_masks: bool, expected: list[int]) -> None:
    decided = with_trusted(
        seen_image(old_line(labels), NAMES, only_masks=only_masks), PseudoLabelConfig(class_threshold=0.99), None
    )
    assert decided.labels.tolist() == expected
    assert decided.rles == (SQUARE,) * len(expected)


@pytest.mark.parametrize(
    ("config", "training", "enough"),
    [
        pytest.param(PseudoLabelConfig(), TrainingConfig(ramp_up=0.5, ema_decay=0.9), True, id="other options"),
        pytest.param(PseudoLabelConfig(), TrainingConfig(soft_weights=True), False, id="soft weights"),
        pytest.param(PseudoLabelConfig(), TrainingConfig(pseudo_negatives="outside_ignored"), False, id="negatives"),
        pytest.param(PseudoLabelConfig(class_wise_thresholds=True), TrainingConfig(), False, id="thresholds by class"),
        pytest.param(PseudoLabelConfig(rule="precision"), TrainingConfig(), False, id="by precision"),
    ],
)
def test_scores_and_doubtful_boxes_are_needed_by_what_goes_beyond_the_paper(
    config: PseudoLabelConfig, training: TrainingConfig, enough: bool
) -> None:
    assert only_masks_are_needed(config, training) is enough


def test_thresholds_of_a_pool_in_which_nothing_was_seen_are_sigma_c() -> None:
    thresholds = thresholds_by_class([], PseudoLabelConfig(class_wise_thresholds=True), num_classes=2)
    assert thresholds is not None
    assert thresholds.tolist() == [0.9, 0.9]


def test_sigma_s_is_that_of_the_version_which_saw_the_images() -> None:
    by_precision = PseudoLabelConfig(rule="precision", precision=0.8)
    assert trust_by(by_precision, {"pseudo_score_threshold": 0.7}) == replace(by_precision, score_threshold=0.7)
    assert trust_by(by_precision, {}).score_threshold == 1  # of an older release: nothing is trusted
    assert trust_by(PseudoLabelConfig(), {"pseudo_score_threshold": 0.7}) == PseudoLabelConfig()
