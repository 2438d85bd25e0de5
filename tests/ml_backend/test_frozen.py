"""Images that are damaged in the cache after the snapshot was taken, with a real Label Studio and real training."""

import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ml_backend.batch import choose_batch
from ml_backend.cycle import evaluate_version, snapshot, train_version
from ml_backend.cycle_log import CycleLog
from ml_backend.frozen import frozen_part
from ml_backend.images import is_whole
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.pool import read_scores, score_pool
from ml_backend.service import Service
from model.errors import TSPError
from model.types import LabeledImage
from scripts.label_studio_server import HOST, LabelStudioServer
from tests.label_studio import polygon_result, raw_api
from tests.ml_backend.examples import (
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    import_images,
    key_of,
    phantom_images,
    settings,
    sha256,
)

pytestmark = pytest.mark.label_studio


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def overwrite(path: Path) -> None:
    path.write_bytes(b"no image at all")


def exchange(path: Path) -> None:
    """By a whole image, of another size."""
    Image.new("RGB", (20, 10)).save(path)


DAMAGES: tuple[Callable[[Path], None], ...] = (cut_off, overwrite, exchange, Path.unlink)


@contextmanager
def image_server(folder: Path) -> Iterator[str]:
    """An image server of somebody else."""
    with ThreadingHTTPServer((HOST, 0), partial(QuietHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{server.server_port}"
        server.shutdown()


@pytest.fixture
def service(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(
        settings(
            tmp_path, **place, TSP_ALLOWED_IMAGE_HOSTS="127.0.0.0/8", TSP_CHECKPOINT_STEPS=1, TSP_IMAGES_PER_STEP=1,
        )
    )  # fmt: skip
    yield service
    service.close()


@pytest.fixture
def key(service: Service, project: Project) -> str:
    return key_of(service, project)


def annotate(client: LabelStudioClient, project: Project, images: list[bytes] | list[str]) -> list[int]:
    tasks = import_images(client, project, images)
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return tasks


def images_of(service: Service, key: str, name: str) -> tuple[LabeledImage, ...]:
    return frozen_part(service.cycle_folder(key, 1), name).images


class Steps(CycleLog):
    """Remembers the stages and which training steps were done; something may happen after one of them."""

    def __init__(self, service: Service, key: str, *, after: int = 0, do: Callable[[], None] = lambda: None) -> None:
        super().__init__(service.database, key, 1)
        self.steps: list[int] = []
        self.stages: list[tuple[str, int]] = []
        self._after, self._do = after, do

    def stage(self, stage: str, *, done: int = 0, total: int = 0) -> None:
        super().stage(stage, done=done, total=total)
        self.stages.append((stage, total))

    def progress(self, done: int, total: int) -> None:
        super().progress(done, total)
        if not self.stages[-1][0].startswith("training"):
            return
        self.steps.append(done)
        if len(self.steps) == self._after:
            self._do()


def test_images_that_were_damaged_after_the_snapshot_are_fetched_again(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    annotate(client, project, [*phantom_images(4), *phantom_images(4, validation=True)])
    log = begin_cycle(service, key)
    version = snapshot(service, key, 1, log)
    for damage, image in zip(DAMAGES, images_of(service, key, "training"), strict=True):
        damage(image.path)
    steps = Steps(service, key)
    train_version(service, key, 1, steps)
    assert steps.steps == [1, 2, 3, 4]
    assert steps.stages[0] == ("fetching damaged images again", 4)
    for damage, image in zip(DAMAGES, images_of(service, key, "validation"), strict=True):
        damage(image.path)
    evaluate_version(service, key, 1, version, log)
    facts = cycle_row(service, key).facts
    assert (facts["training_mended"], facts["validation_mended"]) == (4, 4)
    assert (facts["training_problem_count"], facts["validation_problem_count"]) == (0, 0)
    assert facts["metrics"]["images"] == 4
    assert all(is_whole(image.path) for name in ("training", "validation") for image in images_of(service, key, name))


def test_an_image_that_is_damaged_while_training_runs_costs_no_step_when_it_can_be_fetched_again(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    annotate(client, project, phantom_images(3))
    snapshot(service, key, 1, begin_cycle(service, key))

    def damage_all() -> None:
        for image in images_of(service, key, "training"):
            cut_off(image.path)

    log = Steps(service, key, after=2, do=damage_all)
    train_version(service, key, 1, log)
    assert log.steps == [1, 2, 3]
    assert cycle_row(service, key).facts["training_mended"] == 3


def delete_task(server: LabelStudioServer, task: int, file: Path) -> None:
    with raw_api(server) as api:
        api.delete(f"/api/tasks/{task}/").raise_for_status()


def remove_source(server: LabelStudioServer, task: int, file: Path) -> None:
    file.unlink()


def exchange_source(server: LabelStudioServer, task: int, file: Path) -> None:
    exchange(file)


LOST: tuple[tuple[Callable[[LabelStudioServer, int, Path], None], str], ...] = (
    (remove_source, r"cannot be fetched again: image of task {task} .*answered 404"),
    (exchange_source, r"task {task} has another image now"),
    (delete_task, r"its task is not there any more"),
)


def test_images_that_cannot_be_had_again_are_told_and_missed(
    label_studio: LabelStudioServer, service: Service, client: LabelStudioClient, project: Project, key: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    sources = tmp_path / "sources"
    sources.mkdir()
    images = [*phantom_images(5), *phantom_images(4, validation=True)]
    files = [sources / f"{number}.png" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image)
    with image_server(sources) as url:
        tasks = annotate(client, project, [f"{url}/{file.name}" for file in files])
        log = begin_cycle(service, key)
        version = snapshot(service, key, 1, log)
        for name, first in (("training", 0), ("validation", 5)):
            cached = {image.image_id: image.path for image in images_of(service, key, name)}
            for number, (lose, _) in enumerate(LOST, start=first):
                lose(label_studio, tasks[number], files[number])
                cut_off(cached[sha256(images[number])])
        steps = Steps(service, key)
        train_version(service, key, 1, steps)
        evaluate_version(service, key, 1, version, log)
    assert steps.steps == [1, 2]  # the images that are left
    facts = cycle_row(service, key).facts
    assert facts["metrics"]["images"] == 1
    for name, first in (("training", 0), ("validation", 5)):
        assert (facts[f"{name}_problem_count"], facts[f"{name}_mended"]) == (3, 0)
        problems = facts[f"{name}_problems"]
        assert all("damaged in the cache since the snapshot was taken" in problem for problem in problems)
        for number, (_, told) in enumerate(LOST, start=first):
            assert sum(bool(re.search(told.format(task=tasks[number]), problem)) for problem in problems) == 1


def test_without_any_image_left_a_cycle_says_why(
    service: Service, client: LabelStudioClient, project: Project, key: str, tmp_path: Path
) -> None:
    (tmp_path / "0.png").write_bytes(phantom_images(1)[0])
    with image_server(tmp_path) as url:
        annotate(client, project, [f"{url}/0.png"])
        log = begin_cycle(service, key)
        snapshot(service, key, 1, log)
    shutil.rmtree(service.settings.model_dir / "cache" / "images")
    with pytest.raises(TSPError, match=r"none of the 1 training images .* can be had: .*cannot be fetched again"):
        train_version(service, key, 1, log)


def test_an_image_that_only_the_training_cannot_read_ends_no_cycle(
    service: Service, client: LabelStudioClient, project: Project, key: str, tmp_path: Path
) -> None:
    """Floating-point TIFF: Pillow reads it, OpenCV does not."""
    unreadable = io.BytesIO()
    Image.new("F", (64, 64), 0.5).save(unreadable, "TIFF")
    annotate(client, project, [*phantom_images(2), unreadable.getvalue()])
    with_it = Service.connect(service.settings.model_copy(update={"validation_fraction": 0.0}))
    log = begin_cycle(with_it, key)
    snapshot(with_it, key, 1, log)
    assert len(images_of(with_it, key, "training")) == 3
    train_version(with_it, key, 1, log)
    facts = cycle_row(with_it, key).facts
    assert (facts["training_problem_count"], facts["training_mended"]) == (1, 0)
    assert "OpenCV" in facts["training_problems"][0]
    with_it.close()


def test_a_validation_image_of_another_size_than_its_annotations_measures_nothing(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    annotate(client, project, [*phantom_images(2), *phantom_images(3, validation=True)])
    log = begin_cycle(service, key)
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    frozen = service.cycle_folder(key, 1) / "validation.json"
    part = json.loads(frozen.read_text())
    part["images"][0].update(height=10, width=20)
    part["annotations"] = [one for one in part["annotations"] if one["image_id"] != part["images"][0]["id"]]
    frozen.write_text(json.dumps(part))
    evaluate_version(service, key, 1, version, log)
    facts = cycle_row(service, key).facts
    assert facts["metrics"]["images"] == 2
    assert (facts["validation_problem_count"], facts["validation_mended"]) == (1, 0)
    assert "its annotations are for size (10, 20), the file has (" in facts["validation_problems"][0]


def test_images_of_the_pool_and_of_the_batch_before_are_fetched_again_when_they_are_scored(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    annotate(client, project, phantom_images(2))
    tasks = import_images(client, project, phantom_images(6)[2:])
    add_version(service, key, strategy="core_set")
    log = begin_cycle(service, key)
    snapshot(service, key, 1, log)
    images = [image.path for image in images_of(service, key, "training")]
    for task in client.tasks(project.id):
        if task.id in tasks:  # somebody looked at them before
            fetched = service.images.fetch(task_id=task.id, uri=task.data["image"], project_key=key)
            images.append(fetched.path)
    for damage, path in zip((cut_off, overwrite, *DAMAGES), images, strict=True):
        damage(path)
    assert score_pool(service, key, VERSION, log) == 4
    lines = {line["task"]: line for line in read_scores(service.scores_file(key, VERSION))}
    assert set(lines) == set(tasks)
    assert all("problem" not in line for line in lines.values())
    choose_batch(service, key, 1, VERSION, log)
    facts = cycle_row(service, key).facts
    assert (facts["annotated_mended"], facts["annotated_problem_count"], facts["batch"]) == (2, 0, 4)
    assert "training_mended" not in facts  # that is what the training stage has found
    assert len(list(read_scores(service.annotated_file(key, VERSION)))) == 2
