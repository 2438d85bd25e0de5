"""What reading a project's annotations costs a cycle: the first time, when a few of them have changed since the cycle
before, and when none has; against reading everything each time."""

import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from ml_backend.annotations import AnnotatedTasks
from scripts.bench_label_studio import Connected, Requests, connected, image_tasks, make_older, polygons
from scripts.label_studio_server import LabelStudioServer

CHANGED, DELETED = 0.01, 0.001  # of all tasks


def ingest(options: Namespace, server: LabelStudioServer | None = None) -> dict[str, Any]:
    """`options.tasks` tasks with one annotation of `options.regions` polygons each, made within the last month.
    `ours` are the seconds of a read after `CHANGED` of them were edited and `DELETED` of them deleted, `theirs` those
    of listing and exporting all.
    RuntimeError when both do not read the same."""
    with connected(server) as label_studio:
        began = time.perf_counter()
        tasks = [
            {**task, "annotations": [{"result": polygons(options.regions, number, origin="manual")}]}
            for number, task in enumerate(image_tasks(options.tasks))
        ]
        project_id, key, task_ids = label_studio.new_project("ingest", tasks)
        make_older(label_studio.server)
        prepared = time.perf_counter() - began
        path = label_studio.service.annotations_file(key)
        first, _ = _read(label_studio, project_id, path)
        unchanged, _ = _read(label_studio, project_id, path)
        edited, deleted = _change(label_studio, task_ids)
        changed, ours = _read(label_studio, project_id, path)
        everything, theirs = _read_everything(label_studio, project_id)
        if ours != theirs or len(ours) != options.tasks - deleted:
            raise RuntimeError(f"{len(ours)} tasks were read, {len(theirs)} are there; expected the same ones")
        megabytes = path.stat().st_size / 1e6
    return {
        "ours": changed["seconds"],
        "theirs": everything["seconds"],
        "ratio": round(changed["seconds"] / everything["seconds"], 3),
        "first": first,
        "unchanged": unchanged,
        "changed": changed,
        "everything": everything,
        "edited": edited,
        "deleted": deleted,
        "tasks": options.tasks,
        "regions": options.regions,
        "kept_megabytes": round(megabytes, 1),
        "prepared_seconds": round(prepared, 1),
    }


def _read(label_studio: Connected, project_id: int, path: Path) -> tuple[dict[str, float], dict[int, Any]]:
    with Requests(label_studio) as measured:
        found = _essence(AnnotatedTasks(label_studio.client, project_id, path))
    return measured.costs, found


def _read_everything(label_studio: Connected, project_id: int) -> tuple[dict[str, float], dict[int, Any]]:
    client = label_studio.client
    with Requests(label_studio) as measured:
        ids = sorted(client.annotated_task_ids(project_id))
        found = _essence(client.annotated_tasks(project_id, ids))
    return measured.costs, found


def _essence(tasks: Iterable[Mapping[str, Any]]) -> dict[int, Any]:
    """Of each task, what tells an annotation from the same one before it was edited."""
    return {
        task["id"]: [(a["id"], a["updated_at"], len(a["result"]), a["result"][:1]) for a in task["annotations"]]
        for task in tasks
    }


def _change(label_studio: Connected, task_ids: list[int]) -> tuple[int, int]:
    """Edit the annotations of some tasks and delete others; how many of each."""
    chosen = np.random.default_rng(0).permutation(task_ids).tolist()
    edited, deleted = max(1, round(CHANGED * len(chosen))), max(1, round(DELETED * len(chosen)))
    headers = {"Authorization": f"Token {label_studio.server.token}"}
    with httpx.Client(base_url=label_studio.server.url, headers=headers, timeout=60.0) as api:
        for task_id in chosen[:edited]:
            (annotation,) = api.get(f"/api/tasks/{task_id}/annotations/").raise_for_status().json()
            body = {"result": annotation["result"][1:]}
            api.patch(f"/api/annotations/{annotation['id']}/", json=body).raise_for_status()
        for task_id in chosen[edited : edited + deleted]:
            api.delete(f"/api/tasks/{task_id}/").raise_for_status()
    return edited, deleted
