"""The unlabelled images D_u: what a version sees in each, how uncertain it is, and what it would teach itself."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from ml_backend.cycle_log import CycleLog
from ml_backend.errors import ImageError, ImageUnavailableError
from ml_backend.images import FetchedImage
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import Json, image_uri, prediction
from ml_backend.pseudo_labels import kept_detections, trust_by
from ml_backend.service import Service
from model.dataset import load_image
from model.duplicates import distinct
from model.errors import DatasetError, TooLargeError
from model.files import naming_full_disk
from model.inference import for_inference
from model.network import MaskRCNNWithScores
from model.predict import ahead
from model.registry import ModelCard
from model.strategies import STRATEGIES, Observation, look
from model.types import Detections, FloatArray


def score_pool(service: Service, project_key: str, version: str, log: CycleLog | None = None) -> int:
    """Look at every task without annotation that this version has not seen; returns how many it has now seen.

    An image whose host is away for the moment is left for the next look, with the other images of that host.

    What is found goes line by line into the version's scores file: the score of its strategy (S for TSP), the
    prediction, and what may become pseudo labels of the next cycle.
    """
    project = service.project(project_key)
    config = parse_label_config(project.label_config, from_name=service.settings.from_name)
    path = service.scores_file(project_key, version)
    seen = go_on_with(path, "task")
    waiting = [t for t in service.label_studio.tasks(project.id) if not t.is_annotated and t.id not in seen]
    if log:
        log.stage("scoring the unlabelled images", total=len(waiting))
    if not waiting:
        return 0
    network, card = load_to_look(service, project_key, version)
    problems: list[str] = []
    empty = unavailable = 0
    with open_lines(path) as lines:
        waiting_tasks = ({"id": task.id, "data": task.data} for task in waiting)
        found = seen_tasks(service, project_key, network, card, config, waiting_tasks)
        for done, line in enumerate(found, start=1):
            if "away" in line or "problem" in line:
                problems.append(line.get("away") or line["problem"])
            unavailable += "away" in line
            empty += line.get("instances") == 0
            if "away" not in line:
                append_line(lines, line)
            if log:
                log.progress(done, len(waiting))
    if log:
        log.facts(
            {
                "pool": len(waiting),
                "pool_without_detections": empty,  # placed by TSP_EMPTY_POLICY
                "pool_problems": problems[:20],
                "pool_problem_count": len(problems),
            }
        )
    return len(waiting) - unavailable


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A task whose image lies in memory, (H, W, 3) uint8 RGB."""

    task_id: int
    fetched: FetchedImage
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """A task at whose image a version has looked."""

    task_id: int
    fetched: FetchedImage
    observation: Observation
    detections: Detections


def seen_tasks(
    service: Service,
    project_key: str,
    network: MaskRCNNWithScores,
    card: ModelCard,
    config: LabelConfig,
    tasks: Iterable[Json],
) -> Iterator[Json]:
    """A line of the scores file for each task {"id", "data"}; {"task", "away": the reason} for one to be seen later.

    While the network looks at an image, one thread fetches and reads the next, and the caller's makes the line of the
    one before: at most five images are held, however many tasks there are.
    """
    opened = ahead(_opened(service, project_key, config, tasks))
    for one in ahead(_looked(service, network, card, opened)):
        yield one if isinstance(one, dict) else _line(service, network, card, config, one)


def _opened(service: Service, project_key: str, config: LabelConfig, tasks: Iterable[Json]) -> Iterator[_Opened | Json]:
    """The image of each task, or the line that says why there is none; a host that does not answer is asked once."""
    away: set[str] = set()  # hosts
    for task in tasks:
        host = ""
        try:
            uri = image_uri(task, config)
            host = _host(uri)
            if host in away:
                raise ImageUnavailableError(f"image of task {task['id']}: {host} is away, it is asked again later")
            fetched = service.images.fetch(task_id=task["id"], uri=uri, project_key=project_key)
            yield _Opened(task_id=task["id"], fetched=fetched, pixels=load_image(fetched.path))
        except ImageUnavailableError as error:
            if host:
                away.add(host)
            yield {"task": task["id"], "away": str(error)}
        except (ImageError, DatasetError) as error:
            yield {"task": task["id"], "problem": str(error)}


def _looked(
    service: Service, network: MaskRCNNWithScores, card: ModelCard, opened: Iterable[_Opened | Json]
) -> Iterator[_Looked | Json]:
    """What the version sees in each image; lines pass unchanged."""
    for one in opened:
        if not isinstance(one, _Opened):
            yield one
            continue
        try:
            observation, detections = _look_at_pixels(service, network, card, one.pixels)
        except TooLargeError as error:
            yield {"task": one.task_id, "problem": str(error)}
        else:
            yield _Looked(task_id=one.task_id, fetched=one.fetched, observation=observation, detections=detections)


def _host(uri: str) -> str:
    """The host of a web address, "" of any other."""
    try:
        return urlsplit(uri).hostname or ""
    except ValueError:  # no address at all, which the image store says better
        return ""


def read_scores(path: Path) -> Iterator[Json]:
    """The whole lines of a scores file; none when there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))


@contextmanager
def open_lines(path: Path) -> Iterator[IO[str]]:
    """A file of lines, to add some; raises DiskFullError, also at the end, since the last line may be held back."""
    with naming_full_disk(f"a line of {path}", path.parent), path.open("a") as lines:
        yield lines


def append_line(file: IO[str], line: Json) -> None:
    """Add a line; a process that is killed after this does not take it away."""
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()


def go_on_with(path: Path, name: str) -> set[Any]:
    """What the lines of a file, which may not be there yet, say under `name`; afterwards lines can be added to it.

    A last line that a crash cut off is removed, so that the next one starts on a line of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    return {line[name] for line in read_scores(path)}


def packed(feature: FloatArray) -> str:
    """A feature (F,) as text for a line: base64 of little-endian float32, a quarter of what digits would take."""
    return base64.b64encode(feature.astype("<f4").tobytes()).decode()


def feature_of(text: str) -> FloatArray:
    """The inverse of `packed`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)


def load_to_look(service: Service, project_key: str, version: str) -> tuple[MaskRCNNWithScores, ModelCard]:
    """A version as `look_at` takes it: on the device of the settings, made quick, no longer to be trained or kept."""
    network, card = service.registry.load(project_key, version)
    return for_inference(network.to(service.settings.torch_device()), precision=service.settings.precision), card


def look_at(
    service: Service, network: MaskRCNNWithScores, card: ModelCard, path: Path
) -> tuple[Observation, Detections]:
    """What a version sees in an image: what its strategy keeps of it, and all detections."""
    return _look_at_pixels(service, network, card, load_image(path))


def _look_at_pixels(
    service: Service, network: MaskRCNNWithScores, card: ModelCard, pixels: NDArray[np.uint8]
) -> tuple[Observation, Detections]:
    sight, detections = look(network, pixels, queue_threshold=service.settings.queue_threshold)
    return STRATEGIES[card.strategy].observe(sight), detections


def detections_for_people(
    detections: Detections,
    config: LabelConfig,
    *,
    class_names: Sequence[str],
    shown_threshold: float,
    mask_threshold: float,
) -> Detections:
    """The detections that annotators see: confident enough, none twice, of a class that the project still has.

    Labels are renumbered from the model's classes, `class_names`, to those of the configuration.
    """
    class_of = {old: config.class_of(name) for old, name in enumerate(class_names, start=1)}
    labels = [class_of.get(label) for label in detections.labels.tolist()]
    keep = np.array([label is not None for label in labels], dtype=bool) & (detections.class_scores >= shown_threshold)
    renumbered = np.array([label or 0 for label in labels], dtype=np.int64)
    shown = replace(detections, labels=renumbered).select(keep)
    return shown.select(distinct(shown, mask_threshold=mask_threshold))


def is_validation(image_sha256: str, fraction: float) -> bool:
    """The frozen split: an image measures, and never trains, by a hash of its bytes, in every cycle alike."""
    return int(hashlib.sha256(f"validation {image_sha256}".encode()).hexdigest()[:8], 16) / 2**32 < fraction


def _line(service: Service, network: MaskRCNNWithScores, card: ModelCard, config: LabelConfig, looked: _Looked) -> Json:
    """One line of the scores file. `score` is the strategy's (S of eq. 3 for TSP and for strategies that have none of
    their own) over the `instances` whose class score reaches `threshold`; None when nothing was found."""
    settings, fetched = service.settings, looked.fetched
    observation, detections = looked.observation, looked.detections
    shown = detections_for_people(
        detections,
        config,
        class_names=card.class_names,
        shown_threshold=settings.shown_threshold,
        mask_threshold=network.config.mask_threshold,
    )
    line: Json = {
        "task": looked.task_id,
        "image": fetched.sha256,
        "path": str(fetched.path),
        "image_hw": list(fetched.image_hw),
        "score": observation.score,
        "threshold": settings.queue_threshold,
        "instances": int((detections.class_scores >= settings.queue_threshold).sum()),
        "result": prediction(
            shown,
            config,
            model_version=card.version,
            score=0.0,
            mask_threshold=network.config.mask_threshold,
            max_vertices=settings.max_vertices,
        )["result"],
        "detections": kept_detections(
            detections,
            trust_by(settings.pseudo_labels(), card.metrics),
            class_names=card.class_names,
            mask_threshold=network.config.mask_threshold,
        ),
    }
    if STRATEGIES[card.strategy].compares_images:
        line["feature"] = packed(observation.feature)
    return line
