"""A version in memory, and the prediction that it makes for a task. Brings torch: only who predicts imports this."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ml_backend.errors import ImageError
from ml_backend.label_config import LabelConfig
from ml_backend.ls_format import Json, empty_prediction, image_uri, prediction
from ml_backend.order import published_order_of
from ml_backend.pool import detections_for_people, load_to_look, look_at
from ml_backend.service import Service
from model.errors import DatasetError, TooLargeError

logger = logging.getLogger(__name__)


class LoadedVersion:
    """A version's network, and the order in which it has put the queue, by the `names` of both."""

    def __init__(self, service: Service, project_key: str, version: str) -> None:
        torch.set_num_threads(max(1, service.settings.threads))
        logger.info("project %s: loading version %s", project_key, version)
        self._network, self._card = load_to_look(service, project_key, version)
        self._order = published_order_of(service, project_key, version)
        self._service, self._project_key = service, project_key
        self.names = version, self._order.version

    def predict(self, task: Mapping[str, Any], config: LabelConfig) -> Json:
        """The Label Studio prediction for a task; an empty one when its image cannot be had, or looked at."""
        settings, task_id, order = self._service.settings, _task_id(task), self._order
        try:
            uri = image_uri(task, config)
            fetched = self._service.images.fetch(
                task_id=task_id, uri=uri, project_key=self._project_key, may_do_without_store=True
            )
            seen, found = look_at(self._service, self._network, self._card, fetched.path, fetched.image_hw)
        except (ImageError, DatasetError, TooLargeError) as error:
            logger.warning("%s", error)
            return empty_prediction(order.version, score=1.0)
        mask_threshold = self._network.config.mask_threshold
        shown = detections_for_people(
            found,
            config,
            class_names=self._card.class_names,
            shown_threshold=settings.shown_threshold,
            mask_threshold=mask_threshold,
        )
        return prediction(
            shown,
            config,
            model_version=order.version,
            score=order.answer_score({"task": task_id, "image": fetched.sha256, "score": seen.score}),
            mask_threshold=mask_threshold,
            max_vertices=settings.max_vertices,
        )


def _task_id(task: Mapping[str, Any]) -> int:
    """0 for a task that has none, such as one that is not stored yet."""
    number = task.get("id")
    return number if type(number) is int else 0  # True is an int as well
