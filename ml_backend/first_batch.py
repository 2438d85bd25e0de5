"""The first batch, which is chosen before there is a version, as the dashboard shows it; cold_start.py chooses it."""

import json
from dataclasses import dataclass
from pathlib import Path

from ml_backend.ls_format import Json
from ml_backend.service import Service


@dataclass(frozen=True, kw_only=True)
class FirstBatch:
    """The tasks that people get first, in this order. Once it `is_full` it never changes; before that, images beyond
    the `looked_at` that were known when it was chosen lead to another one."""

    version: str
    tasks: tuple[int, ...]
    is_full: bool
    looked_at: int = 0  # older releases did not say
    is_published: bool = False  # from then on, people may choose what Label Studio shows


def first_batch(service: Service, project_key: str) -> FirstBatch | None:
    """The batch that was chosen before there was a version, if one was."""
    path = batch_file(service, project_key)
    if not path.exists():
        return None
    frozen = json.loads(path.read_text())
    frozen.pop("newest_task", None)  # which those wrote instead
    return FirstBatch(**{**frozen, "tasks": tuple(frozen["tasks"])})


def first_batch_progress(service: Service, project_key: str) -> Json | None:
    """For the dashboard: {"done", "total"} images looked at, how many "tasks" were chosen, and whether people get them
    ("is_published"); None before anything was begun."""
    path, batch = progress_file(service, project_key), first_batch(service, project_key)
    if not path.exists() and batch is None:
        return None
    looked_at = json.loads(path.read_text()) if path.exists() else {"done": 0, "total": 0}
    tasks, is_published = (len(batch.tasks), batch.is_published) if batch else (0, False)
    return {**looked_at, "tasks": tasks, "is_published": is_published}


def progress_file(service: Service, project_key: str) -> Path:
    """How many images were looked at."""
    return service.scores_folder(project_key) / "cold-start-progress.json"


def batch_file(service: Service, project_key: str) -> Path:
    """The batch that was chosen."""
    return service.scores_folder(project_key) / "cold-start.json"
