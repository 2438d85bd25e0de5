"""The stages of a cycle, on annotations of a real Label Studio and with real training of a small network."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select

from ml_backend.cycle import evaluate_version, snapshot, train_version
from ml_backend.cycle_log import CycleLog
from ml_backend.db import UsedTaskRow
from ml_backend.errors import LabelConfigError
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.overview import overview
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from model.calibration import reliability, true_ious
from model.comparison import compare
from model.config import PseudoLabelConfig
from model.dataset import load_image, read_coco
from model.errors import TSPError
from model.files import read_tensors, write_bytes, write_tensors
from model.geometry import polygons_to_rle
from model.predict import detect
from model.pseudo_labels import with_score_threshold
from scripts.label_studio_server import LabelStudioServer, free_port
from tests.label_studio import polygon_result, raw_api
from tests.ml_backend.examples import (
    begin_cycle,
    cycle_row,
    data_uri,
    grey_images,
    import_images,
    key_of,
    phantom_images,
    settings,
    sha256,
)
from tests.ml_backend.test_worker import wait

pytestmark = pytest.mark.label_studio

RECTANGLE: dict[str, Any] = {
    **polygon_result(),
    "type": "rectanglelabels",
    "value": {"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["cell"]},
}


@pytest.fixture
def key(service: Service, project: Project) -> str:
    return key_of(service, project)


@pytest.fixture
def log(service: Service, key: str) -> CycleLog:
    return begin_cycle(service, key)


def annotate(client: LabelStudioClient, project: Project, images: list[bytes]) -> list[int]:
    """Tasks with one triangle each."""
    tasks = import_images(client, project, images)
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return tasks


@contextmanager
def another_service(service: Service, folder: Path, **environment: Any) -> Iterator[Service]:
    """The same service, started again with other settings."""
    known = service.settings
    place = {"LABEL_STUDIO_URL": known.label_studio_url, "LABEL_STUDIO_API_KEY": known.require_api_key()}
    another = Service.connect(settings(folder, **place, **environment))
    yield another
    another.close()


def part(service: Service, key: str, name: str, number: int = 1) -> dict[str, int]:
    """The images of a part of the snapshot by their hash, with their numbers of instances."""
    frozen = read_coco(service.cycle_folder(key, number) / f"{name}.json", Path("/"))
    assert frozen.class_names == ("cell", "lesion")
    return {image.image_id: len(image.labels) for image in frozen.images}


def used_tasks(service: Service) -> dict[int, int]:
    with service.database.session() as session:
        return {row.task_id: row.first_cycle for row in session.scalars(select(UsedTaskRow))}


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything in a folder, with the time at which it was written."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_the_snapshot_splits_the_images_by_their_bytes_and_stays_the_same(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    training, validation = grey_images(3), grey_images(2, validation=True)
    tasks = annotate(client, project, [training[0], validation[0], training[1], validation[1], training[2]])
    version = snapshot(service, key, 1, log)
    assert version.startswith("tsp-1-")
    assert part(service, key, "training") == {sha256(image): 1 for image in training}
    assert part(service, key, "validation") == {sha256(image): 1 for image in validation}
    assert used_tasks(service) == dict.fromkeys(tasks, 1)
    assert cycle_row(service, key).facts == {
        "annotated": 5, "training": 3, "validation": 2, "problems": [], "problem_count": 0,
        "new_images": 5, "new_empty_images": 0,
    }  # fmt: skip
    before = {name: content for name, (content, _) in files(service.cycle_folder(key, 1)).items()}
    assert snapshot(service, key, 1, log) == version
    assert {name: content for name, (content, _) in files(service.cycle_folder(key, 1)).items()} == before
    assert used_tasks(service) == dict.fromkeys(tasks, 1)


def test_a_snapshot_says_how_many_of_its_new_images_are_empty(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    *empty, drawn = import_images(client, project, grey_images(3))
    client.submit_annotation(drawn, result=[polygon_result()], lead_time_seconds=1)
    for task in empty:
        client.submit_annotation(task, result=[], lead_time_seconds=1)
    version = snapshot(service, key, 1, log)
    facts = cycle_row(service, key).facts
    assert (facts["new_images"], facts["new_empty_images"]) == (3, 2)
    assert snapshot(service, key, 1, log) == version  # again, as after a crash: they are still new in this cycle
    assert cycle_row(service, key).facts == facts


def test_the_next_snapshot_keeps_the_split_and_has_a_version_of_its_own(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    images, validation = grey_images(3), grey_images(1, validation=True)
    first = annotate(client, project, [images[0], *validation])
    version = snapshot(service, key, 1, log)
    second = annotate(client, project, images[1:])
    assert snapshot(service, key, 2, begin_cycle(service, key, 2)) != version
    assert list(part(service, key, "training", 2)) == [sha256(image) for image in images]
    assert part(service, key, "validation", 2) == part(service, key, "validation", 1)
    assert used_tasks(service) == {**dict.fromkeys(first, 1), **dict.fromkeys(second, 2)}


def test_an_instance_is_where_it_was_drawn(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    annotate(client, project, grey_images(1))
    snapshot(service, key, 1, log)
    frozen = read_coco(service.cycle_folder(key, 1) / "training.json", Path("/"))
    (image,) = frozen.images
    triangle_pct = polygon_result()["value"]["points"]
    triangle_xy = [[x / 100 * 64, y / 100 * 48] for x, y in triangle_pct]
    assert image.image_hw == (48, 64)
    assert image.labels.tolist() == [1]
    assert image.rles == (polygons_to_rle([np.array(triangle_xy)], (48, 64)),)


def test_the_same_image_in_two_tasks_is_learnt_once(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    (image,) = grey_images(1)
    tasks = annotate(client, project, [image, image])
    snapshot(service, key, 1, log)
    assert part(service, key, "training") == {sha256(image): 1}
    assert used_tasks(service) == dict.fromkeys(tasks, 1)


def test_only_what_people_said_about_an_image_is_learnt(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    drawn, empty, mixed, rectangle, skipped, untouched, broken = grey_images(7)
    tasks = import_images(client, project, [drawn, empty, mixed, rectangle, skipped, untouched])
    for task, result in zip(
        tasks, ([polygon_result()], [], [polygon_result(), {**RECTANGLE, "id": "r2"}], [RECTANGLE]), strict=False
    ):
        client.submit_annotation(task, result=result, lead_time_seconds=1)
    client.skip(tasks[4])
    (unreadable,) = import_images(client, project, [data_uri(broken[: len(broken) // 2])])
    client.submit_annotation(unreadable, result=[polygon_result()], lead_time_seconds=1)
    snapshot(service, key, 1, log)
    assert part(service, key, "training") == {sha256(drawn): 1, sha256(empty): 0, sha256(mixed): 1}
    facts = cycle_row(service, key).facts
    assert (facts["annotated"], facts["training"], facts["problem_count"]) == (5, 3, 2)
    assert f"task {tasks[3]}: nothing of its annotation is learnt, because not all of it can be" in facts["problems"][0]
    assert "rectanglelabels: only polygons are learnt" in facts["problems"][0]
    assert f"image of task {unreadable}" in facts["problems"][1]
    assert set(used_tasks(service)) == {*tasks[:4], unreadable}


def test_the_ground_truth_annotation_counts_among_several(
    service: Service,
    client: LabelStudioClient,
    project: Project,
    key: str,
    log: CycleLog,
    label_studio: LabelStudioServer,
) -> None:
    (image,) = grey_images(1)
    (task,) = import_images(client, project, [image])
    truth = client.submit_annotation(task, result=[polygon_result(label="lesion")], lead_time_seconds=1)
    with raw_api(label_studio) as api:
        assert api.patch(f"/api/annotations/{truth}/", json={"ground_truth": True}).is_success
    client.submit_annotation(task, result=[], lead_time_seconds=1)
    snapshot(service, key, 1, log)
    assert part(service, key, "training") == {sha256(image): 1}


@pytest.mark.parametrize("annotated", [0, 2], ids=["nothing is annotated", "all of it is for validation"])
def test_a_snapshot_with_nothing_to_train_on_says_so(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, annotated: int
) -> None:
    annotate(client, project, grey_images(2, validation=True)[:annotated])
    with pytest.raises(TSPError, match=rf"none of the {annotated} annotated tasks can be trained on \({annotated} are"):
        snapshot(service, key, 1, log)
    assert cycle_row(service, key).facts["validation"] == annotated


@pytest.mark.parametrize(("batch", "counted"), [(3, 2), (2, 0)], ids=["a batch that goes on", "a full batch"])
def test_what_is_for_validation_alone_counts_on_until_the_batch_is_full(
    service: Service,
    client: LabelStudioClient,
    project: Project,
    key: str,
    log: CycleLog,
    tmp_path: Path,
    batch: int,
    counted: int,
) -> None:
    annotate(client, project, grey_images(2, validation=True))
    with another_service(service, tmp_path, TSP_BATCH_SIZE=batch) as ours, pytest.raises(TSPError, match="none of"):
        snapshot(ours, key, 1, log)
    log.finish("failed")
    assert len(used_tasks(service)) == 2 - counted
    assert not reconcile(service, key).start
    assert overview(service)[0]["new_annotated"] == counted


def test_a_snapshot_of_a_project_without_polygons_says_so(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    client.update_project(project.id, label_config='<View><Image name="image" value="$image"/></View>')
    with pytest.raises(LabelConfigError, match="expected a PolygonLabels tag"):
        snapshot(service, key, 1, log)


def test_training_and_evaluation_make_a_version_and_repeating_them_changes_nothing(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    annotate(client, project, [*phantom_images(4), *phantom_images(2, validation=True)])
    (empty,) = import_images(client, project, phantom_images(3, validation=True)[2:])
    client.submit_annotation(empty, result=[], lead_time_seconds=1)
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    evaluate_version(service, key, 1, version, log)
    assert service.registry.versions(key) == [version]
    assert service.registry.active(key) is None  # until it is published
    network, card = service.registry.load(key, version)
    facts = cycle_row(service, key).facts
    assert card.class_names == ("cell", "lesion")
    assert card.metrics == facts["metrics"]
    assert card.training["epochs"] == 1
    assert network.config.min_size == 64
    assert facts["pseudo_labeled"] == 0
    assert facts["training_seconds"] > 0
    assert set(facts["loss"]) >= {"loss_classifier", "loss_mask"}
    measured = [facts["metrics"][name] for name in ("images", "images_with_instances", "instances")]
    assert measured == [3, 2, 2]
    assert 0 <= facts["metrics"]["map_50"] <= 1
    row = cycle_row(service, key)
    assert (row.stage, row.done, row.total) == ("evaluating", 3, 3)

    made = files(service.settings.model_dir / "cycles") | files(service.settings.model_dir / "versions")
    train_version(service, key, 1, log)
    evaluate_version(service, key, 1, version, log)
    assert files(service.settings.model_dir / "cycles") | files(service.settings.model_dir / "versions") == made
    assert cycle_row(service, key).facts == facts


def test_two_processes_train_a_version_together(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotate(client, project, [*grey_images(3), *grey_images(1, validation=True)])
    with another_service(service, tmp_path, TSP_PROCESSES=2, TSP_IMAGES_PER_STEP=2) as together:
        version = snapshot(together, key, 1, log)
        train_version(together, key, 1, log)
        steps = cycle_row(together, key).total
        assert read_tensors(together.cycle_folder(key, 1) / "checkpoint.safetensors")[1]["step"] == str(steps)
        assert cycle_row(together, key).facts["loss"].keys() >= {"loss_mask", "loss_mask_iou"}
        assert evaluate_version(together, key, 1, version, log)
        assert together.registry.load(key, version)[1].version == version


def test_a_worker_waits_for_another_machine_and_they_train_a_version_together(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotate(client, project, [*grey_images(3), *grey_images(1, validation=True)])
    place = {"TSP_MACHINES": 2, "TSP_IMAGES_PER_STEP": 2, "TSP_MEETING_POINT": f"127.0.0.1:{free_port()}"}
    with another_service(service, tmp_path, **place) as together, ThreadPoolExecutor() as pool:
        version = snapshot(together, key, 1, log)
        training = pool.submit(train_version, together, key, 1, log)
        wait(lambda: "waiting" in cycle_row(together, key).facts or training.done(), training.exception)
        waiting = cycle_row(together, key).facts["waiting"]["for"]
        assert waiting == (
            f"1 of 2 machines to train together are missing at {place['TSP_MEETING_POINT']}. "
            "Start `python -m ml_backend.machine` on the others, with this worker's settings and MODEL_DIR."
        )
        environment = {"MODEL_DIR": str(together.settings.model_dir)} | {n: str(v) for n, v in place.items()}
        command = [sys.executable, "-m", "ml_backend.machine"]
        with (tmp_path / "machine.log").open("w") as words:
            machine = subprocess.Popen(command, env={**os.environ, **environment}, stderr=words)
        try:
            training.result(timeout=120)
        finally:
            machine.terminate()
        assert machine.wait() == 0
        assert "waiting" not in cycle_row(together, key).facts
        assert "as machine 2 of 2" in (tmp_path / "machine.log").read_text()
        assert evaluate_version(together, key, 1, version, log)


def test_images_that_nobody_labelled_teach_by_what_the_active_version_trusted(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    annotated, *pool = phantom_images(5)
    (validation,) = phantom_images(1, validation=True)
    annotate(client, project, [annotated])
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    assert cycle_row(service, key).facts["pseudo_labeled"] == 0
    evaluate_version(service, key, 1, version, log)
    assert cycle_row(service, key).facts["metrics"]["map_50"] is None  # there was nothing to measure with
    service.registry.activate(key, version)

    tasks = import_images(client, project, [*pool, validation])
    square = polygons_to_rle([np.array([[8, 8], [40, 8], [40, 40], [8, 40]])], (64, 64))
    lines: list[dict[str, Any]] = []
    for task, image, labels in (
        (tasks[0], pool[0], ["lesion"]),
        (tasks[1], pool[1], ["gone", "cell"]),
        (tasks[2], pool[2], ["gone"]),
        (tasks[3], pool[3], []),
        (tasks[4], validation, ["cell"]),
        (tasks[4] + 1, annotated, ["cell"]),
        (tasks[4] + 2, pool[0], ["cell"]),  # the same image in another task
    ):
        fetched = service.images.fetch(task_id=task, uri=data_uri(image))
        pseudo = {"labels": labels, "rles": [square] * len(labels)} if labels else None
        path, hw = str(fetched.path), list(fetched.image_hw)
        lines.append({"task": task, "image": fetched.sha256, "path": path, "image_hw": hw, "pseudo": pseudo})
    lines.append({"task": tasks[4] + 3, "problem": "broken"})
    scores = service.scores_file(key, version)
    scores.parent.mkdir(parents=True)
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))

    second = begin_cycle(service, key, 2)
    snapshot(service, key, 2, second)
    train_version(service, key, 2, second)
    facts = cycle_row(service, key, 2).facts
    assert (facts["pseudo_labeled"], facts["pseudo_instances"]) == (2, 2)


def test_nothing_is_learnt_from_unlabelled_images_when_that_is_switched_off(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotate(client, project, phantom_images(1))
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    evaluate_version(service, key, 1, version, log)
    service.registry.activate(key, version)
    scores = service.scores_file(key, version)
    scores.parent.mkdir(parents=True)
    scores.write_text('{"not": "looked at"}\n')
    with another_service(service, tmp_path, TSP_SEMI_SUPERVISED="false") as supervised:
        second = begin_cycle(supervised, key, 2)
        snapshot(supervised, key, 2, second)
        train_version(supervised, key, 2, second)
        assert cycle_row(supervised, key, 2).facts["pseudo_labeled"] == 0


@pytest.mark.parametrize("what", ["of an older release", "damaged"])
def test_a_checkpoint_that_cannot_be_gone_on_with_is_removed_and_training_starts_anew(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, what: str
) -> None:
    annotate(client, project, phantom_images(2))
    snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    checkpoint = service.cycle_folder(key, 1) / "checkpoint.safetensors"
    tensors, metadata = read_tensors(checkpoint)
    if what == "damaged":
        write_bytes(checkpoint, checkpoint.read_bytes()[:-1000])
    else:  # it told runs apart by another fingerprint
        halved = {name: tensor / 2 for name, tensor in tensors.items()}
        write_tensors(checkpoint, halved, {**metadata, "run": "another fingerprint"})
    train_version(service, key, 1, log)
    again, metadata_again = read_tensors(checkpoint)
    assert metadata_again == metadata
    assert [name for name in tensors if not torch.equal(tensors[name], again[name])] == []


@pytest.mark.parametrize("what", ["gone", "damaged"])
def test_what_a_training_has_come_to_is_made_again_to_its_end(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path, what: str
) -> None:
    annotate(client, project, phantom_images(1))
    with another_service(service, tmp_path, TSP_EPOCHS=4, TSP_CHECKPOINT_STEPS=1) as four_steps:
        version = snapshot(four_steps, key, 1, log)
        train_version(four_steps, key, 1, log)
        checkpoint = four_steps.cycle_folder(key, 1) / "checkpoint.safetensors"
        trained = weights(checkpoint.parent)
        if what == "damaged":
            write_bytes(checkpoint, checkpoint.read_bytes()[:-1000])
        else:
            checkpoint.unlink()
        with pytest.raises(PowerCutError):
            evaluate_version(four_steps, key, 1, version, LogUntilPowerCut(four_steps.database, key, 1))
        evaluate_version(four_steps, key, 1, version, log)
    network, _ = service.registry.load(key, version)
    assert [
        name for name, tensor in network.state_dict().items() if not torch.equal(tensor, trained[f"network.{name}"])
    ] == []


BEYOND_THE_PAPER: dict[str, Any] = {
    "TSP_EPOCHS": 4,  # of one image and one step each
    "TSP_CHECKPOINT_STEPS": 1,
    "TSP_BETA": 1,
    "TSP_RAMP_UP": 0.8,
    "TSP_SOFT_WEIGHTS": "true",
    "TSP_PSEUDO_NEGATIVES": "outside_ignored",
    "TSP_PSEUDO_EVERY_STEPS": 2,
    "TSP_TEACHER_DECAY": 0.5,
    "TSP_TEACHER_BURN_IN": 0.4,
    "TSP_CLASS_WISE_THRESHOLDS": "true",
    "TSP_CLASS_THRESHOLD": 0.95,
    "TSP_CLASS_THRESHOLD_FLOOR": 0.5,
    "TSP_BOX_THRESHOLD": 0,
    "TSP_MASK_THRESHOLD": 0,
    "TSP_IGNORE_THRESHOLD": 0.1,
}


class PowerCutError(Exception):
    """Nothing after it happens."""


class LogUntilPowerCut(CycleLog):
    """Training ends in the middle, after a checkpoint."""

    def progress(self, done: int, total: int) -> None:
        super().progress(done, total)
        if done == 3:
            raise PowerCutError


def weights(folder: Path) -> dict[str, Any]:
    return read_tensors(folder / "checkpoint.safetensors")[0]


def scores_line(service: Service, task: int, image: bytes, seen: list[tuple[str, float]]) -> dict[str, Any]:
    """A line of the scores file: squares of these classes and class scores."""
    fetched = service.images.fetch(task_id=task, uri=data_uri(image))
    box = [8.0, 8.0, 40.0, 40.0]
    square = polygons_to_rle([np.array([[8, 8], [40, 8], [40, 40], [8, 40]])], (64, 64))
    return {
        "task": task,
        "image": fetched.sha256,
        "path": str(fetched.path),
        "image_hw": list(fetched.image_hw),
        "detections": {
            "labels": [name for name, _ in seen],
            "triplets": [[c, 0.9, 0.8] for _, c in seen],
            "boxes_xyxy": [box] * len(seen),
            "rles": [square if c > 0.5 else None for _, c in seen],
        },
    }


def write_scores(service: Service, key: str, version: str, lines: list[dict[str, Any]]) -> None:
    scores = service.scores_file(key, version)
    scores.parent.mkdir(parents=True, exist_ok=True)
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_cycle_with_every_option_ends_with_the_same_weights_when_it_is_killed_and_settings_change(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotated, *pool = phantom_images(4)
    annotate(client, project, [annotated])
    teaching = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    evaluate_version(service, key, 1, teaching, log)
    service.registry.activate(key, teaching)
    tasks = import_images(client, project, pool)
    found = [[("cell", 0.96), ("lesion", 0.7), ("cell", 0.3)], [("cell", 0.6)], []]
    lines = [scores_line(service, *of_image) for of_image in zip(tasks, pool, found, strict=True)]
    write_scores(service, key, teaching, lines)

    folder = service.cycle_folder(key, 2)
    with another_service(service, tmp_path, **BEYOND_THE_PAPER) as beyond:
        second = begin_cycle(beyond, key, 2)
        version = snapshot(beyond, key, 2, second)
        with pytest.raises(PowerCutError):
            train_version(beyond, key, 2, LogUntilPowerCut(beyond.database, key, 2))
    write_scores(service, key, teaching, [])  # what is decided stays decided
    train_version(service, key, 2, second)  # whose settings have none of the options
    evaluate_version(service, key, 2, version, second)
    resumed = weights(folder)

    facts = cycle_row(service, key, 2).facts
    assert facts["class_thresholds"] == {
        "cell": pytest.approx(0.95),
        "lesion": pytest.approx(0.95 * 0.7 / ((0.96 + 0.6) / 2)),
    }
    # By the class: 0.7 is less than its threshold, 0.85.
    assert (facts["pseudo_labeled"], facts["pseudo_instances"], facts["pseudo_for_teacher"]) == (1, 1, 2)
    (first, *rest) = read_coco(folder / "pseudo.json", Path("/")).images
    assert first.triplets is not None
    assert first.triplets.tolist() == [[0.96, 0.9, 0.8]]
    assert [len(image.ignored_boxes_xyxy) for image in (first, *rest) if image.ignored_boxes_xyxy is not None] == [
        2, 1, 0
    ]  # fmt: skip

    (folder / "checkpoint.safetensors").unlink()
    train_version(service, key, 2, second)
    assert {name for name in resumed if name.startswith("teacher.")}
    uninterrupted = weights(folder)
    assert resumed.keys() == uninterrupted.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], uninterrupted[name])] == []
    network, card = service.registry.load(key, version)
    assert (card.training["ema_decay"], card.training["soft_weights"]) == (0.5, True)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, resumed[f"teacher.{name}"])


def test_what_was_seen_by_an_older_release_breaks_no_cycle_that_needs_more(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotated, *pool = phantom_images(3)
    annotate(client, project, [annotated])
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    evaluate_version(service, key, 1, version, log)
    service.registry.activate(key, version)
    tasks = import_images(client, project, pool)
    old, new = (scores_line(service, t, image, [("cell", 0.96)]) for t, image in zip(tasks, pool, strict=True))
    seen = old.pop("detections")
    old["pseudo"] = {"labels": seen["labels"], "rles": seen["rles"]}
    write_scores(service, key, version, [old, new])
    with another_service(service, tmp_path, **BEYOND_THE_PAPER) as beyond:
        second = begin_cycle(beyond, key, 2)
        snapshot(beyond, key, 2, second)
        train_version(beyond, key, 2, second)
    facts = cycle_row(service, key, 2).facts
    assert (facts["pseudo_labeled"], facts["pseudo_for_teacher"]) == (1, 1)


def test_a_cycle_that_an_older_release_began_goes_on(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog
) -> None:
    annotate(client, project, phantom_images(1))
    snapshot(service, key, 1, log)
    recipe = service.cycle_folder(key, 1) / "recipe.json"
    frozen = json.loads(recipe.read_text())
    del frozen["pseudo_labels"]
    recipe.write_text(json.dumps(frozen))
    train_version(service, key, 1, log)
    (service.cycle_folder(key, 1) / "class_thresholds.json").unlink()
    train_version(service, key, 1, log)
    assert cycle_row(service, key).facts["pseudo_labeled"] == 0


def test_both_iou_branches_are_measured_on_the_validation_images(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotate(client, project, [*phantom_images(1), *phantom_images(2, validation=True)])
    with another_service(service, tmp_path, TSP_MIN_STEPS=60, TSP_WEIGHTS="imagenet") as patient:
        version = snapshot(patient, key, 1, log)
        train_version(patient, key, 1, log)
        evaluate_version(patient, key, 1, version, log)
    metrics = cycle_row(service, key).facts["metrics"]
    network, card = service.registry.load(key, version)
    validation = read_coco(service.cycle_folder(key, 1) / "validation.json", Path("/")).images
    found = {image.image_id: next(detect(network, [load_image(image.path)])) for image in validation}
    pairs = true_ious(found, validation, mask_threshold=network.config.mask_threshold)
    for branch in ("box", "mask"):
        expected = asdict(reliability(pairs[f"{branch}_scores"], pairs[f"{branch}_ious"]))
        assert metrics[f"{branch}_reliability"] == json.loads(json.dumps(expected))
        assert metrics[f"{branch}_reliability"]["count"] > 0
    assert 0 < metrics["rescored_map_50_95"] <= metrics["rescored_map_50"] <= 1
    assert card.metrics == metrics


def test_by_precision_the_validation_images_say_how_far_a_version_is_trusted(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    first, second = phantom_images(2)
    annotate(client, project, [first, *phantom_images(2, validation=True)])
    options = {"TSP_MIN_STEPS": 60, "TSP_WEIGHTS": "imagenet", "TSP_PSEUDO_RULE": "precision"}
    with another_service(service, tmp_path, **options, TSP_PSEUDO_PRECISION=0.2) as careful:
        version = snapshot(careful, key, 1, log)
        train_version(careful, key, 1, log)
        evaluate_version(careful, key, 1, version, log)
        network, card = careful.registry.load(key, version)
        validation = read_coco(careful.cycle_folder(key, 1) / "validation.json", Path("/"))
        found = {image.image_id: next(detect(network, [load_image(image.path)])) for image in validation.images}
        compared = compare(found, validation.images, len(validation.class_names), mask_threshold=0.3)
        expected = with_score_threshold(PseudoLabelConfig(rule="precision", precision=0.2), compared)
        assert 0 < expected.score_threshold < 1
        assert card.metrics["pseudo_score_threshold"] == expected.score_threshold

        careful.registry.activate(key, version)
        [task] = import_images(client, project, [second])
        sure, unsure = expected.score_threshold / 2 + 0.5, expected.score_threshold / 2
        line = scores_line(careful, task, second, [("lesion", 0.9), ("lesion", 0.9)])
        line["detections"]["triplets"] = [[sure] * 3, [unsure] * 3]  # equal scores: s is their value
        write_scores(careful, key, version, [line])
        snapshot(careful, key, 2, begin_cycle(careful, key, 2))
        train_version(careful, key, 2, CycleLog(careful.database, key, 2))
        recipe = json.loads((careful.cycle_folder(key, 2) / "recipe.json").read_text())
        assert recipe["pseudo_labels"]["score_threshold"] == expected.score_threshold
        assert cycle_row(careful, key, 2).facts["pseudo_instances"] == 1


def test_settings_that_change_in_the_middle_of_a_cycle_count_from_the_next_one(
    service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog, tmp_path: Path
) -> None:
    annotate(client, project, phantom_images(1))
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    made = files(service.cycle_folder(key, 1))
    others = {"TSP_EPOCHS": 2, "TSP_IMAGE_SIZE": 96, "TSP_STRATEGY": "learning_loss"}
    with another_service(service, tmp_path, **others) as changed:
        train_version(changed, key, 1, log)
        evaluate_version(changed, key, 1, version, log)
        assert files(service.cycle_folder(key, 1)) == made
        card = service.registry.card(key, version)
        assert (card.training["epochs"], card.network["min_size"]) == (1, 64)
        assert (card.strategy, card.network["learning_loss"]) == ("tsp", False)
        assert snapshot(changed, key, 2, begin_cycle(changed, key, 2)).removeprefix("tsp-2-") not in version
        recipe = json.loads((service.cycle_folder(key, 2) / "recipe.json").read_text())
        assert (recipe["strategy"], recipe["options"]["learning_loss"]) == ("learning_loss", True)
