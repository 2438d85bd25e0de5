"""The report of a chaos run, as JSON and for people."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from model.bfloat16 import has_bfloat16
from model.files import write_bytes, write_json

_ROOT = Path(__file__).resolve().parent.parent


def load_average() -> list[float]:
    """Of 1, 5 and 15 minutes."""
    return [round(load, 1) for load in os.getloadavg()]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "bfloat16": has_bfloat16(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "dbos": version("dbos"),
        "commit": commit(),
    }


def _cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def commit(folder: Path = _ROOT) -> str | None:
    """The one whose code runs, with "+changes" if a file of the code differs; None outside of a repository. Results
    that were kept meanwhile, in docs/, are no changes."""
    try:
        name = _git(folder, "rev-parse", "--short", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--", ".", ":!docs")
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The one line that says it all."""
    names = (
        "kills", "kills_by_process", "cycles", "cycles_by_status", "annotated_in_label_studio",
        "annotated_in_last_cycle", "lost", "duplicated", "minutes",
    )  # fmt: skip
    return {
        **{name: report[name] for name in names},
        "seed": report["plan"]["seed"],
        "steps_repeated": report["steps"]["repeated"],
        "most_steps_repeated_at_once": report["steps"]["worst"],
        "violations": sum(len(found) for found in report["violations"].values()),
    }


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """`report.json` and `report.md`."""
    write_json(folder / "report.json", report)
    write_bytes(folder / "report.md", in_words(report).encode())


def in_words(report: Mapping[str, Any]) -> str:
    """The report for people."""
    steps, predictions, plan = report["steps"], report["predictions"], report["plan"]
    violations = [f"- {kind}: {what}" for kind, found in report["violations"].items() for what in found]
    equal = len(report["trained_again"]) - len(report["violations"].get("weights", []))
    failed = [f"- cycle {number}: {error}" for number, error in report["failed"].items()]
    facts = [
        ("minutes", report["minutes"]),
        ("load averages (1, 5, 15 minutes) when it was started or went on",
         "; ".join(", ".join(map(str, loads)) for loads in report["load_average_before"])),
        ("processes killed (`kill -9`)", _listed(report["kills_by_process"])),
        ("Label Studio stopped and started", report["label_studio_restarts"]),
        ("cycles, of these asked for", f"{report['cycles']}, {report['cycles_asked_for']}"),
        ("how they ended", _listed(report["cycles_by_status"])),
        ("what annotators did", _listed(report["annotators"])),
        ("annotated tasks in Label Studio, used by the last cycle",
         f"{report['annotated_in_label_studio']}, {report['annotated_in_last_cycle']}"),
        ("annotations lost, duplicated", f"{report['lost']}, {report['duplicated']}"),
        ("tasks without annotation, their predictions",
         f"{predictions['tasks_without_annotation']}, {predictions['predictions']}"),
        ("training steps, of these repeated after kills", f"{steps['done']}, {steps['repeated']}"),
        ("most steps repeated at once (a checkpoint each)", f"{steps['worst']} ({plan['checkpoint_steps']})"),
        ("versions that were trained again without interruption: equal in every bit",
         f"{len(report['trained_again'])}: {equal}"),
        ("switches of the queue that were watched", len(report["switches"])),
        ("looks of the watcher", report["looks_of_the_watcher"]),
    ]  # fmt: skip
    tables = [
        ("Worker killed while it was", report["kills_by_stage"]["worker"]),
        ("Web process killed while the worker was", report["kills_by_stage"]["web"]),
        ("Webhooks spoiled", report["faults"]["webhook"]),
        ("Requests to Label Studio spoiled", report["faults"]["api"]),
        ("Webhooks of nobody, and the answers", report["noise"]),
    ]
    lines = [
        "# Chaos",
        "",
        f"`{report['command']}`",
        "",
        f"Seed {plan['seed']}; {', '.join(f'{name} {value}' for name, value in report['machine'].items())}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "## Violations",
        "",
        *(violations or ["None."]),
        "",
        "## Failed cycles",
        "",
        *(failed or ["None."]),
    ]
    for title, counts in tables:
        lines += ["", f"## {title}", "", "| | times |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in counts.items()]
    return "\n".join(lines) + "\n"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
