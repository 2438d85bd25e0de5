"""Where each task stands in the queue that a version makes: under which name it is published, with which score."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ml_backend.label_config import LabelConfig
from ml_backend.ls_format import Json, relabelled
from ml_backend.pool import is_validation, read_heads
from ml_backend.publication import POOL, publication_of
from ml_backend.service import Service
from model.empty_images import empty_image_score

_LAST = 1.0  # the score that is served last


@dataclass(frozen=True, kw_only=True)
class QueueOrder:
    """With a `batch` (task ids, the first one first), the name `version` holds exactly these, in this order, and the
    rest is published under `<version>.pool`, which Label Studio does not serve. Without one, the score orders all.
    """

    version: str  # as Label Studio knows it: that of a publication
    validation_fraction: float
    when_empty: float  # the score of an image in which nothing was found
    batch: tuple[int, ...] = ()
    config: LabelConfig | None = None  # in whose labels regions are published; None: as they were found

    @property
    def versions(self) -> tuple[str, ...]:
        """The names under which predictions are published."""
        return (self.version, self.version + POOL) if self.batch else (self.version,)

    def version_of(self, task_id: int) -> str:
        """The name under which the task's prediction is published."""
        return self.version if not self.batch or task_id in self._place else self.version + POOL

    def regions_of(self, line: Mapping[str, Any]) -> list[Json]:
        """The regions that are published of a line of the scores file."""
        regions: list[Json] = line["result"]
        return regions if self.config is None else relabelled(regions, self.config)

    def score_of(self, line: Mapping[str, Any]) -> float:
        """The score with which a line of the scores file is published: the place in the batch, else the image's own."""
        place = self._place.get(line["task"])
        if place is not None:
            return place
        return queue_score(line, validation_fraction=self.validation_fraction, when_empty=self.when_empty)

    def answer_score(self, line: Mapping[str, Any]) -> float:
        """The score that `/predict` answers. It answers under the version's own name, whatever the task, so that an
        image outside of the batch has to stand behind it."""
        if self.batch and line["task"] not in self._place:
            return _LAST
        return self.score_of(line)

    @cached_property
    def _place(self) -> dict[int, float]:
        """Scores in [0, 1) that rise along the batch."""
        return {task_id: number / len(self.batch) for number, task_id in enumerate(self.batch)}


def order_of(service: Service, project_key: str, version: str) -> QueueOrder:
    """The order that a version makes of what it has scored, with the batch that was frozen for it, if one was; under
    the name and in the labels of its newest publication."""
    service.bring_lines(service.scores_file(project_key, version))
    lines = read_heads(service.scores_file(project_key, version))
    scored = [line["score"] for line in lines if line.get("score") is not None]
    return _order(service, project_key, version, empty_image_score(scored, service.settings.empty_policy))


def keep_order(service: Service, project_key: str, version: str, order: QueueOrder) -> None:
    """For `published_order_of`: what of an order is not kept anyhow."""
    kept = {"policy": service.settings.empty_policy, "score": order.when_empty}
    service.keep_json(service.empty_file(project_key, version), kept)


def published_order_of(service: Service, project_key: str, version: str) -> QueueOrder:
    """The order that was kept, without a look at the lines of the scores file, which may be gigabytes; `order_of` when
    none was kept with the TSP_EMPTY_POLICY of now."""
    path = service.empty_file(project_key, version)
    service.bring(path)
    kept = json.loads(path.read_text()) if path.exists() else {}  # older releases kept none
    if kept.get("policy") != service.settings.empty_policy:
        return order_of(service, project_key, version)
    return _order(service, project_key, version, kept["score"])


def _order(service: Service, project_key: str, version: str, when_empty: float) -> QueueOrder:
    publication = publication_of(service, project_key, version)
    return QueueOrder(
        version=publication.name if publication else version,
        config=publication.config if publication else None,
        validation_fraction=service.settings.validation_fraction,
        when_empty=when_empty,
        batch=frozen_batch(service, project_key, version) or (),
    )


def frozen_batch(service: Service, project_key: str, version: str) -> tuple[int, ...] | None:
    """The tasks that were chosen for the version, the first one first; None when none have been chosen."""
    path = service.batch_file(project_key, version)
    service.bring(path)
    return tuple(json.loads(path.read_text())["tasks"]) if path.exists() else None


def queue_score(line: Mapping[str, Any], *, validation_fraction: float, when_empty: float) -> float:
    """The score by which Label Studio serves a task, the lowest first: the strategy's, for TSP S of eq. 3.

    Images that will only measure the model, and those that could not be read, come last: they cannot teach it anything.
    """
    if "problem" in line or is_validation(line["image"], validation_fraction):
        return _LAST
    return float(when_empty if line["score"] is None else line["score"])
