"""Pulls the plugs: while annotators act, processes are killed, Label Studio is restarted and webhooks are sent that
nobody should send."""

import itertools
import threading
import time
from contextlib import suppress

import httpx

from model.errors import TSPError
from scripts.chaos_faults import noise
from scripts.chaos_run import Chaos
from scripts.label_studio_server import HOST

_START_SECONDS = 300.0
_AIMS = (
    "publishing", "training", "scoring", "choosing", "training", "publishing", "snapshot", "training", "evaluation",
)  # fmt: skip


def inject(chaos: Chaos, *, minutes: float) -> None:
    """Everything at once, until enough processes were killed or the time is over."""
    chaos.faults.active = True
    threads = [
        threading.Thread(target=chaos.guarded, args=(work, chaos, *arguments), daemon=True)
        for work, *arguments in (
            (_annotate,),
            (_kill, "worker", chaos.plan.worker_seconds),
            (_kill, "web", chaos.plan.web_seconds),
            (_send_noise,),
            (_restart_label_studio,),
        )
    ]
    for thread in threads:
        thread.start()
    try:
        told = 0.0
        while chaos.kills() < chaos.plan.kills and chaos.seconds() < minutes * 60 and not chaos.over.is_set():
            time.sleep(0.2)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                newest = next(iter(reversed(chaos.cycles())), None)
                chaos.say(
                    f"{chaos.kills()} of {chaos.plan.kills} kills, "
                    f"{len(chaos.ledger.annotated())} annotated tasks, "
                    f"{f'cycle {newest.number}: {newest.stage}' if newest else 'no cycle yet'}"
                )
    finally:  # Ctrl-C too: nothing may be started while all is being stopped
        chaos.over.set()
        for thread in threads:
            thread.join()
    chaos.faults.active = False
    for name, proxy in chaos.proxies.items():
        chaos.events.tell("faults", proxy=name, counts=dict(proxy.counts))
    chaos.check_that_nothing_broke()


def _annotate(chaos: Chaos) -> None:
    rng = chaos.rng("pace")
    while not chaos.over.wait(rng.uniform(0.1, chaos.plan.annotator_seconds)):
        with chaos.quiet:
            chaos.annotators.act(may_annotate=chaos.waiting_tasks() < 2 * chaos.plan.batch_size)
            cycles = chaos.cycles()
            if cycles and cycles[-1].status == "failed":  # as its error asks people to do
                with suppress(httpx.HTTPError, TSPError):
                    chaos.annotators.press_start_training()


def _kill(chaos: Chaos, name: str, longest_seconds: float) -> None:
    """Kill a process again and again: after a drawn time, or in the next stage on the list, once it comes."""
    rng = chaos.rng(name)
    aims = itertools.cycle(_AIMS)
    while not chaos.over.is_set():
        if rng.random() > chaos.plan.early and not _wait_until_ready(chaos, name):
            return
        deadline = time.monotonic() + rng.uniform(0, longest_seconds)
        if name == "worker" and rng.random() < chaos.plan.aimed:
            aim = next(aims)
            while time.monotonic() < deadline + longest_seconds:
                if chaos.stage() == aim and chaos.is_ready(name):
                    break
                if chaos.over.wait(0.05):
                    return
            deadline = time.monotonic() + rng.uniform(0, 3.0 if aim == "training" else 0.6)
        while time.monotonic() < deadline:
            if chaos.over.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
                return
            if (status := chaos.backend.ended(name)) is not None:
                chaos.events.tell("violation", what=f"the {name} process ended by itself with status {status}")
                break
        chaos.events.tell("kill", process=name, stage=chaos.stage(), ready=chaos.is_ready(name))
        chaos.backend.kill(name)
        time.sleep(rng.uniform(0, 1.5))
        chaos.events.tell("start", process=name, log_bytes=chaos.log(name).stat().st_size)
        chaos.backend.start_one(name)


def _wait_until_ready(chaos: Chaos, name: str) -> bool:
    """False when the run is over before; a slow machine must not kill nothing but processes that start."""
    deadline = time.monotonic() + _START_SECONDS
    while not chaos.is_ready(name):
        if chaos.over.wait(0.2):
            return False
        if time.monotonic() > deadline:
            chaos.events.tell("violation", what=f"the {name} process is not ready after {_START_SECONDS:.0f} s")
            return True
    return True


def _restart_label_studio(chaos: Chaos) -> None:
    rng = chaos.rng("label studio")
    while not chaos.over.wait(0.5):
        due = (chaos.kills() + chaos.plan.kills_a_restart // 2) // chaos.plan.kills_a_restart
        if len(chaos.events.of("label studio stopped")) < due:
            with chaos.quiet:
                chaos.events.tell("label studio stopped")
                chaos.server.stop()
                time.sleep(rng.uniform(0, 5))
                chaos.server.start()
                chaos.events.tell("label studio started")


def _send_noise(chaos: Chaos) -> None:
    """Webhooks that are malformed or of other projects, straight to the web process: refused, never a 500."""
    rng = chaos.rng("noise")
    while not chaos.over.wait(rng.uniform(0.5, 5)):
        name, body, expected = rng.choice(noise())
        try:
            status = httpx.post(
                f"http://{HOST}:{chaos.settings.port}/webhook",
                content=body, headers={"Content-Type": "application/json"}, timeout=20,
            ).status_code  # fmt: skip
        except httpx.TransportError:
            continue  # killed at the moment
        chaos.events.tell("noise", name=name, status=status)
        if status != expected:
            chaos.events.tell("violation", what=f"a webhook ({name}) was answered {status}, expected {expected}")
