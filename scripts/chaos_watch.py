"""Looks at a chaos run all the time: what annotators and the web process could see at each moment must be whole."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from ml_backend.db import UNFINISHED, CycleRow, Database
from ml_backend.ls_client import LabelStudioClient
from ml_backend.pool import read_scores
from model.errors import TSPError
from model.registry import Registry
from scripts.chaos_checks import sha256_of, weights_file
from scripts.chaos_ledger import Ledger

_EVERY_SECONDS = 0.25
Tell = Callable[..., None]


class Watcher:
    """A thread; `tell("violation", what=...)` is called for what must not be. `quiet` is a lock that keeps annotators
    and the starting and stopping of Label Studio away."""

    def __init__(
        self,
        *,
        project_key: str,
        model_dir: Path,
        database: Database,
        client: LabelStudioClient,
        ledger: Ledger,
        quiet: AbstractContextManager[Any],
        tell: Tell,
    ) -> None:
        self.digests: dict[str, str] = {}  # of the weights, when a version was first seen
        self.looks = 0
        self._project_key = project_key
        self._project_id = int(project_key.partition("-")[0])
        self._registry = Registry(model_dir / "versions")
        self._scores = model_dir / "scores" / project_key
        self._database, self._client, self._ledger = database, client, ledger
        self._quiet, self._tell = quiet, tell
        self._shown = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self._look_at_registry()
            self._look_at_cycles()
            self._look_at_label_studio()
            self.looks += 1
            self._over.wait(_EVERY_SECONDS)

    def _look_at_registry(self) -> None:
        """The pointer names a version that is there, whole, and loads."""
        pointer = self._registry.root / self._project_key / "active.json"
        if not pointer.exists():
            return
        try:
            version = str(json.loads(pointer.read_text())["version"])
            if version not in self.digests:
                self._registry.load(self._project_key, version)
                self.digests[version] = sha256_of(weights_file(self._registry, self._project_key, version))
        except (TSPError, OSError, ValueError, KeyError) as error:
            self._tell("violation", what=f"the active version is not whole: {type(error).__name__}: {error}")

    def _look_at_cycles(self) -> None:
        with self._database.session() as session:
            query = select(CycleRow.number).where(
                CycleRow.project_key == self._project_key, CycleRow.status.in_(UNFINISHED)
            )
            unfinished = list(session.scalars(query))
        if len(unfinished) > 1:
            self._tell("violation", what=f"the cycles {unfinished} are unfinished at the same time")

    def _look_at_label_studio(self) -> None:
        """When the project shows another version, all its predictions are there, one for each task."""
        try:
            shown = self._client.project(self._project_id).model_version
            if shown == self._shown:
                return
            if shown.startswith("tsp-"):
                with self._quiet:
                    self._check_switch(shown)
            self._shown = shown
        except TSPError:  # Label Studio is stopped at the moment, or busy
            return

    def _check_switch(self, version: str) -> None:
        """Tasks that came, or lost their annotation, after the cycle was planned may join the version later."""
        with self._database.session() as session:
            query = select(CycleRow.planned_at).where(
                CycleRow.project_key == self._project_key, CycleRow.version == version
            )
            planned_at = session.scalar(query)
        if planned_at is None:
            self._tell("violation", what=f"Label Studio shows {version}, which no cycle has made")
            return
        since = datetime.fromisoformat(planned_at).timestamp()
        predicted, count = self._predicted(version)
        open_since = {
            number
            for number, task in self._ledger.records().items()
            if task.counting is None and task.untouched_since(since)
        }
        missing = sorted(open_since - predicted)
        lines = {line["task"] for line in read_scores(self._scores / f"{version}.jsonl")}
        self._tell("switch", version=version, predictions=count, expected=len(open_since), scored=len(lines))
        if missing:
            self._tell("violation", what=f"Label Studio shows {version} before tasks {missing[:10]} have a prediction")
        if count > len(predicted):
            self._tell("violation", what=f"{version}: {count} predictions of {len(predicted)} tasks when it is shown")

    def _predicted(self, version: str) -> tuple[frozenset[int], int]:
        """The tasks that carry the version and the number of its predictions, of one moment."""
        while True:
            before = self._client.model_versions(self._project_id).get(version, 0)
            tasks = self._client.predicted_task_ids(self._project_id, version)
            if self._client.model_versions(self._project_id).get(version, 0) == before:
                return tasks, before
            time.sleep(0.1)
