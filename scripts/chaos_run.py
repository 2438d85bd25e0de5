"""A chaos run whose parts are started: what all of its threads share, and what they look at."""

import random
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, select, text

from ml_backend.db import CycleRow, Database, UsedTaskRow
from ml_backend.inbox import ProjectName
from ml_backend.ls_client import LabelStudioClient
from ml_backend.settings import Settings
from scripts.backend_processes import BackendProcesses
from scripts.chaos_faults import Faults
from scripts.chaos_ledger import Annotators, Ledger, Truth
from scripts.chaos_plan import ChaosError, Events, Plan
from scripts.chaos_report import load_average
from scripts.chaos_watch import Watcher
from scripts.fault_proxy import FaultProxy
from scripts.label_studio_server import LabelStudioServer

_STAGES = {  # beginnings of what a cycle says that it does
    "snapshot": ("reading annotations", "starting"),
    "training": ("training",),
    "evaluation": ("evaluating",),
    "scoring": ("scoring",),
    "choosing": ("choosing", "looking at the annotated"),
    "publishing": ("publishing", "removing", "no task is left"),
}


class Chaos:
    """The processes, proxies and annotators of a run, and how far it is."""

    def __init__(
        self,
        *,
        plan: Plan,
        folder: Path,
        server: LabelStudioServer,
        client: LabelStudioClient,
        api: httpx.Client,
        backend: BackendProcesses,
        faults: Faults,
        proxies: Mapping[str, FaultProxy],
        environment: Mapping[str, str],
        truth: Truth,
        events: Events,
        project_id: int,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.folder = plan, folder
        self.server, self.client, self.api = server, client, api
        self.backend, self.faults, self.proxies = backend, faults, proxies
        self.environment, self.truth, self.events, self.say = environment, truth, events, say
        self.project_id = project_id
        name = ProjectName.from_uid(client.project(project_id).uid)
        if name is None:
            raise ChaosError(f"project {project_id} has no name that the backend understands")
        self.key = name.key
        self.settings = Settings.model_validate(dict(environment))
        self.database = Database(self.settings.database)
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.quiet = threading.RLock()  # held while an annotator acts and while Label Studio is away
        self.over = threading.Event()
        self.annotators = Annotators(
            client=client, api=api, project_id=project_id, truth=truth, ledger=self.ledger, rng=self.rng("annotators")
        )
        self.watcher = Watcher(
            project_key=self.key, model_dir=self.settings.model_dir, database=self.database, client=client,
            ledger=self.ledger, quiet=self.quiet, tell=events.tell,
        )  # fmt: skip
        self.events.tell("session", load_average=load_average())
        self.annotators.settle()
        missing = plan.first_images - len(self.ledger.tasks)
        self.annotators.import_images(max(0, missing))
        self.watching = threading.Thread(target=self.guarded, args=(self.watcher.run,), name="watcher", daemon=True)
        self.watching.start()
        faults.watch = partial(self.guarded, self.watcher.look_at_request)

    def cycles(self) -> list[CycleRow]:
        """The oldest first."""
        with self.database.session() as session:
            query = select(CycleRow).where(CycleRow.project_key == self.key).order_by(CycleRow.number)
            return list(session.scalars(query))

    def stage(self) -> str:
        """What the cycle that is planned or runs is doing, by a name of _STAGES if it has one."""
        for cycle in self.cycles():
            if cycle.status == "planned":
                return "planned"
            if cycle.status == "running":
                return next((name for name, words in _STAGES.items() if cycle.stage.startswith(words)), cycle.stage)
        return "between cycles"

    def workflows(self) -> dict[str, str]:
        """The status of each cycle's workflow."""
        engine = create_engine(self.settings.workflow_database)
        try:
            with engine.connect() as connection:
                rows = connection.execute(text("SELECT workflow_uuid, status FROM workflow_status"))
                return {row.workflow_uuid: row.status for row in rows if row.workflow_uuid.startswith("cycle-")}
        finally:
            engine.dispose()

    def waiting_tasks(self) -> int:
        """Annotated tasks that no cycle has used."""
        with self.database.session() as session:
            used = set(session.scalars(select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == self.key)))
        return len(self.ledger.annotated() - used)

    def is_ready(self, name: str) -> bool:
        """Whether the process has finished starting."""
        starts = [event for event in self.events.of("start") if event["process"] == name]
        with self.log(name).open("rb") as log:
            log.seek(starts[-1]["log_bytes"] if starts else 0)
            return (b"the worker is ready" if name == "worker" else b"Application startup complete") in log.read()

    def log(self, name: str) -> Path:
        """Of a process, of all its lives."""
        return self.folder / "logs" / f"{name}.log"

    def kills(self) -> int:
        """So many up to now."""
        return len(self.events.of("kill"))

    def seconds(self) -> float:
        """How long the run has lasted, without the time in which it was stopped."""
        total, previous = 0.0, None
        for event in list(self.events.all):
            if previous is not None and event["kind"] != "session":
                total += event["at"] - previous
            previous = event["at"]
        return total + (time.time() - previous if previous else 0.0)

    def fault_counts(self, name: str) -> dict[str, int]:
        """How often a proxy did what to a request."""
        total: dict[str, int] = {}
        for event in self.events.of("faults"):
            if event["proxy"] == name:
                for fault, count in event["counts"].items():
                    total[fault] = total.get(fault, 0) + count
        return dict(sorted(total.items()))

    def rng(self, name: str) -> random.Random:
        """Another one for each part, so that the draws of one do not depend on the timing of others."""
        return random.Random(f"{self.plan.seed} {name} {len(self.events.of('session'))}")

    def guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do a thread's work; what ends it ends the run."""
        try:
            work(*arguments)
        except Exception as error:  # a thread that dies unseen would make the run milder than it says
            self.events.tell("broken", what=f"{getattr(work, '__name__', work)}: {type(error).__name__}: {error}")
            self.over.set()
            raise

    def check_that_nothing_broke(self) -> None:
        """ChaosError when a thread of this session has ended before its time."""
        broken = [event for event in self.events.since_the_last("session") if event["kind"] == "broken"]
        if broken:
            raise ChaosError(f"the run broke: {broken[-1]['what']}")
