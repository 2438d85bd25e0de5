"""What a cycle is doing, written into its row for the dashboard."""

import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete

from ml_backend.db import UNFINISHED, ActivationRow, CycleRow, Database, PoolLookRow, Work, is_forgotten, utc_now
from ml_backend.pace import Pace
from model.errors import TSPError

logger = logging.getLogger(__name__)


class CycleLog:
    """Writes what a cycle is doing into its row, for the dashboard; at most one write a second for mere progress.

    `stage` and `progress` raise TSPError when the project was forgotten meanwhile: so its work ends. Before each write,
    and at each progress, `confirm` is called: it does not return in a process that has lost the work to another one.
    """

    _table: type[Work] = CycleRow
    _what = "cycle"

    def __init__(
        self, database: Database, project_key: str, number: int, *, confirm: Callable[[], None] = lambda: None
    ) -> None:
        self._database, self._confirm = database, confirm
        self._identity = (project_key, number)
        self._last_write = 0.0
        self._goes_on = False
        self._pace = Pace()

    def begin(self) -> None:
        """The cycle has started (or started again)."""
        self._update(status="running", stage="starting")

    def name_version(self, version: str) -> None:
        """The snapshot is taken, so the version that the cycle makes has its name."""
        self._update(version=version)

    def stage(self, stage: str, *, done: int = 0, total: int = 0) -> None:
        """A new stage has begun."""
        logger.info("project %s, %s: %s", self._identity[0], self._name, stage)
        self._last_write = time.monotonic()
        self._pace = Pace()
        self.check_wanted()
        self._update(stage=stage, done=done, total=total)

    def wait(self, reason: str) -> None:
        """The stage cannot go on for now; the first of several such calls says since when."""
        self._goes_on = False
        self._pace = Pace()
        with self._database.session() as session:
            row = session.get_one(self._table, self._identity)
            known = row.facts.get("waiting") or {"since": utc_now()}
            row.facts = {**_without(row.facts, "pace"), "waiting": {**known, "for": reason}}

    def go_on(self) -> None:
        """What the cycle waited for is there."""
        self._goes_on = True
        with self._database.session() as session:
            row = session.get_one(self._table, self._identity)
            row.facts = _without(row.facts, "waiting")

    def progress(self, done: int, total: int) -> None:
        """So much of the stage is done."""
        self._confirm()
        if done == total or time.monotonic() - self._last_write >= 1:
            self._last_write = time.monotonic()
            self.check_wanted()
            pace = self._pace.mark(self._last_write, done)
            self._update(pace=pace and {**pace, "at": self._database.now()}, done=done, total=total)
            if not self._goes_on:  # what an earlier try of this stage waited for is there
                self.go_on()

    def facts(self, facts: dict[str, Any]) -> None:
        """Add what a stage found out."""
        self._confirm()
        with self._database.session() as session:
            row = session.get_one(self._table, self._identity)
            row.facts = {**row.facts, **facts}

    def finish(self, status: str, *, error: str = "") -> None:
        """The cycle is over: "done" or "failed"."""
        stage = "finished" if status == "done" else "failed"
        logger.info("project %s, %s: %s", self._identity[0], self._name, stage)
        self.go_on()
        self._update(status=status, stage=stage, error=error, finished_at=utc_now())

    def count_restart(self) -> int:
        """Another worker goes on, since the one that ran the cycle is dead; returns how often that happened by now."""
        with self._database.session() as session:
            row = session.get_one(self._table, self._identity)
            restarts = int(row.facts.get("restarts", 0)) + 1
            row.facts = {**row.facts, "restarts": restarts}
        return restarts

    def abandon(self, error: str) -> None:
        """The cycle ended without saying so; nothing happens if it has said so by now."""
        with self._database.session() as session:
            row = session.get_one(self._table, self._identity)
            if row.status in UNFINISHED:
                row.status, row.stage, row.error, row.finished_at = "failed", "failed", error, utc_now()

    def check_wanted(self) -> None:
        """TSPError when the project was forgotten."""
        if is_forgotten(self._database, self._identity[0]):
            raise TSPError("people have asked to forget this project.")

    def _update(self, *, pace: dict[str, Any] | None = None, **columns: Any) -> None:
        """Set columns, and among the facts the pace of the steps (None: not known)."""
        self._confirm()
        with self._database.session() as session:
            row = session.get_one(self._table, self._identity, with_for_update=True)
            for name, value in columns.items():
                setattr(row, name, value)
            row.facts = _without(row.facts, "pace") | ({"pace": pace} if pace else {})

    @property
    def _name(self) -> str:
        return f"{self._what} {self._identity[1]}"


class ActivationLog(CycleLog):
    """The same for an activation."""

    _table = ActivationRow
    _what = "activation"


class PoolLookLog(CycleLog):
    """The same for a look at tasks that came after the last cycle. Its row is there from the first stage that has
    something to do until the `end`."""

    _table = PoolLookRow
    _name = "look at new tasks"  # there is one at a time

    def stage(self, stage: str, *, done: int = 0, total: int = 0) -> None:
        if total:
            with self._database.session() as session:
                session.merge(PoolLookRow(project_key=self._identity[0], number=self._identity[1], status="running"))
            super().stage(stage, done=done, total=total)

    def end(self) -> None:
        """It is over, or given up."""
        with self._database.session() as session:
            session.execute(delete(PoolLookRow).where(PoolLookRow.project_key == self._identity[0]))


def _without(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: fact for other, fact in facts.items() if other != name}
