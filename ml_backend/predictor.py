"""Predictions on demand, for `/predict`: the active version, loaded once and only when somebody asks."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ml_backend.errors import TooManyTasksError
from ml_backend.label_config import parse_label_config
from ml_backend.ls_format import Json, empty_prediction
from ml_backend.publication import publication_of
from ml_backend.service import Service

if TYPE_CHECKING:
    from ml_backend.loaded_version import LoadedVersion

UNTRAINED = "untrained"  # the version that Label Studio is told before the first cycle
_MOST_SECONDS = 90.0  # Label Studio waits for 100 (ML_TIMEOUT_PREDICT), and then keeps nothing


class Predictor:
    """Safe to share between threads; one image is in the network at a time. Requests that come together take turns, so
    that one task does not wait for the many of another request."""

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

        Raises LabelConfigError, TooManyTasksError, and what Label Studio's being away raises.
        """
        deadline = time.monotonic() + _MOST_SECONDS
        config = parse_label_config(label_config, from_name=self._service.settings.from_name)
        version = self._service.registry.active(project_key)
        if version is None:
            return [empty_prediction(UNTRAINED) for _ in tasks]
        results: list[Json] = []
        try:
            with self._turn(deadline):
                loaded = self._load(project_key, version)
            for task in tasks:
                with self._turn(deadline):
                    results.append(loaded.predict(task, config))
        except _DeadlineError as error:
            raise TooManyTasksError(
                f"after {_MOST_SECONDS:.0f} s, {len(results)} of {len(tasks)} tasks were done, and none is kept: Label "
                "Studio does not wait much longer. Send fewer tasks at once; requests that come together share the time"
            ) from error
        return results

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        """Alone with the network; _DeadlineError when that cannot be before the deadline."""
        left = deadline - time.monotonic()
        if left <= 0 or not self._lock.acquire(timeout=left):
            raise _DeadlineError
        try:
            yield
        finally:
            self._lock.release()

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


class _DeadlineError(Exception):
    """Nobody waits for the answer any more."""
