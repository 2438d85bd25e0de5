"""A real disk that is full while something is written: nothing half-written is read, and work goes on when there is
space."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ml_backend.cycle import evaluate_version, snapshot, train_version
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.overview import worker_overview
from ml_backend.pool import append_line, go_on_with, open_lines, read_scores, score_pool
from ml_backend.service import Service
from model.errors import DiskFullError
from model.files import read_tensors
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result
from tests.ml_backend.examples import (
    KEY,
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    data_uri,
    import_images,
    key_of,
    phantom_images,
    settings,
)
from tests.ml_backend.test_frozen import Steps
from tests.small_disk import SmallDisk, small_disk

TRAINED_MB = 200  # a cycle


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", megabytes=TRAINED_MB) as disk:
        yield disk


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_an_image_that_finds_no_space_is_no_image_and_is_fetched_later(disk: SmallDisk) -> None:
    service = Service.connect(settings(disk.folder))
    (image,) = phantom_images(1)
    cache = service.settings.model_dir / "cache"
    with disk.full(), pytest.raises(DiskFullError, match=r"no space for the image of task 5: 0.0 MB are free"):
        service.images.fetch(task_id=5, uri=data_uri(image))
    assert files(cache) == set()
    fetched = service.images.fetch(task_id=5, uri=data_uri(image))
    assert fetched.path.read_bytes() == image
    service.close()


def test_a_line_that_finds_no_space_is_not_read_and_is_written_again(disk: SmallDisk) -> None:
    path = disk.folder / "scores.jsonl"
    with open_lines(path) as lines:
        append_line(lines, {"task": 1})
    full = disk.full(but=4096), pytest.raises(DiskFullError, match=f"no space for a line of {path}: ")
    with full[0], full[1], open_lines(path) as lines:
        append_line(lines, {"task": 2, "padding": "x" * 100_000})
    assert [line["task"] for line in read_scores(path)] == [1]
    assert go_on_with(path, "task") == {1}
    with open_lines(path) as lines:
        append_line(lines, {"task": 2})
    assert [line["task"] for line in read_scores(path)] == [1, 2]


def test_a_version_that_finds_no_space_does_not_exist_and_the_active_one_stays(disk: SmallDisk) -> None:
    service = Service.connect(settings(disk.folder))
    add_version(service, KEY)
    service.registry.activate(KEY, VERSION)
    before = files(service.registry.root)
    with disk.full(but=1_000_000), pytest.raises(DiskFullError, match=r"no space for .*weights.safetensors"):
        add_version(service, KEY, "tsp-2-00000000")
    with disk.full(), pytest.raises(DiskFullError, match=r"no space for .*active.json"):
        service.registry.activate(KEY, VERSION)
    assert files(service.registry.root) == before
    assert (service.registry.versions(KEY), service.registry.active(KEY)) == ([VERSION], VERSION)
    add_version(service, KEY, "tsp-2-00000000")
    assert service.registry.versions(KEY) == [VERSION, "tsp-2-00000000"]
    service.close()


def test_the_dashboard_tells_of_a_full_disk_when_no_worker_can(disk: SmallDisk) -> None:
    service = Service.connect(settings(disk.folder))
    remember_project(service.database, ProjectName(KEY, 7))
    assert "no space" not in worker_overview(service)["problem"]
    with disk.full():
        assert "The worker waits: no space for the records of what is done" in worker_overview(service)["problem"]
    service.close()


@pytest.mark.label_studio
def test_every_stage_that_found_no_space_goes_on_where_it_was(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, disk: SmallDisk
) -> None:
    tasks = import_images(client, project, [*phantom_images(3), *phantom_images(1, validation=True)])
    pool = import_images(client, project, phantom_images(5)[3:])
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(
        settings(
            disk.folder,
            **place,
            TSP_CHECKPOINT_STEPS=1,
            TSP_IMAGES_PER_STEP=1,
            DATABASE_URL=f"sqlite:///{disk.folder.parent}/elsewhere.sqlite3",
        )
    )
    key = key_of(service, project)
    log = begin_cycle(service, key)
    with disk.full(), pytest.raises(DiskFullError, match="no space for"):
        snapshot(service, key, 1, log)
    version = snapshot(service, key, 1, log)

    checkpoint = service.cycle_folder(key, 1) / "checkpoint.safetensors"
    steps = Steps(service, key, after=1, do=lambda: held.__enter__())
    held = disk.full(but=2_000_000)
    with pytest.raises(DiskFullError, match=r"no space for .*checkpoint.safetensors \(\d+\.\d MB\): 2\.\d MB are free"):
        train_version(service, key, 1, steps)
    assert read_tensors(checkpoint)[1]["step"] == "1"
    held.__exit__(None, None, None)
    train_version(service, key, 1, steps)
    assert steps.steps == [1, 2, 3]
    assert [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(".")] == []

    with disk.full(but=2_000_000), pytest.raises(DiskFullError, match=r"weights\.safetensors"):
        evaluate_version(service, key, 1, version, log)
    assert service.registry.versions(key) == []
    evaluate_version(service, key, 1, version, log)
    with disk.full(), pytest.raises(DiskFullError, match=r"the tasks that a version|the image of task|a line of"):
        score_pool(service, key, version, log)
    score_pool(service, key, version, log)
    assert [line["task"] for line in read_scores(service.scores_file(key, version))] == pool
    assert cycle_row(service, key).facts["pool_problem_count"] == 0
    service.close()
