"""The images of a cycle's snapshot. What has left the cache since, or was damaged there, is fetched again."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ml_backend.cycle_log import CycleLog
from ml_backend.errors import ImageError
from ml_backend.images import is_whole
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import image_uri
from ml_backend.ls_types import Task
from ml_backend.pool import read_scores
from ml_backend.service import Service
from model.dataset import LabeledSet, load_annotated, read_coco
from model.errors import ImageFileError, TSPError
from model.files import write_json
from model.types import LabeledImage

logger = logging.getLogger(__name__)

_TASKS = "tasks.json"  # of a cycle's folder: {the image's sha256: its task}
_MOST_REPETITIONS = 10
_SHOWN = 20
_Result = TypeVar("_Result")


def frozen_part(folder: Path, name: str) -> LabeledSet:
    """A part of the snapshot; its images lie in the cache, under absolute paths."""
    return read_coco(folder / f"{name}.json", Path("/"))


def freeze_tasks(folder: Path, tasks: dict[str, int]) -> None:
    """Keep which task each image of the snapshot, by its hash, came from."""
    write_json(folder / _TASKS, tasks)


def usable_part(
    service: Service, project_key: str, number: int, name: str, log: CycleLog, *, read: bool = False, told_as: str = ""
) -> LabeledSet:
    """A part of the snapshot with all images that can be had; people are told which ones are missing, and why, in facts
    that begin with `told_as` or else with the part's name.

    The bytes of each file are compared with its name, and with `read` it is decoded as well. Raises TSPError when
    nothing is left of what people annotated, and the client's errors when Label Studio has to be asked and is away.
    """
    part = frozen_part(service.cycle_folder(project_key, number), name)
    part = replace(part, images=tuple(replace(i, path=service.images.at_hand(i.path)) for i in part.images))
    bad = {image.image_id for image in part.images if not is_whole(image.path) or (read and _problem_with(image))}
    if not bad:
        return part
    damaged = [image for image in part.images if image.image_id in bad]
    mended, problems = _mended(service, project_key, number, damaged, log)
    for problem in problems:
        logger.warning("project %s, cycle %d goes on without an image: %s", project_key, number, problem)
    logger.warning("project %s: %d damaged %s images are fetched again", project_key, len(mended), name)
    told = told_as or name
    log.facts(
        {f"{told}_problems": problems[:_SHOWN], f"{told}_problem_count": len(problems), f"{told}_mended": len(mended)}
    )
    whole = (mended.get(image.image_id, image) for image in part.images)
    left = tuple(image for image in whole if image.image_id not in bad or image.image_id in mended)
    if not left and name != "pseudo":
        raise TSPError(f"none of the {len(part.images)} {name} images of the snapshot can be had: {problems[0]}")
    return replace(part, images=left)


def repeated_without_damaged(stage: Callable[[bool], _Result]) -> _Result:
    """Do a stage, and do it again when an image turns out to be damaged in its middle: with True for "decode every
    image before", so that each repetition has mended or left out what ended the one before."""
    read = False
    for _ in range(_MOST_REPETITIONS):
        try:
            return stage(read)
        except ImageFileError as error:
            logger.warning("a damaged image ended a stage, which is done again: %s", error)
            read = True
    return stage(read)


def _problem_with(image: LabeledImage) -> str:
    """Why the file cannot be used; "" when it can."""
    try:
        load_annotated(image)
    except ImageFileError as error:
        return str(error)
    return ""


def _mended(
    service: Service, project_key: str, number: int, damaged: Sequence[LabeledImage], log: CycleLog
) -> tuple[dict[str, LabeledImage], list[str]]:
    """Those that could be fetched again, by their hash, and why the others could not."""
    log.stage("fetching damaged images again", total=len(damaged))
    project = service.project(project_key)
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    tasks = _tasks_of(service, project_key, number, {image.image_id for image in damaged})
    mended: dict[str, LabeledImage] = {}
    problems: list[str] = []
    for done, image in enumerate(damaged, start=1):
        try:
            mended[image.image_id] = _fetched_again(service, project_key, image, tasks.get(image.image_id), config)
        except (ImageError, ImageFileError) as error:
            problems.append(str(error))
        log.progress(done, len(damaged))
    return mended, problems


def _tasks_of(service: Service, project_key: str, number: int, image_ids: Iterable[str]) -> dict[str, Task]:
    """The tasks, as they are now, from which images of the snapshot or of the pool came; deleted ones are left out."""
    path = service.cycle_folder(project_key, number) / _TASKS
    version = service.registry.active(project_key)
    if version:
        service.bring_lines(service.scores_file(project_key, version))
    seen = read_scores(service.scores_file(project_key, version)) if version else ()
    numbers = {line["image"]: line["task"] for line in seen if "image" in line}
    numbers |= json.loads(path.read_text()) if path.exists() else {}  # older releases wrote none
    wanted = {image_id: numbers[image_id] for image_id in image_ids if image_id in numbers}
    task_ids = set(wanted.values())
    found = service.label_studio.tasks(service.project(project_key).id)
    tasks = {task.id: task for task in found if task.id in task_ids}
    return {image_id: tasks[task] for image_id, task in wanted.items() if task in tasks}


def _fetched_again(
    service: Service, project_key: str, image: LabeledImage, task: Task | None, config: LabelConfig
) -> LabeledImage:
    """The image with a file that can be read; ImageError or ImageFileError when there is none."""
    damaged = f"{image.path}: damaged in the cache since the snapshot was taken"
    if task is None:
        raise ImageError(f"{damaged}, and its task is not there any more")
    uri = image_uri({"id": task.id, "data": task.data}, config)
    try:
        fetched = service.images.fetch(task_id=task.id, uri=uri, project_key=project_key)
    except ImageError as error:
        raise ImageError(f"{damaged}, and it cannot be fetched again: {error}") from error
    if fetched.sha256 != image.image_id:
        raise ImageError(f"{damaged}, and task {task.id} has another image now")
    whole = replace(image, path=fetched.path)
    load_annotated(whole)
    return whole
