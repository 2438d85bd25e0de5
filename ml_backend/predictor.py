"""Predictions on demand, for `/predict`: active versions, each loaded when somebody asks, the last used ones kept."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from ml_backend.errors import TooManyTasksError
from ml_backend.label_config import parse_label_config
from ml_backend.ls_format import Json, empty_prediction
from ml_backend.publication import publication_of
from ml_backend.service import Service

if TYPE_CHECKING:
    from ml_backend.loaded_version import LoadedVersion

UNTRAINED = "untrained"  # the version that Label Studio is told before the first cycle
_MOST_SECONDS = 90.0  # Label Studio waits for 100 (ML_TIMEOUT_PREDICT), and then keeps nothing

R = TypeVar("R")


class Predictor:
    """Safe to share between threads; one image is in the network at a time. Requests that come together take turns, so
    that one task does not wait for the many of another request.

    Networks are loaded and look in a thread of their own. In the threads of the requests, each would keep some of the
    memory that it has freed: 24 of them came to 3.9 GB with one `resnet50_fpn`, and to 10 GB with four at a time.
    """

    def __init__(self, service: Service, *, after_first_load: Callable[[], object] = lambda: None) -> None:
        self._service = service
        self._after_first_load: Callable[[], object] | None = after_first_load
        self._networks = ThreadPoolExecutor(1, thread_name_prefix="networks")
        # By project, as many as TSP_LOADED_VERSIONS; the one used last is the last.
        self._kept: OrderedDict[str, LoadedVersion] = OrderedDict()
        self._living: WeakValueDictionary[str, LoadedVersion] = WeakValueDictionary()  # what requests still hold, too

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
        loaded: LoadedVersion | None = None  # the same for all tasks, whatever the others make of those that are kept

        def answer(task: Mapping[str, Any]) -> Json:
            nonlocal loaded
            loaded = loaded or self._load(project_key, version)
            return loaded.predict(task, config)

        results: list[Json] = []
        try:
            for task in tasks:
                results.append(self._in_turn(deadline, answer, task))  # noqa: PERF401 - the error says how many
        except _DeadlineError as error:
            raise TooManyTasksError(
                f"after {_MOST_SECONDS:.0f} s, {len(results)} of {len(tasks)} tasks were done, and none is kept: Label "
                "Studio does not wait much longer. Send fewer tasks at once; requests that come together share the time"
            ) from error
        return results

    def _in_turn(self, deadline: float, do: Callable[[Mapping[str, Any]], R], task: Mapping[str, Any]) -> R:
        """Alone with the networks; _DeadlineError when that cannot begin before the deadline."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise _DeadlineError
        turn = self._networks.submit(do, task)
        try:
            return turn.result(timeout=left)
        except TimeoutError:
            if turn.cancel():
                raise _DeadlineError from None
            return turn.result()  # it has begun

    def _load(self, project_key: str, version: str) -> "LoadedVersion":
        """In the networks' thread only, so each is loaded once however many ask."""
        names = version, self.version(project_key)
        loaded = self._kept.pop(project_key, None) or self._living.get(project_key)
        if loaded and loaded.names != names:
            loaded = None
        while len(self._kept) >= self._service.settings.loaded_versions:
            self._kept.popitem(last=False)
        if loaded is None:
            # Torch takes seconds and hundreds of megabytes: a web process that nobody asks for polygons needs none.
            from ml_backend.loaded_version import LoadedVersion

            loaded = self._living[project_key] = LoadedVersion(self._service, project_key, version)
            if self._after_first_load:
                self._after_first_load()
                self._after_first_load = None
        self._kept[project_key] = loaded
        return loaded


class _DeadlineError(Exception):
    """Nobody waits for the answer any more."""
