"""Predictions on demand, for `/predict`: the active version, loaded once and only when somebody asks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_backend.label_config import parse_label_config
from ml_backend.ls_format import Json, empty_prediction
from ml_backend.publication import publication_of
from ml_backend.service import Service

if TYPE_CHECKING:
    from ml_backend.loaded_version import LoadedVersion

UNTRAINED = "untrained"  # the version that Label Studio is told before the first cycle


class Predictor:
    """Safe to share between threads; one image is in the network at a time."""

    def __init__(self, service: Service, *, after_first_load: Callable[[], object] = lambda: None) -> None:
        self._service, self._after_first_load = service, after_first_load
        self._lock = threading.Lock()
        self._loaded: dict[str, LoadedVersion] = {}  # by project

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
            loaded = self._load(project_key, version)
            return [loaded.predict(task, config) for task in tasks]

    def _load(self, project_key: str, version: str) -> "LoadedVersion":
        loaded = self._loaded.get(project_key)
        if loaded is None or loaded.names != (version, self.version(project_key)):
            # Torch takes seconds and hundreds of megabytes: a web process that nobody asks for polygons needs none.
            from ml_backend.loaded_version import LoadedVersion

            is_first = not self._loaded
            loaded = self._loaded[project_key] = LoadedVersion(self._service, project_key, version)
            if is_first:
                self._after_first_load()
        return loaded
