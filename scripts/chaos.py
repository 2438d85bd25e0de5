"""Pulls plugs: while annotators work in a real Label Studio, our processes are killed again and again, webhooks and the
connection to Label Studio are spoiled, and in the end everything must be as if nothing had happened.

    python -m scripts.chaos --kills 200 --seed 0 --out runs/chaos

Stopped, it goes on with the same command. The last line is one JSON object; `report.json` and `report.md` in --out say
more.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from model.dataset import read_coco
from scripts.backend_processes import BackendProcesses
from scripts.chaos_faults import Faults
from scripts.chaos_findings import findings
from scripts.chaos_ledger import Truth
from scripts.chaos_plan import Events, Plan, State
from scripts.chaos_plugs import inject
from scripts.chaos_report import summary, write_report
from scripts.chaos_run import Chaos
from scripts.chaos_settle import settle
from scripts.fault_proxy import FaultProxy
from scripts.label_studio_server import HOST, LabelStudioServer
from scripts.make_phantoms import make_phantoms

EMAIL, PASSWORD = "annotator@example.com", "pull-the-plug"


def main() -> None:
    """Run, or go on, until so many processes were killed; then settle, check and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="processes to kill, web and worker together")
    parser.add_argument("--seed", type=int, default=0, help="of what is broken, and when; default: %(default)s")
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
    state = State.read(folder / "state.json", plan)
    with ExitStack() as running:
        chaos = running.enter_context(_started(plan, folder, state, server, say))
        inject(chaos, minutes=minutes)
        settle(chaos)
        report = findings(chaos)
    write_report(report, folder)
    return report


@contextmanager
def _started(
    plan: Plan, folder: Path, state: State, server: LabelStudioServer | None, say: Callable[[str], None]
) -> Iterator[Chaos]:
    """Label Studio, both proxies, both processes, the project; all stopped at the end."""
    make_phantoms(folder / "phantoms", images=plan.images, size=plan.size, seed=plan.seed)
    truth = Truth(read_coco(folder / "phantoms" / "annotations.json"))
    server = server or LabelStudioServer(
        data_dir=folder / "label-studio", username=EMAIL, password=PASSWORD, port=state.label_studio_port, report=say
    )
    faults = Faults(random.Random(f"{plan.seed} faults"))
    with ExitStack() as running:
        running.callback(server.stop)
        server.start()
        events = Events(folder / "events.jsonl")
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
        yield Chaos(
            plan=plan, folder=folder, server=server, client=client, api=api, backend=backend, faults=faults,
            proxies={"webhook": webhooks, "api": api_proxy}, environment=environment, truth=truth, events=events,
            project_id=state.project_id, say=say,
        )  # fmt: skip


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
