"""What a worker's look at a project costs when nothing has changed since the last one, and when people have annotated;
against one that lists all tasks, as the first look of a worker does."""

from argparse import Namespace
from contextlib import closing
from typing import Any

from ml_backend.claims import open_claims
from ml_backend.pool_looks import PoolLooks
from ml_backend.publish import import_missing
from ml_backend.reconcile import reconcile
from scripts.bench_label_studio import (
    Connected,
    Requests,
    connected,
    image_tasks,
    make_older,
    polygons,
)
from scripts.label_studio_server import LabelStudioServer

VERSION = "tsp-1-00000000"
ANNOTATED = 100  # at most, of the tasks; fewer than a batch, so that no cycle is planned
ANNOTATED_MEANWHILE = 10


def look(options: Namespace, server: LabelStudioServer | None = None) -> dict[str, Any]:
    """`options.tasks` tasks of the last month with a prediction of `options.regions` polygons each, all seen by the
    active version but for a few that are annotated. `ours` are the seconds of a look when nothing has changed,
    `theirs` those of the first one. RuntimeError when a look imports or sees anything."""
    with connected(server) as label_studio:
        count = min(ANNOTATED, options.tasks // 2)
        tasks = image_tasks(options.tasks)
        for number, task in enumerate(tasks[:count]):
            task["annotations"] = [{"result": polygons(1, number, origin="manual")}]
        project_id, key, task_ids = label_studio.new_project("look", tasks)
        unannotated = task_ids[count:]
        _see(label_studio, key, unannotated, options.regions)
        make_older(label_studio.server)
        with closing(open_claims(label_studio.service.settings)) as claims:
            looks = PoolLooks(label_studio.service, claims, None)
            first = _look(label_studio, key, looks)
            unchanged = _look(label_studio, key, looks)
            annotated = unannotated[:ANNOTATED_MEANWHILE]
            for task_id in annotated:
                label_studio.client.submit_annotation(task_id, result=polygons(1, task_id), lead_time_seconds=1)
            changed = _look(label_studio, key, looks)
        published = label_studio.client.model_versions(project_id)
        if published != {VERSION: len(unannotated)}:
            raise RuntimeError(f"expected {len(unannotated)} predictions of {VERSION}, got {published}")
    return {
        "ours": unchanged["seconds"],
        "theirs": first["seconds"],
        "ratio": round(unchanged["seconds"] / first["seconds"], 4),
        "first": first,
        "unchanged": unchanged,
        "changed": changed,
        "annotated_meanwhile": len(annotated),
        "tasks": options.tasks,
        "regions": options.regions,
    }


def _see(label_studio: Connected, key: str, task_ids: list[int], regions: int) -> None:
    """The version is active, has seen these tasks, and its predictions stand in Label Studio."""
    service = label_studio.service
    label_studio.add_version(key, VERSION, task_ids, regions)
    service.registry.activate(key, VERSION)
    if (imported := import_missing(service, key, VERSION)) != len(task_ids):
        raise RuntimeError(f"expected {len(task_ids)} predictions, Label Studio has {imported}")


def _look(label_studio: Connected, key: str, looks: PoolLooks) -> dict[str, float]:
    """Both parts of a worker's look: what has been annotated, and what of the pool has not been seen."""
    with Requests(label_studio) as measured:
        decision = reconcile(label_studio.service, key)
        looks.note_change(key)
        looks.begin_if_due(key, 0.0)
        while looks.is_going(key):
            looks.go_on(key)
    if decision.start:
        raise RuntimeError(f"expected no cycle, but one starts: {decision.reason}")
    return measured.costs
