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
from scripts.fault_proxy import Call

_EVERY_SECONDS = 0.25
Tell = Callable[..., None]


class Watcher:
    """`run` is for a thread of its own; `tell("violation", what=...)` is called for what must not be. `quiet` is a lock
    that keeps annotators and the starting and stopping of Label Studio away."""

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
        self._done: set[str] = set()  # versions whose cycle is over
        self._over = threading.Event()

    def stop(self) -> None:
        """Let `run` return."""
        self._over.set()

    def look_at_request(self, call: Call) -> None:
        """Before Label Studio is told to show a version: are its predictions there?"""
        if call.method != "PATCH" or not call.path.startswith(f"/api/projects/{self._project_id}"):
            return
        version = str(json.loads(call.body).get("model_version") or "")
        if not version.startswith("tsp-"):
            return
        try:
            with self._quiet:
                self._check_shown(version, "asked for")
        except TSPError as error:  # Label Studio is busy; the look that follows the switch remains
            self._tell("not seen", what=f"the switch to {version}: {error}")

    def run(self) -> None:
        """Look again and again until `stop`."""
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
        """When the project shows another version, and again when its cycle is over, all its predictions are there, one
        for each task."""
        try:
            shown = self._client.project(self._project_id).model_version
            if shown.startswith("tsp-") and shown != self._shown:
                with self._quiet:
                    self._check_shown(shown, "shown")
            self._shown = shown
            if shown not in self._done and self._is_done(shown):
                with self._quiet:
                    self._check_shown(shown, "the cycle is done")
                self._done.add(shown)
        except TSPError:  # Label Studio is stopped at the moment, or busy
            return

    def _is_done(self, version: str) -> bool:
        with self._database.session() as session:
            query = select(CycleRow.number).where(
                CycleRow.project_key == self._project_key, CycleRow.version == version, CycleRow.status == "done"
            )
            return session.scalar(query) is not None

    def _check_shown(self, version: str, when: str) -> None:
        """Tasks that came, or lost their annotation, after the cycle was planned may join the version later."""
        with self._database.session() as session:
            query = select(CycleRow.planned_at).where(
                CycleRow.project_key == self._project_key, CycleRow.version == version
            )
            planned_at = session.scalar(query)
        if planned_at is None:
            self._tell("violation", what=f"{version} ({when}) is no cycle's")
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
        if when != "asked for" and self._client.project(self._project_id).model_version != version:
            return  # the next one has taken its place, and its predictions are being removed
        self._tell("switch", when=when, version=version, predictions=count, expected=len(open_since), scored=len(lines))
        if missing:
            self._tell("violation", what=f"{version} ({when}): tasks {missing[:10]} have no prediction")
        if count > len(predicted):
            self._tell("violation", what=f"{version} ({when}): {count} predictions of {len(predicted)} tasks")

    def _predicted(self, version: str) -> tuple[frozenset[int], int]:
        """The tasks that carry the version and the number of its predictions, of one moment."""
        while True:
            before = self._client.model_versions(self._project_id).get(version, 0)
            tasks = self._client.predicted_task_ids(self._project_id, version)
            if self._client.model_versions(self._project_id).get(version, 0) == before:
                return tasks, before
            time.sleep(0.1)
