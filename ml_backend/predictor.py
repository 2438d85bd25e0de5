"""Predictions on demand, for `/predict`: the active version, loaded once and only when somebody asks."""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ml_backend.errors import ImageError
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.ls_format import Json, empty_prediction, image_uri, prediction
from ml_backend.pool import detections_for_people, uncertainty
from ml_backend.publish import queue_score, score_when_empty
from ml_backend.service import Service
from model.dataset import load_image
from model.errors import DatasetError
from model.network import MaskRCNNWithScores
from model.predict import detect
from model.registry import ModelCard

logger = logging.getLogger(__name__)

UNTRAINED = "untrained"  # the version that Label Studio is told before the first cycle


class Predictor:
    """Safe to share between threads; one image is in the network at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[MaskRCNNWithScores, ModelCard, float]] = {}

    def version(self, project_key: str) -> str:
        """The version that `predict` would use now. The registry is asked each time: the worker may have switched."""
        return self._service.registry.active(project_key) or UNTRAINED

    def predict(self, project_key: str, tasks: Sequence[Mapping[str, Any]], label_config: str) -> list[Json]:
        """One Label Studio prediction for each task. A task whose image cannot be had gets an empty one.

        Raises LabelConfigError, and what Label Studio's being away raises.
        """
        config = parse_label_config(label_config, from_name=self._service.settings.from_name)
        version = self.version(project_key)
        if version == UNTRAINED:
            return [empty_prediction(UNTRAINED) for _ in tasks]
        with self._lock:
            network, card, when_empty = self._load(project_key, version)
            return [self._predict_task(task, network, card, config, when_empty) for task in tasks]

    def _load(self, project_key: str, version: str) -> tuple[MaskRCNNWithScores, ModelCard, float]:
        """The version, and the score it gives an image without detections."""
        loaded = self._loaded.get(project_key)
        if loaded is None or loaded[1].version != version:
            logger.info("project %s: loading version %s", project_key, version)
            network, card = self._service.registry.load(project_key, version)
            when_empty = score_when_empty(self._service, project_key, version)
            loaded = network.to(self._service.settings.torch_device()), card, when_empty
            self._loaded[project_key] = loaded
        return loaded

    def _predict_task(
        self,
        task: Mapping[str, Any],
        network: MaskRCNNWithScores,
        card: ModelCard,
        config: LabelConfig,
        when_empty: float,
    ) -> Json:
        settings = self._service.settings
        try:
            fetched = self._service.images.fetch(task_id=task.get("id", 0), uri=image_uri(task, config))
            found = next(detect(network, [load_image(fetched.path)]))
        except (ImageError, DatasetError) as error:
            logger.warning("%s", error)
            return empty_prediction(card.version, score=1.0)
        return prediction(
            detections_for_people(
                found,
                config,
                class_names=card.class_names,
                shown_threshold=settings.shown_threshold,
                mask_threshold=network.config.mask_threshold,
            ),
            config,
            model_version=card.version,
            score=queue_score(
                {"image": fetched.sha256, "score": uncertainty(found, settings.queue_threshold)},
                validation_fraction=settings.validation_fraction,
                when_empty=when_empty,
            ),
            mask_threshold=network.config.mask_threshold,
            max_vertices=settings.max_vertices,
        )
