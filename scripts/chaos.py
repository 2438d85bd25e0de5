"""Pulls plugs: while annotators work in a real Label Studio, our processes are killed again and again, webhooks and the
connection to Label Studio are spoiled, and in the end everything must be as if nothing had happened.

    python -m scripts.chaos --kills 200 --seed 0 --out runs/chaos

Stopped, it goes on with the same command. The last line is one JSON object; `report.json` and `report.md` in --out say
more.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from sqlalchemy import create_engine, select, text

from ml_backend.db import UNFINISHED, CycleRow, Database, ProjectRow, UsedTaskRow
from ml_backend.inbox import ProjectName
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from ml_backend.settings import Settings
from model.dataset import read_coco
from model.errors import TSPError
from model.files import write_json
from model.registry import Registry
from scripts import chaos_checks as checks
from scripts.backend_processes import BackendProcesses
from scripts.chaos_ledger import Annotators, Ledger, Truth, exported
from scripts.chaos_report import load_average, machine, summary, write_report
from scripts.chaos_watch import Watcher
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import HOST, LabelStudioServer, free_port
from scripts.make_phantoms import make_phantoms

EMAIL, PASSWORD = "annotator@example.com", "pull-the-plug"
SETTLE_SECONDS = 900.0
_START_SECONDS = 300.0
_STAGES = {  # beginnings of what a cycle says that it does
    "snapshot": ("reading annotations", "starting"),
    "training": ("training",),
    "evaluation": ("evaluating",),
    "scoring": ("scoring",),
    "choosing": ("choosing", "looking at the annotated"),
    "publishing": ("publishing", "removing", "no task is left"),
}
_AIMS = (
    "publishing", "training", "scoring", "choosing", "training", "publishing", "snapshot", "training", "evaluation",
)  # fmt: skip


class ChaosError(Exception):
    """The run itself cannot go on; nothing is known about what it was to show."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run consists of. The same plan and the same folder go on with the same run."""

    kills: int
    seed: int
    images: int = 800
    first_images: int = 70
    size: int = 64
    batch_size: int = 8
    steps: int = 40
    checkpoint_steps: int = 5
    worker_seconds: float = 20.0  # a worker that is ready lives at most so long, from 0 on, uniformly drawn
    web_seconds: float = 24.0
    early: float = 0.2  # share of kills whose time runs from the start of the process, ready or not
    aimed: float = 0.5  # share of the worker's kills that wait for a stage of a cycle, one after the other of a list
    annotator_seconds: float = 3.0  # longest pause between two things that annotators do
    kills_a_restart: int = 25  # Label Studio is stopped once for so many kills
    trained_again: int = 1000  # cycles that are trained once more at the end, the newest first

    @classmethod
    def quick(cls, *, kills: int, seed: int) -> "Plan":
        """A run of about a minute, as in the tests."""
        return cls(
            kills=kills, seed=seed, images=90, first_images=40, batch_size=6, steps=24, checkpoint_steps=4,
            worker_seconds=8, web_seconds=10, aimed=0.8, annotator_seconds=0.8, kills_a_restart=10, trained_again=1,
        )  # fmt: skip

    def settings(self, folder: Path, *, label_studio_url: str, token: str, port: int) -> dict[str, str]:
        """The environment of our processes: small and quick, with several checkpoints in each training."""
        return {
            "LABEL_STUDIO_URL": label_studio_url,
            "LABEL_STUDIO_API_KEY": token,
            "MODEL_DIR": str(folder / "backend"),
            "PORT": str(port),
            "LOG_LEVEL": "DEBUG",  # each training step is a line
            "TSP_BATCH_SIZE": str(self.batch_size),
            "TSP_IMAGE_SIZE": str(self.size),
            "TSP_EPOCHS": "1",
            "TSP_MIN_STEPS": str(self.steps),
            "TSP_CHECKPOINT_STEPS": str(self.checkpoint_steps),
            "TSP_CLASS_THRESHOLD": "0.3",  # a network that has learnt so little would trust nothing
            "TSP_BOX_THRESHOLD": "0.3",
            "TSP_MASK_THRESHOLD": "0.3",
            "TSP_DETECTIONS": "20",
            "TSP_RECONCILE_SECONDS": "5",
            "TSP_THREADS": "1",
            "TSP_NICENESS": "0",
        }


def main() -> None:
    """Run, or go on, until so many processes were killed; then settle, check and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="processes to kill, web and worker together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder of the run; an unfinished run in it goes on")
    parser.add_argument("--minutes", type=float, default=1e6, help="kill no more after this time in all")
    parser.add_argument("--quick", action="store_true", help="smaller trainings, shorter lives: for few kills")
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_in_order)
    say = _say_nothing if options.json else _say
    folder = Path(options.out).resolve()
    try:
        plan = (Plan.quick if options.quick else Plan)(kills=options.kills, seed=options.seed)
        report = run(plan, folder, minutes=options.minutes, say=say)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on.")
    print(json.dumps(summary(report)))
    sys.exit(bool(report["violations"]))


def run(
    plan: Plan,
    folder: Path,
    *,
    minutes: float = 1e6,
    say: Callable[[str], None] = print,
    server: LabelStudioServer | None = None,
) -> dict[str, Any]:
    """The report of a whole run, which is also written into `folder`. `server`: a Label Studio of the run's own whose
    data folder is prepared already; it is stopped and started."""
    folder.mkdir(parents=True, exist_ok=True)
    _stop_leftovers(folder)
    state = _State.read(folder / "state.json", plan)
    with ExitStack() as running:
        chaos = running.enter_context(_started(plan, folder, state, server, say))
        chaos.inject(minutes=minutes)
        chaos.settle()
        report = chaos.report()
    write_report(report, folder)
    return report


@dataclass
class _State:
    """What a run that goes on must find again."""

    path: Path
    label_studio_port: int
    web_port: int
    webhook_port: int
    api_port: int
    project_id: int | None = None

    @classmethod
    def read(cls, path: Path, plan: Plan) -> "_State":
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if known and known["plan"] != asdict(plan):
            raise ChaosError(f"{path.parent} holds a run of another plan: expected {known['plan']}, got {asdict(plan)}")
        ports: list[int] = known.get("ports") or [free_port() for _ in range(4)]
        state = cls(path, *ports)
        state.project_id = known.get("project_id")
        state.write(plan)
        return state

    def write(self, plan: Plan) -> None:
        ports = [self.label_studio_port, self.web_port, self.webhook_port, self.api_port]
        write_json(self.path, {"plan": asdict(plan), "ports": ports, "project_id": self.project_id})


class _Events:
    """A file of lines: kills, starts, switches, violations. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.all: list[dict[str, Any]] = []
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self.all = [json.loads(line) for line in lines]
            path.write_text("".join(lines))

    def tell(self, kind: str, **about: Any) -> None:
        event = {"kind": kind, "at": time.time(), **about}
        with self._lock:
            self.all.append(event)
            with self._path.open("a") as file:
                file.write(json.dumps(event) + "\n")

    def of(self, kind: str) -> list[dict[str, Any]]:
        with self._lock:
            return [event for event in self.all if event["kind"] == kind]

    def since_the_last(self, kind: str) -> list[dict[str, Any]]:
        """The events from the last one of this kind on."""
        with self._lock:
            starts = [number for number, event in enumerate(self.all) if event["kind"] == kind]
            return self.all[starts[-1] if starts else 0 :]


@contextmanager
def _started(
    plan: Plan, folder: Path, state: _State, server: LabelStudioServer | None, say: Callable[[str], None]
) -> Iterator["_Chaos"]:
    """Label Studio, both proxies, both processes, the project; all stopped at the end."""
    make_phantoms(folder / "phantoms", images=plan.images, size=plan.size, seed=plan.seed)
    truth = Truth(read_coco(folder / "phantoms" / "annotations.json"))
    server = server or LabelStudioServer(
        data_dir=folder / "label-studio", username=EMAIL, password=PASSWORD, port=state.label_studio_port, report=say
    )
    faults = _Faults(random.Random(f"{plan.seed} faults"))
    with ExitStack() as running:
        running.callback(server.stop)
        server.start()
        events = _Events(folder / "events.jsonl")
        web_url = f"http://{HOST}:{state.web_port}"
        webhooks = running.enter_context(FaultProxy(web_url, faults.of_webhook, port=state.webhook_port))
        api_proxy = running.enter_context(FaultProxy(server.url, faults.of_api, port=state.api_port, look=faults.look))
        environment = plan.settings(folder, label_studio_url=api_proxy.url, token=server.token, port=state.web_port)
        backend = running.enter_context(BackendProcesses(settings=environment, log_dir=folder / "logs"))
        client = running.enter_context(LabelStudioClient(server.url, server.token))
        api = running.enter_context(
            httpx.Client(base_url=server.url, headers={"Authorization": f"Token {server.token}"}, timeout=60.0)
        )
        if state.project_id is None:
            project = client.create_project(title="Chaos", label_config=truth.label_config)
            client.update_project(project.id, sampling=UNCERTAINTY_SAMPLING)
            client.connect_backend(project.id, url=webhooks.url, title="TSP")
            state.project_id = project.id
            state.write(plan)
        yield _Chaos(
            plan=plan, folder=folder, server=server, client=client, api=api, backend=backend, faults=faults,
            proxies={"webhook": webhooks, "api": api_proxy}, environment=environment, truth=truth, events=events,
            project_id=state.project_id, say=say,
        )  # fmt: skip


class _Faults:
    """Draws what happens to a request; nothing while `active` is off."""

    def __init__(self, rng: random.Random) -> None:
        self.active = False
        self.watch: Callable[[Call], None] | None = None
        self._rng = rng

    def look(self, call: Call) -> None:
        """At a request to Label Studio, before anything is done to it."""
        if self.watch is not None:
            self.watch(call)

    def of_webhook(self, call: Call) -> Fault | None:
        """On the way from Label Studio to the web process; what is asked, /health and /setup, is left alone."""
        if not self.active or not call.path.startswith("/webhook") or self._rng.random() > 0.4:
            return None
        choices = [
            Fault(kind="drop"),
            Fault(kind="double"),
            Fault(kind="late", seconds=self._rng.uniform(0.5, 8)),
            Fault(kind="slow", seconds=self._rng.uniform(0.2, 1.5)),
            Fault(kind="refuse"),
            Fault(kind="lose_answer"),
        ]
        return self._rng.choice(choices)

    def of_api(self, call: Call) -> Fault | None:
        """On the way from our processes to Label Studio; imports of predictions suffer most."""
        chance = 0.35 if "/import/predictions" in call.path else 0.04
        if not self.active or self._rng.random() > chance:
            return None
        choices = {
            Fault(kind="status", status=500): 4,
            Fault(kind="status", status=503): 3,
            Fault(kind="status", status=429): 4,
            Fault(kind="status", status=401): 0.4,  # waited for, as a token that is taken is
            Fault(kind="status_after", status=502): 3,
            Fault(kind="slow", seconds=self._rng.uniform(0.3, 3)): 4,
            Fault(kind="cut"): 4,
            Fault(kind="lose_answer"): 3,
            Fault(kind="refuse"): 3,
        }
        return self._rng.choices(list(choices), list(choices.values()))[0]


class _Chaos:
    """A run whose parts are started."""

    def __init__(
        self,
        *,
        plan: Plan,
        folder: Path,
        server: LabelStudioServer,
        client: LabelStudioClient,
        api: httpx.Client,
        backend: BackendProcesses,
        faults: _Faults,
        proxies: Mapping[str, FaultProxy],
        environment: Mapping[str, str],
        truth: Truth,
        events: _Events,
        project_id: int,
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._folder = plan, folder
        self._server, self._client, self._api = server, client, api
        self._backend, self._faults, self._proxies = backend, faults, proxies
        self._environment, self._truth, self._events, self._say = environment, truth, events, say
        self._project_id = project_id
        name = ProjectName.from_uid(client.project(project_id).uid)
        if name is None:
            raise ChaosError(f"project {project_id} has no name that the backend understands")
        self._key = name.key
        self._settings = Settings.model_validate(dict(environment))
        self._database = Database(self._settings.database)
        self._ledger = Ledger(folder / "ledger.jsonl")
        self._quiet = threading.RLock()  # held while an annotator acts and while Label Studio is away
        self._over = threading.Event()
        self._annotators = Annotators(
            client=client, api=api, project_id=project_id, truth=truth, ledger=self._ledger, rng=self._rng("annotators")
        )
        self._watcher = Watcher(
            project_key=self._key, model_dir=self._settings.model_dir, database=self._database, client=client,
            ledger=self._ledger, quiet=self._quiet, tell=events.tell,
        )  # fmt: skip
        self._events.tell("session", load_average=load_average())
        self._annotators.settle()
        missing = plan.first_images - len(self._ledger.tasks)
        self._annotators.import_images(max(0, missing))
        self._watching = threading.Thread(target=self._guarded, args=(self._watcher.run,), name="watcher", daemon=True)
        self._watching.start()
        faults.watch = partial(self._guarded, self._watcher.look_at_request)

    # While plugs are pulled

    def inject(self, *, minutes: float) -> None:
        """Everything at once, until enough processes were killed or the time is over."""
        self._faults.active = True
        threads = [
            threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True)
            for work, *arguments in (
                (self._annotate,),
                (self._kill, "worker", self._plan.worker_seconds),
                (self._kill, "web", self._plan.web_seconds),
                (self._send_noise,),
                (self._restart_label_studio,),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            told = 0.0
            while self._kills() < self._plan.kills and self._seconds() < minutes * 60 and not self._over.is_set():
                time.sleep(0.2)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    newest = next(iter(reversed(self._cycles())), None)
                    self._say(
                        f"{self._kills()} of {self._plan.kills} kills, "
                        f"{len(self._ledger.annotated())} annotated tasks, "
                        f"{f'cycle {newest.number}: {newest.stage}' if newest else 'no cycle yet'}"
                    )
        finally:  # Ctrl-C too: nothing may be started while all is being stopped
            self._over.set()
            for thread in threads:
                thread.join()
        self._faults.active = False
        for name, proxy in self._proxies.items():
            self._events.tell("faults", proxy=name, counts=dict(proxy.counts))
        self._check_that_nothing_broke()

    def _check_that_nothing_broke(self) -> None:
        broken = [event for event in self._events.since_the_last("session") if event["kind"] == "broken"]
        if broken:
            raise ChaosError(f"the run broke: {broken[-1]['what']}")

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # a thread that dies unseen would make the run milder than it says
            self._events.tell("broken", what=f"{getattr(work, '__name__', work)}: {type(error).__name__}: {error}")
            self._over.set()
            raise

    def _annotate(self) -> None:
        rng = self._rng("pace")
        while not self._over.wait(rng.uniform(0.1, self._plan.annotator_seconds)):
            with self._quiet:
                self._annotators.act(may_annotate=self._waiting_tasks() < 2 * self._plan.batch_size)
                cycles = self._cycles()
                if cycles and cycles[-1].status == "failed":  # as its error asks people to do
                    with suppress(httpx.HTTPError, TSPError):
                        self._annotators.press_start_training()

    def _waiting_tasks(self) -> int:
        """Annotated tasks that no cycle has used."""
        with self._database.session() as session:
            used = set(session.scalars(select(UsedTaskRow.task_id).where(UsedTaskRow.project_key == self._key)))
        return len(self._ledger.annotated() - used)

    def _kill(self, name: str, longest_seconds: float) -> None:
        """Kill a process again and again: after a drawn time, or in the next stage on the list, once it comes."""
        rng = self._rng(name)
        aims = itertools.cycle(_AIMS)
        while not self._over.is_set():
            if rng.random() > self._plan.early and not self._wait_until_ready(name):
                return
            deadline = time.monotonic() + rng.uniform(0, longest_seconds)
            if name == "worker" and rng.random() < self._plan.aimed:
                aim = next(aims)
                while time.monotonic() < deadline + longest_seconds:
                    if self._stage() == aim and self._is_ready(name):
                        break
                    if self._over.wait(0.05):
                        return
                deadline = time.monotonic() + rng.uniform(0, 3.0 if aim == "training" else 0.6)
            while time.monotonic() < deadline:
                if self._over.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
                    return
                if (status := self._backend.ended(name)) is not None:
                    self._events.tell("violation", what=f"the {name} process ended by itself with status {status}")
                    break
            self._events.tell("kill", process=name, stage=self._stage(), ready=self._is_ready(name))
            self._backend.kill(name)
            time.sleep(rng.uniform(0, 1.5))
            self._events.tell("start", process=name, log_bytes=self._log(name).stat().st_size)
            self._backend.start_one(name)

    def _wait_until_ready(self, name: str) -> bool:
        """False when the run is over before; a slow machine must not kill nothing but processes that start."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready(name):
            if self._over.wait(0.2):
                return False
            if time.monotonic() > deadline:
                self._events.tell("violation", what=f"the {name} process is not ready after {_START_SECONDS:.0f} s")
                return True
        return True

    def _restart_label_studio(self) -> None:
        rng = self._rng("label studio")
        while not self._over.wait(0.5):
            due = (self._kills() + self._plan.kills_a_restart // 2) // self._plan.kills_a_restart
            if len(self._events.of("label studio stopped")) < due:
                with self._quiet:
                    self._events.tell("label studio stopped")
                    self._server.stop()
                    time.sleep(rng.uniform(0, 5))
                    self._server.start()
                    self._events.tell("label studio started")

    def _send_noise(self) -> None:
        """Webhooks that are malformed or of other projects, straight to the web process: refused, never a 500."""
        rng = self._rng("noise")
        while not self._over.wait(rng.uniform(0.5, 5)):
            name, body, expected = rng.choice(_noise())
            try:
                status = httpx.post(
                    f"http://{HOST}:{self._settings.port}/webhook",
                    content=body, headers={"Content-Type": "application/json"}, timeout=20,
                ).status_code  # fmt: skip
            except httpx.TransportError:
                continue  # killed at the moment
            self._events.tell("noise", name=name, status=status)
            if status != expected:
                self._events.tell("violation", what=f"a webhook ({name}) was answered {status}, expected {expected}")

    # Afterwards

    def settle(self) -> None:
        """Without faults: all that was begun ends; one more cycle is asked for; every task gets its prediction."""
        self._say("no more faults; waiting until all work is done")
        self._annotators.settle()
        last = self._wait(self._resting_cycle, "the last cycle does not end")
        self._events.tell("last press", after=last)
        self._annotators.press_start_training()
        self._wait(lambda: self._resting_cycle(above=last), "the cycle that was asked for does not end")
        self._wait(self._everything_is_predicted, "tasks have no prediction")
        self._events.tell("settled")
        self._watcher.stop()
        self._watching.join()

    def _resting_cycle(self, *, above: int = 0) -> int | None:
        """The number of the newest cycle when all are over and no batch is full."""
        cycles = self._cycles()
        if not cycles or cycles[-1].number <= above or any(cycle.status in UNFINISHED for cycle in cycles):
            return None
        with self._database.session() as session:
            row = session.get_one(ProjectRow, self._key)
            is_due = row.new_annotated >= self._plan.batch_size or row.annotated != len(self._ledger.annotated())
            is_old = checks.unix(row.checked_at) < max(time.time() - 15, checks.unix(cycles[-1].finished_at or ""))
        return None if is_due or is_old else cycles[-1].number

    def _everything_is_predicted(self) -> bool:
        version = Registry(self._settings.model_dir / "versions").active(self._key)
        wanted = set(self._ledger.records()) - self._ledger.annotated()
        return version is not None and (
            not wanted or wanted <= self._client.predicted_task_ids(self._project_id, version)
        )

    def _wait(self, until: Callable[[], Any], trouble: str) -> Any:
        """What `until` answers in the end. Trouble is a violation, and nothing more can be checked."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not (answer := until()):
            for name in ("web", "worker"):
                if (status := self._backend.ended(name)) is not None:
                    raise ChaosError(f"{trouble}: the {name} process ended by itself with status {status}")
            if time.monotonic() > deadline:
                newest = self._cycles()[-1:]
                described = [(cycle.number, cycle.status, cycle.stage, cycle.error) for cycle in newest]
                raise ChaosError(f"{trouble} within {SETTLE_SECONDS:.0f} s: {described}")
            time.sleep(0.5)
        return answer

    def report(self) -> dict[str, Any]:
        """All checks, and what was done."""
        self._check_that_nothing_broke()
        cycles = self._cycles()
        last = cycles[-1]
        folder = self._settings.model_dir / "cycles" / self._key
        snapshots = {
            cycle.number: checks.read_snapshot(folder / str(cycle.number))
            for cycle in cycles
            if (folder / str(cycle.number) / "recipe.json").exists()
        }
        if last.number not in snapshots:
            raise ChaosError(f"the last cycle, without any fault, took no snapshot: {last.status}, {last.error}")
        there = exported(self._client, self._api, self._project_id, self._truth)
        steps = checks.count_steps(self._log("worker").read_text(errors="replace"))
        registry = Registry(self._settings.model_dir / "versions")
        predictions, prediction_violations = self._predictions()
        again, different = self._train_again(cycles)
        violations = {
            "watcher": [event["what"] for event in self._events.of("violation")],
            "cycles": checks.check_cycles(cycles, self._workflows(), self._plan.batch_size),
            "snapshots": checks.check_snapshots(cycles, snapshots, self._ledger),
            "label studio": checks.check_label_studio(there, self._ledger),
            "last cycle": checks.check_last_cycle(last, snapshots[last.number], there, self._ledger),
            "steps": checks.check_steps(steps, checkpoint_steps=self._plan.checkpoint_steps),
            "registry": checks.check_registry(registry, self._key, cycles, folder, self._watcher.digests),
            "predictions": prediction_violations,
            "weights": different,
        }
        kills = self._events.of("kill")
        return {
            "plan": asdict(self._plan),
            "command": f"python -m scripts.chaos --kills {self._plan.kills} --seed {self._plan.seed} --out <folder>",
            "machine": machine(),
            "load_average_before": [event["load_average"] for event in self._events.of("session")],
            "minutes": round(self._seconds() / 60, 1),
            "kills": len(kills),
            "kills_by_process": _counted(kill["process"] for kill in kills),
            "kills_by_stage": {
                name: _counted(
                    kill["stage"] if kill["ready"] else f"{kill['stage']}, still starting"
                    for kill in kills
                    if kill["process"] == name
                )
                for name in ("worker", "web")
            },
            "label_studio_restarts": len(self._events.of("label studio started")),
            "faults": {name: self._fault_counts(name) for name in self._proxies},
            "noise": _counted(f"{event['name']}: {event['status']}" for event in self._events.of("noise")),
            "annotators": self._ledger.counts,
            "cycles": len(cycles),
            "cycles_by_status": _counted(cycle.status for cycle in cycles),
            "cycles_asked_for": sum(cycle.reason.startswith("asked for") for cycle in cycles),
            "failed": {str(cycle.number): cycle.error for cycle in cycles if cycle.status == "failed"},
            "annotated_in_label_studio": sum(any(not k.cancelled for k in kept.values()) for kept in there.values()),
            "annotated_in_last_cycle": last.facts.get("annotated"),
            "tasks": len(there),
            "lost": sum("missing" in what for what in violations["last cycle"]) + len(violations["label studio"]),
            "duplicated": sum(len(snapshot.doubled) for snapshot in snapshots.values())
            + predictions["predictions"] - predictions["predicted_tasks"],
            "predictions": predictions,
            "steps": asdict(steps),
            "looks_of_the_watcher": self._watcher.looks,
            "switches": [
                {name: event[name] for name in ("when", "version", "predictions", "expected", "scored")}
                for event in self._events.of("switch")
            ],
            "trained_again": again,
            "violations": {name: found for name, found in violations.items() if found},
        }  # fmt: skip

    def _predictions(self) -> tuple[dict[str, Any], list[str]]:
        """What Label Studio has for the active version, and what is wrong with it."""
        version = str(Registry(self._settings.model_dir / "versions").active(self._key))
        counts = self._client.model_versions(self._project_id)
        tasks = self._client.predicted_task_ids(self._project_id, version)
        open_tasks = set(self._ledger.records()) - self._ledger.annotated()
        shown = self._client.project(self._project_id).model_version
        about = {"version": version, "predictions": counts.get(version, 0), "predicted_tasks": len(tasks)}
        return (
            {**about, "tasks_without_annotation": len(open_tasks)},
            checks.check_predictions(version, shown=shown, counts=counts, predicted=tasks, open_tasks=open_tasks),
        )

    def _train_again(self, cycles: list[CycleRow]) -> tuple[list[str], list[str]]:
        """Once more from the frozen snapshots, each in a new process without interruption; the versions, and which of
        them are different."""
        done = [cycle for cycle in cycles if cycle.status == "done"][-self._plan.trained_again :]
        found: list[str] = []
        for cycle in done:
            self._say(f"cycle {cycle.number} is trained once more")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found += pool.submit(
                    checks.train_again, dict(self._environment), self._key, cycle.number, str(cycle.version),
                    self._folder / "again",
                ).result()  # fmt: skip
        return [str(cycle.version) for cycle in done], found

    # Looking

    def _cycles(self) -> list[CycleRow]:
        with self._database.session() as session:
            query = select(CycleRow).where(CycleRow.project_key == self._key).order_by(CycleRow.number)
            return list(session.scalars(query))

    def _stage(self) -> str:
        for cycle in self._cycles():
            if cycle.status == "planned":
                return "planned"
            if cycle.status == "running":
                return next((name for name, words in _STAGES.items() if cycle.stage.startswith(words)), cycle.stage)
        return "between cycles"

    def _workflows(self) -> dict[str, str]:
        engine = create_engine(self._settings.workflow_database)
        try:
            with engine.connect() as connection:
                rows = connection.execute(text("SELECT workflow_uuid, status FROM workflow_status"))
                return {row.workflow_uuid: row.status for row in rows if row.workflow_uuid.startswith("cycle-")}
        finally:
            engine.dispose()

    def _is_ready(self, name: str) -> bool:
        """Whether the process has finished starting."""
        starts = [event for event in self._events.of("start") if event["process"] == name]
        with self._log(name).open("rb") as log:
            log.seek(starts[-1]["log_bytes"] if starts else 0)
            return (b"the worker is ready" if name == "worker" else b"Application startup complete") in log.read()

    def _log(self, name: str) -> Path:
        return self._folder / "logs" / f"{name}.log"

    def _kills(self) -> int:
        return len(self._events.of("kill"))

    def _seconds(self) -> float:
        """How long the run has lasted, without the time in which it was stopped."""
        total, previous = 0.0, None
        for event in list(self._events.all):
            if previous is not None and event["kind"] != "session":
                total += event["at"] - previous
            previous = event["at"]
        return total + (time.time() - previous if previous else 0.0)

    def _fault_counts(self, name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for event in self._events.of("faults"):
            if event["proxy"] == name:
                for fault, count in event["counts"].items():
                    total[fault] = total.get(fault, 0) + count
        return dict(sorted(total.items()))

    def _rng(self, name: str) -> random.Random:
        """Another one for each part, so that the draws of one do not depend on the timing of others."""
        return random.Random(f"{self._plan.seed} {name} {len(self._events.of('session'))}")


def _noise() -> list[tuple[str, bytes, int]]:
    """Names, bodies and the expected answers."""
    another = {"action": "ANNOTATION_CREATED", "project": {"id": 90001, "created_at": "2020-01-01T00:00:00Z"}}
    return [
        ("no JSON", b"{broken", 422),
        ("no project", b'{"action": "ANNOTATION_CREATED"}', 422),
        ("a strange action", b'{"action": "x; drop table", "project": {"id": 1}}', 422),
        ("a project without id", b'{"action": "ANNOTATION_CREATED", "project": {"created_at": "2020"}}', 422),
        ("a list", b"[]", 422),
        ("another project", json.dumps(another).encode(), 200),
    ]


def _counted(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def _stop_leftovers(folder: Path) -> None:
    """End what an earlier run in this folder, which was killed itself, has left running: known by its environment."""
    marks = (f"MODEL_DIR={folder / 'backend'}", f"LABEL_STUDIO_BASE_DATA_DIR={folder / 'label-studio'}")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # another user's, or over by now
            continue
        if any(mark in environment for mark in marks):
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)


def _say(what: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')}  {what}", flush=True)


def _say_nothing(what: str) -> None:
    pass


def _stop_in_order(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
