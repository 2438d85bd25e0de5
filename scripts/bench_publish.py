"""A version's predictions to Label Studio: our publication, against the plain call of the bulk import with the same
payload, ready made, and nothing around it."""

import json
import time
from argparse import Namespace
from collections import Counter
from typing import Any

import httpx
import numpy as np

from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow
from ml_backend.publish import publish as publish_version
from scripts.bench_label_studio import (
    Connected,
    connected,
    cpu_seconds,
    image_tasks,
    peak_memory_mb,
    polygons,
    reset_peak_memory,
)
from scripts.label_studio_server import LabelStudioServer

GOAL = 1.2
MOST_ROUNDS = 2
VERSION, THEIRS = "tsp-1-00000000", "plain"
_LARGEST_BYTES = 240_000_000  # Label Studio refuses requests of more than 250 MiB
_LONG_SECONDS = 3600.0


def publish(options: Namespace, server: LabelStudioServer | None = None) -> dict[str, Any]:
    """`options.tasks` predictions of `options.regions` polygons each. Seconds are wall time: Label Studio does most of
    the work, in a process of its own; `cpu_ratio` compares the CPU seconds of both processes together. Every round
    has two new projects; which goes first alternates, and the second begins with the memory that Label Studio still
    holds of the first, `label_studio_memory_before_mb`. `options.label_studio` are variables of the Label Studio that
    is started."""
    environment = dict(options.label_studio)
    with connected(server, environment) as label_studio:
        pairs = []
        for number in range(min(options.rounds, MOST_ROUNDS)):
            sides = (_ours, _theirs) if number % 2 else (_theirs, _ours)
            seconds = {side: side(label_studio, options.tasks, options.regions) for side in sides}
            pairs.append((seconds[_ours], seconds[_theirs]))
    ours, theirs = zip(*pairs, strict=True)
    return {
        "ours": round(float(np.median([one["seconds"] for one in ours])), 2),
        "theirs": round(float(np.median([one["seconds"] for one in theirs])), 2),
        "ratio": round(float(np.median([a["seconds"] / b["seconds"] for a, b in pairs])), 3),
        "goal": GOAL,
        "cpu_ratio": round(float(np.median([_cpu(a) / _cpu(b) for a, b in pairs])), 3),
        "rounds": [{"ours": a, "theirs": b} for a, b in pairs],
        "tasks": options.tasks,
        "regions": options.regions,
        "label_studio": environment,
    }


def _ours(label_studio: Connected, tasks: int, regions: int) -> dict[str, Any]:
    """Publishing a version from its scores file, until the queue has switched to it."""
    service = label_studio.service
    project_id, key, task_ids = label_studio.new_project("ours", image_tasks(tasks))
    label_studio.add_version(key, VERSION, task_ids, regions)
    with service.database.session() as session:
        session.add(CycleRow(project_key=key, number=1))
    log = CycleLog(service.database, key, 1)
    log.begin()
    measured = _measured(label_studio, lambda: publish_version(service, key, VERSION, log))
    log.finish("done")
    _check(label_studio, project_id, VERSION, task_ids)
    if label_studio.client.project(project_id).model_version != VERSION:
        raise RuntimeError(f"project {project_id}: the queue has not switched to {VERSION}")
    return measured


def _theirs(label_studio: Connected, tasks: int, regions: int) -> dict[str, Any]:
    """The bulk import, in as few requests as Label Studio takes."""
    project_id, _, task_ids = label_studio.new_project("theirs", image_tasks(tasks))
    bodies: list[list[bytes]] = [[]]
    size = 0
    for task_id in task_ids:
        score = float(np.random.default_rng(task_id).uniform())
        one = {"task": task_id, "model_version": THEIRS, "score": score, "result": polygons(regions, task_id)}
        part = json.dumps(one, separators=(",", ":")).encode()
        if size + len(part) > _LARGEST_BYTES:
            bodies.append([])
            size = 0
        bodies[-1].append(part)
        size += len(part) + 1
    requests = [b"[" + b",".join(parts) + b"]" for parts in bodies]
    url = f"{label_studio.server.url}/api/projects/{project_id}/import/predictions"
    headers = {"Authorization": f"Token {label_studio.server.token}", "Content-Type": "application/json"}
    created = []

    def send() -> None:
        for body in requests:
            answer = httpx.post(url, content=body, headers=headers, timeout=_LONG_SECONDS)
            created.append(answer.raise_for_status().json()["created"])

    measured = _measured(label_studio, send)
    if sum(created) != tasks:
        raise RuntimeError(f"Label Studio created {sum(created)} of {tasks} predictions")
    return {**measured, "requests": len(requests), "megabytes": round(sum(map(len, requests)) / 1e6, 1)}


def _measured(label_studio: Connected, work: Any) -> dict[str, Any]:
    process = label_studio.server.process_id
    reset_peak_memory(process)
    memory = peak_memory_mb(process)
    ours, theirs, began = time.process_time(), cpu_seconds(process), time.perf_counter()
    work()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "our_cpu_seconds": round(time.process_time() - ours, 2),
        "label_studio_cpu_seconds": round(cpu_seconds(process) - theirs, 2),
        "label_studio_memory_before_mb": memory,
        "label_studio_peak_memory_mb": peak_memory_mb(process),
    }


def _cpu(one: dict[str, Any]) -> float:
    """CPU seconds of both processes, which other work on the machine does not lengthen."""
    return float(one["our_cpu_seconds"] + one["label_studio_cpu_seconds"])


def _check(label_studio: Connected, project_id: int, version: str, task_ids: list[int]) -> None:
    """RuntimeError unless each task has exactly one prediction of the version."""
    stored = Counter(label_studio.client.model_versions(project_id))
    there = label_studio.client.predicted_task_ids(project_id, version)
    if stored[version] != len(task_ids) or there != set(task_ids):
        raise RuntimeError(f"{version}: {stored[version]} predictions of {len(there)} of {len(task_ids)} tasks")
