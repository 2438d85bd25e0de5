"""After the last plug: without faults, everything that was begun must come to its end."""

import time
from collections.abc import Callable
from typing import Any

from ml_backend.db import UNFINISHED, ProjectRow
from model.registry import Registry
from scripts import chaos_checks as checks
from scripts.chaos_plan import ChaosError
from scripts.chaos_run import Chaos

_SECONDS = 900.0


def settle(chaos: Chaos) -> None:
    """Without faults: all that was begun ends; one more cycle is asked for; every task gets its prediction."""
    chaos.say("no more faults; waiting until all work is done")
    chaos.annotators.settle()
    last = _wait(chaos, lambda: _resting_cycle(chaos), "the last cycle does not end")
    chaos.events.tell("last press", after=last)
    chaos.annotators.press_start_training()
    _wait(chaos, lambda: _resting_cycle(chaos, above=last), "the cycle that was asked for does not end")
    _wait(chaos, lambda: _everything_is_predicted(chaos), "tasks have no prediction")
    chaos.events.tell("settled")
    chaos.watcher.stop()
    chaos.watching.join()


def _resting_cycle(chaos: Chaos, *, above: int = 0) -> int | None:
    """The number of the newest cycle when all are over and no batch is full."""
    cycles = chaos.cycles()
    if not cycles or cycles[-1].number <= above or any(cycle.status in UNFINISHED for cycle in cycles):
        return None
    with chaos.database.session() as session:
        row = session.get_one(ProjectRow, chaos.key)
        is_due = row.new_annotated >= chaos.plan.batch_size or row.annotated != len(chaos.ledger.annotated())
        is_old = checks.unix(row.checked_at) < max(time.time() - 15, checks.unix(cycles[-1].finished_at or ""))
    return None if is_due or is_old else cycles[-1].number


def _everything_is_predicted(chaos: Chaos) -> bool:
    version = Registry(chaos.settings.model_dir / "versions").active(chaos.key)
    wanted = set(chaos.ledger.records()) - chaos.ledger.annotated()
    return version is not None and (not wanted or wanted <= chaos.client.predicted_task_ids(chaos.project_id, version))


def _wait(chaos: Chaos, until: Callable[[], Any], trouble: str) -> Any:
    """What `until` answers in the end. Trouble is a violation, and nothing more can be checked."""
    deadline = time.monotonic() + _SECONDS
    while not (answer := until()):
        for name in ("web", "worker"):
            if (status := chaos.backend.ended(name)) is not None:
                raise ChaosError(f"{trouble}: the {name} process ended by itself with status {status}")
        if time.monotonic() > deadline:
            newest = chaos.cycles()[-1:]
            described = [(cycle.number, cycle.status, cycle.stage, cycle.error) for cycle in newest]
            raise ChaosError(f"{trouble} within {_SECONDS:.0f} s: {described}")
        time.sleep(0.5)
    return answer
