"""A simulated annotator: labels what Label Studio serves, in that order, with the ground truth of a COCO file."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_backend.label_config import parse_label_config
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_format import image_uri, regions_from_instances
from model.dataset import LabeledSet
from model.types import IntArray, LabeledImage, Rle

_LEAD_TIME_SECONDS = 30.0  # what Label Studio is told that an annotation took


@dataclass(frozen=True, kw_only=True)
class Served:
    """A task that Label Studio served and the oracle annotated. `score` is that of the prediction it came with."""

    task_id: int
    score: float | None
    model_version: str | None
    instances: int


class Oracle:
    """One annotator account of one project. Knows an image by its bytes, as people know it by its looks."""

    def __init__(self, client: LabelStudioClient, project_id: int, truth: LabeledSet) -> None:
        self._client = client
        self._project_id = project_id
        self._truth = truth
        self._by_bytes = {hashlib.sha256(image.path.read_bytes()).hexdigest(): image for image in truth.images}
        self._config = parse_label_config(client.project(project_id).label_config)

    def annotate_next(self) -> Served | None:
        """Take the next task and submit its ground truth; None when Label Studio has no task left."""
        task = self._client.next_task(self._project_id)
        return None if task is None else self.annotate(task)

    def annotate(self, task: Mapping[str, Any]) -> Served:
        """Submit the ground truth of a task that Label Studio served."""
        image = self._by_bytes[self._sha256(task)]
        labels, rles = self._instances(image)
        result = regions_from_instances(labels, rles, self._config, image.image_hw)
        self._client.submit_annotation(task["id"], result=result, lead_time_seconds=_LEAD_TIME_SECONDS)
        prediction: Mapping[str, Any] = next(iter(task.get("predictions") or []), {})
        return Served(
            task_id=task["id"],
            score=prediction.get("score"),
            model_version=prediction.get("model_version"),
            instances=len(labels),
        )

    def _sha256(self, task: Mapping[str, Any]) -> str:
        digest = hashlib.sha256()
        with self._client.download(image_uri(task, self._config)) as response:
            for chunk in response.iter_bytes():
                digest.update(chunk)
        return digest.hexdigest()

    def _instances(self, image: LabeledImage) -> tuple[IntArray, list[Rle]]:
        """The instances whose class the labelling configuration knows, in its numbering."""
        classes = [self._config.class_of(self._truth.class_names[label - 1]) for label in image.labels]
        known = [(number, rle) for number, rle in zip(classes, image.rles, strict=True) if number is not None]
        return np.array([number for number, _ in known], dtype=np.int64), [rle for _, rle in known]
