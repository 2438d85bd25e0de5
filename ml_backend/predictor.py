"""Predictions on demand, for `/predict`: the active version, loaded once and only when somebody asks."""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ml_backend.errors import ImageError
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import Json, empty_prediction, image_uri, prediction
from ml_backend.order import QueueOrder, order_of
from ml_backend.pool import detections_for_people, look_at
from ml_backend.publication import publication_of
from ml_backend.service import Service
from model.errors import DatasetError
from model.network import MaskRCNNWithScores
from model.registry import ModelCard

logger = logging.getLogger(__name__)

UNTRAINED = "untrained"  # the version that Label Studio is told before the first cycle


class Predictor:
    """Safe to share between threads; one image is in the network at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[MaskRCNNWithScores, ModelCard, QueueOrder]] = {}

    def version(self, project_key: str) -> str:
        """The version that `predict` would use now, by the name that Label Studio knows. The disk is asked each time:
        the worker may have switched."""
        version = self._service.registry.active(project_key)
        published = publication_of(self._service, project_key, version) if version else None
        return published.name if published else version or UNTRAINED

    def predict(self, project_key: str, tasks: Sequence[Mapping[str, Any]], label_config: str) -> list[Json]:
        """One Label Studio prediction for each task. A task whose image cannot be had gets an empty one.

        Raises LabelConfigError, and what Label Studio's being away raises.
        """
        config = parse_label_config(label_config, from_name=self._service.settings.from_name)
        version = self._service.registry.active(project_key)
        if version is None:
            return [empty_prediction(UNTRAINED) for _ in tasks]
        with self._lock:
            network, card, order = self._load(project_key, version)
            return [self._predict_task(project_key, task, network, card, config, order) for task in tasks]

    def _load(self, project_key: str, version: str) -> tuple[MaskRCNNWithScores, ModelCard, QueueOrder]:
        """The version, and the order in which it has put the queue."""
        loaded = self._loaded.get(project_key)
        if loaded is None or (loaded[1].version, loaded[2].version) != (version, self.version(project_key)):
            logger.info("project %s: loading version %s", project_key, version)
            network, card = self._service.registry.load(project_key, version)
            order = order_of(self._service, project_key, version)
            loaded = network.to(self._service.settings.torch_device()), card, order
            self._loaded[project_key] = loaded
        return loaded

    def _predict_task(
        self,
        project_key: str,
        task: Mapping[str, Any],
        network: MaskRCNNWithScores,
        card: ModelCard,
        config: LabelConfig,
        order: QueueOrder,
    ) -> Json:
        settings, task_id = self._service.settings, _task_id(task)
        try:
            fetched = self._service.images.fetch(task_id=task_id, uri=image_uri(task, config), project_key=project_key)
            seen, found = look_at(self._service, network, card, fetched.path)
        except (ImageError, DatasetError) as error:
            logger.warning("%s", error)
            return empty_prediction(order.version, score=1.0)
        return prediction(
            detections_for_people(
                found,
                config,
                class_names=card.class_names,
                shown_threshold=settings.shown_threshold,
                mask_threshold=network.config.mask_threshold,
            ),
            config,
            model_version=order.version,
            score=order.answer_score({"task": task_id, "image": fetched.sha256, "score": seen.score}),
            mask_threshold=network.config.mask_threshold,
            max_vertices=settings.max_vertices,
        )


def _task_id(task: Mapping[str, Any]) -> int:
    """0 for a task that has none, such as one that is not stored yet."""
    number = task.get("id")
    return number if type(number) is int else 0  # True is an int as well
