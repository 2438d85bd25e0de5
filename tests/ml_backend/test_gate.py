"""Two versions on the same validation images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ml_backend.cycle_log import CycleLog
from ml_backend.gate import judge_version
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.service import Service
from model.dataset import LabeledSet, load_image, write_coco
from model.gate import Verdict
from model.geometry import roi_mask_to_rle
from model.predict import detect
from model.types import Detections, LabeledImage
from tests.ml_backend.examples import KEY, VERSION, add_version, begin_cycle, cycle_row, phantom_images, settings

CLASSES = ("cell", "lesion")


@pytest.fixture
def log(lonely_service: Service) -> CycleLog:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    return begin_cycle(lonely_service, KEY, 2)


@pytest.fixture
def seen(lonely_service: Service, tmp_path: Path) -> tuple[LabeledSet, dict[str, Detections], float]:
    """Images whose truth is what the active version sees in them; its detections, and their mask threshold."""
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    network, _ = lonely_service.registry.load(KEY, VERSION)
    threshold = network.config.mask_threshold
    images, found = [], {}
    for number, png in enumerate(phantom_images(12)):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png)
        detections = next(detect(network, [load_image(path)]))
        rles = [
            roi_mask_to_rle(mask, box, detections.image_hw, mask_threshold=threshold)
            for mask, box in zip(detections.roi_masks, detections.boxes_xyxy, strict=True)
        ]
        found[str(number)] = detections
        images.append(
            LabeledImage(
                image_id=str(number),
                path=path,
                image_hw=detections.image_hw,
                labels=detections.labels.astype(np.int64),
                rles=tuple(rles),
            )
        )
    return LabeledSet(images=tuple(images), class_names=CLASSES), found, threshold


def nothing(found: dict[str, Detections]) -> dict[str, Detections]:
    return {image_id: detections.select(np.array([], dtype=np.int64)) for image_id, detections in found.items()}


def in_order(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Labels that number CLASSES as those of `names`."""
    return np.array([0, *(names.index(name) + 1 for name in CLASSES)], dtype=np.int64)[labels]


def test_the_active_version_is_measured_on_the_images_of_the_new_one(
    lonely_service: Service, log: CycleLog, seen: tuple[LabeledSet, dict[str, Detections], float]
) -> None:
    validation, found, threshold = seen
    same = judge_version(lonely_service, KEY, found, validation, mask_threshold=threshold, log=log)
    assert (same.accepted, same.images, same.low, same.high) == (True, 12, 0, 0)
    assert same.active_map_50 == pytest.approx(1, abs=0.02)
    blind = judge_version(lonely_service, KEY, nothing(found), validation, mask_threshold=threshold, log=log)
    assert (blind.accepted, blind.new_map_50) == (False, 0)
    told = cycle_row(lonely_service, KEY, 2).facts["gate"]
    assert (told["active"], told["accepted"], told["reason"]) == (VERSION, False, blind.reason)


def test_classes_are_compared_by_name_and_only_those_that_both_know(
    lonely_service: Service, log: CycleLog, seen: tuple[LabeledSet, dict[str, Detections], float]
) -> None:
    validation, found, threshold = seen
    names = ("new", "lesion", "cell")
    renumbered = replace(
        validation,
        class_names=names,
        images=tuple(replace(image, labels=in_order(image.labels, names)) for image in validation.images),
    )
    ours = {image_id: replace(d, labels=in_order(d.labels, names)) for image_id, d in found.items()}
    same = judge_version(lonely_service, KEY, ours, renumbered, mask_threshold=threshold, log=log)
    assert same.class_names == ("lesion", "cell")
    assert (same.accepted, same.low, same.high) == (True, 0, 0)
    assert same.active_map_50 == pytest.approx(1, abs=0.02)
    blind = judge_version(lonely_service, KEY, nothing(ours), renumbered, mask_threshold=threshold, log=log)
    assert not blind.accepted


def damaged(service: Service) -> None:
    (service.registry.root / KEY / VERSION / "weights.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("class_names", "damage", "told"),
    [
        pytest.param(("nodule", "vessel"), None, "tsp-1-00000000 knows none of the present labels", id="labels"),
        pytest.param(CLASSES, damaged, f"version {VERSION} of {KEY} is damaged", id="a damaged version"),
    ],
)
def test_what_cannot_be_compared_is_accepted_and_says_why(
    lonely_service: Service,
    log: CycleLog,
    seen: tuple[LabeledSet, dict[str, Detections], float],
    class_names: tuple[str, ...],
    damage: Callable[[Service], None] | None,
    told: str,
) -> None:
    validation, found, threshold = seen
    if damage:
        damage(lonely_service)
    named = replace(validation, class_names=class_names)
    verdict = judge_version(lonely_service, KEY, nothing(found), named, mask_threshold=threshold, log=log)
    assert verdict.accepted
    assert verdict.reason.startswith(f"accepted without judgement: {told}")


def test_images_that_taught_the_active_version_do_not_count(
    lonely_service: Service, log: CycleLog, seen: tuple[LabeledSet, dict[str, Detections], float]
) -> None:
    validation, found, threshold = seen
    snapshot = lonely_service.cycle_folder(KEY, 1) / "training.json"
    snapshot.parent.mkdir(parents=True)
    write_coco(snapshot, replace(validation, images=validation.images[:3]))
    verdict = judge_version(lonely_service, KEY, nothing(found), validation, mask_threshold=threshold, log=log)
    assert (verdict.accepted, verdict.images) == (True, 9)
    assert "10 validation images with annotated instances are needed, and 9 found" in verdict.reason


def test_the_gate_can_be_switched_off(
    lonely_service: Service, log: CycleLog, seen: tuple[LabeledSet, dict[str, Detections], float], tmp_path: Path
) -> None:
    validation, found, threshold = seen
    service = replace(lonely_service, settings=settings(tmp_path, TSP_GATE="false"))
    verdict = judge_version(service, KEY, nothing(found), validation, mask_threshold=threshold, log=log)
    assert verdict == Verdict(accepted=True, reason="accepted without judgement: TSP_GATE is off")
