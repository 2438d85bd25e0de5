"""The unlabelled images D_u: what a version sees in each, how uncertain it is, and what it would teach itself."""

import base64
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from ml_backend.chunks import Team, cut, find_cut
from ml_backend.cycle_log import CycleLog
from ml_backend.errors import ImageError, ImageHostSilentError, ImageUnavailableError
from ml_backend.foreign_hosts import host_of
from ml_backend.images import FetchedImage
from ml_backend.inbox import label_studio_id
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import Json, image_uri, prediction
from ml_backend.pseudo_labels import kept_detections, trust_by
from ml_backend.service import Service, size_here
from ml_backend.unseen import KnownPool, UnseenTasks
from model.dataset import load_seen
from model.duplicates import distinct
from model.errors import DatasetError, TooLargeError
from model.files import naming_full_disk
from model.inference import for_inference
from model.network import MaskRCNNWithScores
from model.predict import ahead
from model.registry import ModelCard
from model.strategies import STRATEGIES, Observation, look
from model.types import Detections, FloatArray

logger = logging.getLogger(__name__)

_SHARE_EVERY_SECONDS = 300.0  # what is found, with a store
_PROBLEMS_TOLD = 20
_UNANSWERED = 3  # downloads in a row, after which a host is left alone: each may take as long as its time-out


@dataclass(frozen=True, kw_only=True)
class PoolSeen:
    """What a look at a pool came to."""

    count: int  # tasks that the version has seen, of those that are still in Label Studio ...
    added: int  # ... and how many of them this look has seen
    known: KnownPool | None  # for the next look; None: it has to list all tasks


def score_pool(
    service: Service, project_key: str, version: str, log: CycleLog | None = None, *, team: Team | None = None
) -> int:
    """Look at every task without annotation that this version has not seen; returns how many it has now seen.

    An image whose host is away for the moment is left for the next look, with the other images of that host.

    What is found goes line by line into the version's scores file: the score of its strategy (S for TSP), the
    prediction, and what may become pseudo labels of the next cycle. A `team` looks at chunks of TSP_SCORING_CHUNK
    images; the file is the same.
    """
    return sum(score_pool_in_steps(service, project_key, version, log, team=team))


def score_pool_in_steps(
    service: Service,
    project_key: str,
    version: str,
    log: CycleLog | None = None,
    *,
    team: Team | None = None,
    known: KnownPool | None = None,
) -> Generator[bool, None, PoolSeen]:
    """`score_pool` for callers who stop in between, or for good: yields after each task whether it is seen now, and
    also while tasks are listed or there is nothing but to wait for the team. Of a team's chunks, those that were not
    read yet are lost to who stops. With what is `known` from the version's last look, only changes are asked for."""
    viewer = Viewer.of_project(service, project_key, version)
    path = service.scores_file(project_key, version)
    is_seen_known = known is not None and service.has_lines_of(path, known.seen_bytes)
    if not is_seen_known:  # another worker has looked, or the last look ended early
        service.bring_lines(path)
    folder, chunk = service.chunks_folder(project_key, version), service.settings.scoring_chunk
    pool = find_cut(folder, project_key, version, store=service.store) if team else None
    is_resumed = pool is not None
    seen_before = cache(partial(_seen_before, service, path))
    with UnseenTasks(service.settings.model_dir) as unseen:
        if not is_resumed:
            project_id = label_studio_id(project_key)
            for _ in unseen.list_in_steps(
                service.label_studio, project_id, seen_before, known, is_seen_known=is_seen_known
            ):
                yield False
            if team and len(unseen) > chunk:
                pool = cut(folder, project_key, version, unseen, size=chunk, store=service.store)
        seeing = _Seeing(pool.total if pool else len(unseen), log)
        if not seeing.total:
            known = unseen.known(seen=unseen.seen, seen_bytes=size_here(path), away=set())
            return PoolSeen(count=unseen.seen, added=0, known=known)
        seen, away, added = set(seen_before()), set[int](), 0
        shared_at = time.monotonic()
        try:
            with open_lines(path) as lines:
                for line in team.see(pool) if team and pool else viewer.lines(unseen):
                    if line is None:
                        yield False
                        continue
                    if "away" in line:
                        away.add(line["task"])
                    elif line["task"] not in seen:
                        append_line(lines, line)
                        seen.add(line["task"])
                        added += 1
                    if time.monotonic() - shared_at > _SHARE_EVERY_SECONDS:
                        service.share_lines(path)
                        shared_at = time.monotonic()
                    seeing.count(line)
                    yield "away" not in line
        except GeneratorExit:
            if team and pool:  # nobody would read what the others find
                team.forget(pool)
            raise
        service.share_lines(path)
        if team and pool:
            team.forget(pool)
        seeing.tell()
        if is_resumed:
            return PoolSeen(count=len(seen), added=added, known=None)
        count = unseen.seen + added
        known = unseen.known(seen=count, seen_bytes=size_here(path), away=away)
        return PoolSeen(count=count, added=added, known=known)


def _seen_before(service: Service, path: Path) -> set[int]:
    """The tasks in a version's scores file, to which lines can be added now."""
    seen = go_on_with(path, "task")
    service.share_lines(path)  # those of a worker that was killed here
    return seen


class _Seeing:
    """What people are told of a look at a pool of `total` tasks."""

    def __init__(self, total: int, log: CycleLog | None) -> None:
        self.total = total
        self._log, self._done, self._empty, self._problem_count = log, 0, 0, 0
        self._problems: list[str] = []  # the first ones
        if log:
            log.stage("scoring the unlabelled images", total=total)

    def count(self, line: Json) -> None:
        """One more task, by its line."""
        self._done += 1
        self._empty += line.get("instances") == 0
        if problem := line.get("away") or line.get("problem"):
            self._problem_count += 1
            if len(self._problems) < _PROBLEMS_TOLD:
                self._problems.append(problem)
        if self._log:
            self._log.progress(self._done, self.total)

    def tell(self) -> None:
        """The sums."""
        if self._log:
            self._log.facts(
                {
                    "pool": self.total,
                    "pool_without_detections": self._empty,  # placed by TSP_EMPTY_POLICY
                    "pool_problems": self._problems,
                    "pool_problem_count": self._problem_count,
                }
            )


class Viewer:
    """A version that looks at the tasks of its project. Its network is loaded once, for the first image."""

    def __init__(self, service: Service, project_key: str, version: str, config: LabelConfig) -> None:
        self._service, self._project_key, self._version, self._config = service, project_key, version, config
        # The thread that reads images loads the network, whose input size it needs; nobody else needs it before.
        self._images = TaskImages(service, project_key, config, network=lambda: self._loaded[0])

    @classmethod
    def of_project(cls, service: Service, project_key: str, version: str) -> Self:
        """With the labels that the project has now."""
        label_config = service.project(project_key).label_config
        return cls(
            service, project_key, version, parse_label_config(label_config, from_name=service.settings.from_name)
        )

    def lines(self, tasks: Iterable[Json]) -> Generator[Json, None, None]:
        """A line of the scores file for each task; {"task", "away": the reason} for one that is to be seen later.

        While the network looks at an image, one thread fetches and reads the next, and the caller's makes the line of
        the one before: at most five images are held, however many tasks there are.
        """
        for one in ahead(self._looked(ahead(map(self._images.opened, tasks)))):
            yield one if isinstance(one, dict) else _line(self._service, *self._loaded, self._config, one)

    def _looked(self, opened: Iterable["OpenedImage | Json"]) -> Iterator["_Looked | Json"]:
        """What the version sees in each image; lines pass unchanged."""
        for one in opened:
            if not isinstance(one, OpenedImage):
                yield one
                continue
            try:
                observation, detections = _look_at_pixels(
                    self._service, *self._loaded, one.pixels, one.fetched.image_hw
                )
            except TooLargeError as error:
                yield {"task": one.task_id, "problem": str(error)}
            else:
                yield _Looked(task_id=one.task_id, fetched=one.fetched, observation=observation, detections=detections)

    @cached_property
    def _loaded(self) -> tuple[MaskRCNNWithScores, ModelCard]:
        logger.info("project %s: loading version %s to look at the pool", self._project_key, self._version)
        return load_to_look(self._service, self._project_key, self._version)


class TaskImages:
    """The images of a project's tasks, as a network sees them. A host that leaves three of them unanswered, one after
    the other, is not asked any more."""

    def __init__(
        self, service: Service, project_key: str, config: LabelConfig, *, network: Callable[[], MaskRCNNWithScores]
    ) -> None:
        self._service, self._project_key, self._config, self._network = service, project_key, config, network
        self._unanswered: Counter[str] = Counter()  # by host, since it last gave an answer

    def opened(self, task: Json) -> "OpenedImage | Json":
        """The image of a task {"id", "data"}, or why there is none: {"task", "away": the reason} when it may be there
        later, {"task", "problem": the reason} when it will not."""
        try:
            fetched = self._fetched(task["id"], image_uri(task, self._config))
            pixels = load_seen(fetched.path, fetched.image_hw, self._network().config)
            return OpenedImage(task_id=task["id"], fetched=fetched, pixels=pixels)
        except ImageUnavailableError as error:
            return {"task": task["id"], "away": str(error)}
        except (ImageError, DatasetError) as error:
            return {"task": task["id"], "problem": str(error)}

    def _fetched(self, task_id: int, uri: str) -> FetchedImage:
        host = host_of(uri)
        if host and self._unanswered[host] >= _UNANSWERED:
            raise ImageUnavailableError(f"image of task {task_id}: {host} is away, it is asked again later")
        try:
            fetched = self._service.images.fetch(task_id=task_id, uri=uri, project_key=self._project_key)
        except ImageHostSilentError:  # one download that breaks off says nothing of a host with thousands of images
            self._unanswered[host] += 1
            raise
        except ImageError:
            self._unanswered[host] = 0
            raise
        if fetched.is_new:  # the cache says nothing of the host
            self._unanswered[host] = 0
        return fetched


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """A task whose image lies in memory at the network's input size, (H, W, 3) uint8 RGB."""

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
    return {line[name] for line in read_heads(path)}


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
    service: Service, network: MaskRCNNWithScores, card: ModelCard, path: Path, image_hw: tuple[int, int]
) -> tuple[Observation, Detections]:
    """What a version sees in an image of size `image_hw`: what its strategy keeps of it, and all detections, in pixels
    of the image. Raises ImageFileError, TooLargeError."""
    return _look_at_pixels(service, network, card, load_seen(path, image_hw, network.config), image_hw)


def _look_at_pixels(
    service: Service,
    network: MaskRCNNWithScores,
    card: ModelCard,
    pixels: NDArray[np.uint8],
    image_hw: tuple[int, int],
) -> tuple[Observation, Detections]:
    """`pixels` are those at the network's input size, of an image of size `image_hw`."""
    sight, detections = look(network, pixels, image_hw=image_hw, queue_threshold=service.settings.queue_threshold)
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
    their own) over the `instances` whose class score reaches `threshold`; None when nothing was found. Regions are of
    the model's own classes, whatever labels the project has at this moment: these come when they are published."""
    settings, fetched = service.settings, looked.fetched
    config = replace(config, labels=card.class_names, displayed=())
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
