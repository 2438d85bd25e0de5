"""The unlabelled images D_u: what a version sees in each, how uncertain it is, and what it would teach itself."""

import base64
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from pydantic_core import from_json

from ml_backend.chunks import Team, cut, find_cut
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
from model.registry import ModelCard
from model.strategies import STRATEGIES, Observation, look
from model.types import Detections, FloatArray

logger = logging.getLogger(__name__)


def score_pool(
    service: Service, project_key: str, version: str, log: CycleLog | None = None, *, team: Team | None = None
) -> int:
    """Look at every task without annotation that this version has not seen; returns how many it has now seen.

    An image whose host is away for the moment is left for the next look, with the other images of that host.

    What is found goes line by line into the version's scores file: the score of its strategy (S for TSP), the
    prediction, and what may become pseudo labels of the next cycle. A `team` looks at chunks of TSP_SCORING_CHUNK
    images; the file is the same.
    """
    viewer = Viewer(service, project_key, version)
    path = service.scores_file(project_key, version)
    seen = go_on_with(path, "task")
    folder = service.chunks_folder(project_key, version)
    pool = find_cut(folder, project_key, version) if team else None
    waiting = [] if pool else viewer.waiting(seen)
    if team and len(waiting) > service.settings.scoring_chunk:
        pool = cut(folder, project_key, version, waiting, size=service.settings.scoring_chunk)
    total = pool.total if pool else len(waiting)
    if log:
        log.stage("scoring the unlabelled images", total=total)
    if not total:
        return 0
    problems: list[str] = []
    empty = unavailable = 0
    with open_lines(path) as lines:
        for done, line in enumerate(team.see(pool) if team and pool else viewer.lines(waiting), start=1):
            if "away" in line or "problem" in line:
                problems.append(line.get("away") or line["problem"])
            unavailable += "away" in line
            empty += line.get("instances") == 0
            if "away" not in line and line["task"] not in seen:
                append_line(lines, line)
            if log:
                log.progress(done, total)
    if team and pool:
        team.forget(pool)
    if log:
        log.facts(
            {
                "pool": total,
                "pool_without_detections": empty,  # placed by TSP_EMPTY_POLICY
                "pool_problems": problems[:20],
                "pool_problem_count": len(problems),
            }
        )
    return total - unavailable


class Viewer:
    """A version that looks at the tasks of its project. Its network is loaded once, for the first image; a host that
    does not answer is asked once."""

    def __init__(self, service: Service, project_key: str, version: str) -> None:
        self._service, self._project_key, self._version = service, project_key, version
        project = service.project(project_key)
        self._project_id = project.id
        self._config = parse_label_config(project.label_config, from_name=service.settings.from_name)
        self._away: set[str] = set()  # hosts

    def waiting(self, seen: Set[int]) -> list[Json]:
        """The tasks {"id", "data"} without annotation, by id, without those that were seen."""
        tasks = self._service.label_studio.tasks(self._project_id)
        return [{"id": t.id, "data": t.data} for t in tasks if not t.is_annotated and t.id not in seen]

    def lines(self, tasks: Iterable[Json]) -> Iterator[Json]:
        """A line of the scores file for each task; {"task", "away": the reason} for one that is to be seen later."""
        for task in tasks:
            host = ""
            try:
                uri = image_uri(task, self._config)
                host = _host(uri)
                if host in self._away:
                    raise ImageUnavailableError(f"image of task {task['id']}: {host} is away, it is asked again later")
                fetched = self._service.images.fetch(task_id=task["id"], uri=uri, project_key=self._project_key)
                yield _seen(self._service, *self._loaded, self._config, task["id"], fetched)
            except ImageUnavailableError as error:
                if host:
                    self._away.add(host)
                yield {"task": task["id"], "away": str(error)}
            except (ImageError, DatasetError, TooLargeError) as error:
                yield {"task": task["id"], "problem": str(error)}

    @cached_property
    def _loaded(self) -> tuple[MaskRCNNWithScores, ModelCard]:
        logger.info("project %s: loading version %s to look at the pool", self._project_key, self._version)
        return load_to_look(self._service, self._project_key, self._version)


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
            yield from (from_json(line) for line in file if line.endswith(b"\n"))  # twice as quick as Python's own


def read_heads(path: Path) -> Iterator[Json]:
    """`read_scores` without what was seen, so of each line only what stands before `result`: many times quicker."""
    if path.exists():
        with path.open("rb") as file:
            yield from (_head(line) for line in file if line.endswith(b"\n"))


def _head(line: bytes) -> Json:
    head, seen, _ = line.partition(b', "result": ')  # a quotation mark inside of a text would be escaped
    whole: Json = json.loads(head + b"}" if seen else line)
    return whole


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
    return for_inference(network.to(service.settings.torch_device())), card


def look_at(
    service: Service, network: MaskRCNNWithScores, card: ModelCard, path: Path
) -> tuple[Observation, Detections]:
    """What a version sees in an image: what its strategy keeps of it, and all detections."""
    sight, detections = look(network, load_image(path), queue_threshold=service.settings.queue_threshold)
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


def _seen(
    service: Service,
    network: MaskRCNNWithScores,
    card: ModelCard,
    config: LabelConfig,
    task_id: int,
    fetched: FetchedImage,
) -> Json:
    """One line of the scores file. `score` is the strategy's (S of eq. 3 for TSP and for strategies that have none of
    their own) over the `instances` whose class score reaches `threshold`; None when nothing was found."""
    settings = service.settings
    observation, detections = look_at(service, network, card, fetched.path)
    shown = detections_for_people(
        detections,
        config,
        class_names=card.class_names,
        shown_threshold=settings.shown_threshold,
        mask_threshold=network.config.mask_threshold,
    )
    line: Json = {
        "task": task_id,
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
