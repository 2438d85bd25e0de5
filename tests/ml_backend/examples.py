"""Settings, tiny networks, tasks and cycles that the tests of the service share."""

import base64
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import cv2

from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.pool import is_validation
from ml_backend.service import Service
from ml_backend.settings import Settings
from scripts.make_phantoms import phantom
from scripts.tiny_version import tiny_version
from tests.label_studio import png_bytes

NOWHERE = "http://127.0.0.1:1"  # nothing listens there
UID = "7.1700000000"
KEY = "7-1700000000"
VERSION = "tsp-1-00000000"
VALIDATION_FRACTION = 0.3
UNREADABLE = "data:image/png;base64,bm90IGFuIGltYWdl"


def settings(folder: Path, **environment: Any) -> Settings:
    """Settings by the names of their variables; quick to train with, and Label Studio is away."""
    quick = {
        "MODEL_DIR": folder / "models",
        "LABEL_STUDIO_URL": NOWHERE,
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "TSP_WEIGHTS": "none",
        "TSP_IMAGE_SIZE": 64,
        "TSP_EPOCHS": 1,
        "TSP_DETECTIONS": 10,
        "TSP_VALIDATION_FRACTION": VALIDATION_FRACTION,
    }
    return Settings(**{**quick, **environment})


def add_version(
    service: Service,
    key: str,
    version: str = VERSION,
    *,
    class_names: Sequence[str] = ("cell", "lesion"),
    strategy: str = "tsp",
) -> None:
    """Put a tiny network that nobody has trained into the registry."""
    service.registry.add(key, *tiny_version(version, class_names, strategy=strategy))


def data_uri(png: bytes) -> str:
    """An image that lies in the task itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def grey_images(count: int, *, validation: bool = False) -> list[bytes]:
    """Different PNGs, all of them in the validation split or none."""
    every = (png_bytes(width=64, height=48, shade=shade) for shade in range(256))
    chosen = (png for png in every if is_validation(sha256(png), VALIDATION_FRACTION) is validation)
    return list(islice(chosen, count))


def phantom_images(count: int, *, validation: bool = False) -> list[bytes]:
    """Different CT phantoms of 64 x 64 pixels, all of them in the validation split or none."""
    every = (cv2.imencode(".png", phantom(seed, 64).image)[1].tobytes() for seed in range(1000))
    chosen = (png for png in every if is_validation(sha256(png), VALIDATION_FRACTION) is validation)
    return list(islice(chosen, count))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def import_images(client: LabelStudioClient, project: Project, images: Sequence[bytes | str]) -> list[int]:
    """One task for each image (or address); returns their ids."""
    uris = [image if isinstance(image, str) else data_uri(image) for image in images]
    return client.import_tasks(project.id, [{"data": {"image": uri}} for uri in uris])


def served_order(client: LabelStudioClient, project: Project) -> list[int]:
    """The tasks in the order in which an annotator gets them; all of them are annotated afterwards."""
    order = []
    while (task := client.next_task(project.id)) is not None:
        order.append(task["id"])
        client.submit_annotation(task["id"], result=[], lead_time_seconds=1)
    return order


def key_of(service: Service, project: Project) -> str:
    """The project's key; from now on the service knows the project."""
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    remember_project(service.database, name)
    return name.key


def begin_cycle(service: Service, key: str, number: int = 1) -> CycleLog:
    """A cycle that has started, for stages to write into."""
    with service.database.session() as session:
        session.add(CycleRow(project_key=key, number=number))
    log = CycleLog(service.database, key, number)
    log.begin()
    return log


def cycle_row(service: Service, key: str, number: int = 1) -> CycleRow:
    with service.database.session() as session:
        return session.get_one(CycleRow, (key, number))


@contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Another process keeps these SQLite files from being written."""
    code = (
        "import sqlite3, sys\n"
        "held = [sqlite3.connect(path, timeout=60, isolation_level=None) for path in sys.argv[1:]]\n"
        "for connection in held: connection.execute('BEGIN IMMEDIATE')\n"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield  # the end of the block closes its input, so it ends
