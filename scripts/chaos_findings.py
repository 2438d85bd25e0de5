"""What a chaos run has found: every check, and what was done."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from ml_backend.db import CycleRow
from model.registry import Registry
from scripts import chaos_checks as checks
from scripts.chaos_ledger import exported
from scripts.chaos_plan import ChaosError
from scripts.chaos_report import machine
from scripts.chaos_run import Chaos


def findings(chaos: Chaos) -> dict[str, Any]:
    """All checks, and what was done."""
    chaos.check_that_nothing_broke()
    cycles = chaos.cycles()
    last = cycles[-1]
    folder = chaos.settings.model_dir / "cycles" / chaos.key
    snapshots = {
        cycle.number: checks.read_snapshot(folder / str(cycle.number))
        for cycle in cycles
        if (folder / str(cycle.number) / "recipe.json").exists()
    }
    if last.number not in snapshots:
        raise ChaosError(f"the last cycle, without any fault, took no snapshot: {last.status}, {last.error}")
    there = exported(chaos.client, chaos.api, chaos.project_id, chaos.truth)
    steps = checks.count_steps(chaos.log("worker").read_text(errors="replace"))
    registry = Registry(chaos.settings.model_dir / "versions")
    predictions, prediction_violations = _predictions(chaos)
    again, different = _train_again(chaos, cycles)
    violations = {
        "watcher": [event["what"] for event in chaos.events.of("violation")],
        "cycles": checks.check_cycles(cycles, chaos.workflows(), chaos.plan.batch_size),
        "snapshots": checks.check_snapshots(cycles, snapshots, chaos.ledger),
        "label studio": checks.check_label_studio(there, chaos.ledger),
        "last cycle": checks.check_last_cycle(last, snapshots[last.number], there, chaos.ledger),
        "steps": checks.check_steps(steps, checkpoint_steps=chaos.plan.checkpoint_steps),
        "registry": checks.check_registry(registry, chaos.key, cycles, folder, chaos.watcher.digests),
        "predictions": prediction_violations,
        "weights": different,
    }
    kills = chaos.events.of("kill")
    return {
        "plan": asdict(chaos.plan),
        "command": f"python -m scripts.chaos --kills {chaos.plan.kills} --seed {chaos.plan.seed} --out <folder>",
        "machine": machine(),
        "load_average_before": [event["load_average"] for event in chaos.events.of("session")],
        "minutes": round(chaos.seconds() / 60, 1),
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
        "label_studio_restarts": len(chaos.events.of("label studio started")),
        "faults": {name: chaos.fault_counts(name) for name in chaos.proxies},
        "noise": _counted(f"{event['name']}: {event['status']}" for event in chaos.events.of("noise")),
        "annotators": chaos.ledger.counts,
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
        "looks_of_the_watcher": chaos.watcher.looks,
        "switches": [
            {name: event[name] for name in ("when", "version", "predictions", "expected", "scored")}
            for event in chaos.events.of("switch")
        ],
        "trained_again": again,
        "violations": {name: found for name, found in violations.items() if found},
    }  # fmt: skip


def _predictions(chaos: Chaos) -> tuple[dict[str, Any], list[str]]:
    """What Label Studio has for the active version, and what is wrong with it."""
    version = str(Registry(chaos.settings.model_dir / "versions").active(chaos.key))
    counts = chaos.client.model_versions(chaos.project_id)
    tasks = chaos.client.predicted_task_ids(chaos.project_id, version)
    open_tasks = set(chaos.ledger.records()) - chaos.ledger.annotated()
    shown = chaos.client.project(chaos.project_id).model_version
    about = {"version": version, "predictions": counts.get(version, 0), "predicted_tasks": len(tasks)}
    return (
        {**about, "tasks_without_annotation": len(open_tasks)},
        checks.check_predictions(version, shown=shown, counts=counts, predicted=tasks, open_tasks=open_tasks),
    )


def _train_again(chaos: Chaos, cycles: list[CycleRow]) -> tuple[list[str], list[str]]:
    """Once more from the frozen snapshots, each in a new process without interruption; the versions, and which of
    them are different."""
    done = [cycle for cycle in cycles if cycle.status == "done"][-chaos.plan.trained_again :]
    found: list[str] = []
    for cycle in done:
        chaos.say(f"cycle {cycle.number} is trained once more")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found += pool.submit(
                checks.train_again, dict(chaos.environment), chaos.key, cycle.number, str(cycle.version),
                chaos.folder / "again",
            ).result()  # fmt: skip
    return [str(cycle.version) for cycle in done], found


def _counted(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))
