"""The whole loop with real parts: Label Studio, two annotator accounts, our two processes, real training.

On CT phantoms; `--e2e-data <COCO folder>` runs the same on crops of another set.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from model.dataset import LabeledSet, read_coco
from model.geometry import is_simple_polygon
from scripts.backend_processes import BackendProcesses
from scripts.crops import write_crops
from scripts.label_studio_server import LabelStudioServer, free_port
from scripts.make_phantoms import make_phantoms
from scripts.oracle import Oracle, Served
from tests.label_studio import create_annotator, raw_api

pytestmark = pytest.mark.label_studio

IMAGES, BATCH, SIZE = 40, 10, 96
CYCLE_SECONDS = 300


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> LabeledSet:
    folder = tmp_path_factory.mktemp("e2e") / "images"
    if data := pytestconfig.getoption("--e2e-data"):
        write_crops(read_coco(Path(data) / "annotations.json"), folder, count=IMAGES, size=SIZE)
    else:
        make_phantoms(folder, images=IMAGES, size=SIZE, seed=1)
    return read_coco(folder / "annotations.json")


@dataclass
class Loop:
    """A connected project with two annotators."""

    server: LabelStudioServer
    project_id: int
    owner: LabelStudioClient
    clients: tuple[LabelStudioClient, LabelStudioClient]
    annotators: tuple[Oracle, Oracle]
    backend: BackendProcesses
    truth: LabeledSet

    def status(self) -> dict[str, Any]:
        projects = httpx.get(f"{self.backend.url}/status", timeout=30).json()["projects"]
        return next(project for project in projects if project["id"] == self.project_id)

    def wait_for(self, what: Callable[[dict[str, Any]], bool], *, seconds: float = CYCLE_SECONDS) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not what(status := self.status()):
            self.backend.check()
            assert time.monotonic() < deadline, f"not within {seconds} s: {status}"
            time.sleep(0.3)
        return status

    def wait_for_cycle(self, number: int) -> dict[str, Any]:
        """The finished cycle."""
        status = self.wait_for(lambda s: any(c["number"] == number and c["finished_at"] for c in s["cycles"]))
        cycle = next(cycle for cycle in status["cycles"] if cycle["number"] == number)
        assert cycle["status"] == "done", cycle["error"]
        return cycle

    def predictions(self, version: str) -> dict[int, list[dict[str, Any]]]:
        """The predictions of a version by task."""
        by_task: dict[int, list[dict[str, Any]]] = {}
        with raw_api(self.server) as api:
            for task in self.owner.tasks(self.project_id):
                rows = api.get("/api/predictions/", params={"task": task.id}).json()
                by_task[task.id] = [row for row in rows if row["model_version"] == version]
        return by_task


@pytest.fixture(scope="module")
def loop(
    label_studio: LabelStudioServer, truth: LabeledSet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loop]:
    folder = tmp_path_factory.mktemp("backend")
    second = create_annotator(label_studio, "second@example.com")
    settings = {
        "LABEL_STUDIO_URL": label_studio.url,
        "LABEL_STUDIO_API_KEY": label_studio.token,
        "MODEL_DIR": str(folder / "models"),
        "PORT": str(free_port()),
        "TSP_BATCH_SIZE": str(BATCH),
        "TSP_IMAGE_SIZE": str(SIZE),
        "TSP_EPOCHS": "8",
        "TSP_CHECKPOINT_STEPS": "4",
        "TSP_RECONCILE_SECONDS": "3600",  # so that it is the webhook that starts a cycle
    }
    with (
        LabelStudioClient(label_studio.url, label_studio.token) as owner,
        LabelStudioClient(label_studio.url, second) as other,
        BackendProcesses(settings=settings, log_dir=folder / "logs") as backend,
    ):
        labels = "".join(f'<Label value="{name}"/>' for name in truth.class_names)
        config = (
            f'<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i">{labels}</PolygonLabels></View>'
        )
        project = owner.create_project(title="the loop", label_config=config)
        owner.update_project(project.id, sampling=UNCERTAINTY_SAMPLING)
        owner.import_files(project.id, [image.path for image in truth.images])
        owner.connect_backend(project.id, url=backend.url, title="TSP")
        annotators = Oracle(owner, project.id, truth), Oracle(other, project.id, truth)
        yield Loop(label_studio, project.id, owner, (owner, other), annotators, backend, truth)


def test_the_loop_from_the_first_batch_to_the_third_cycle(loop: Loop) -> None:
    """One story, in order: each part stands on what the one before has done."""
    _label_first_batch(loop)
    first = loop.wait_for_cycle(1)
    _check_metrics(first)
    _check_published(loop, first["version"])

    served = _label_second_batch_with_two_annotators(loop)
    _check_order(loop, served, first["version"])
    _kill_worker_while_it_trains(loop)
    second = loop.wait_for_cycle(2)
    _check_metrics(second)
    assert second["facts"]["annotated"] == 2 * BATCH
    _check_published(loop, second["version"])
    assert not any(loop.predictions(first["version"]).values()), "predictions of the old version are left"

    _check_new_tasks_join_the_queue(loop, second["version"])
    _press_start_training(loop)
    third = loop.wait_for_cycle(3)
    assert third["facts"]["annotated"] == 2 * BATCH
    assert [cycle["number"] for cycle in loop.status()["cycles"]] == [3, 2, 1]


def _label_first_batch(loop: Loop) -> None:
    for _ in range(BATCH):
        served = loop.annotators[0].annotate_next()
        assert served is not None
        assert served.model_version in (None, "untrained")


def _check_metrics(cycle: dict[str, Any]) -> None:
    facts = cycle["facts"]
    assert facts["training"] + facts["validation"] + facts["problem_count"] == facts["annotated"]
    assert facts["problem_count"] == 0, facts["problems"]
    metrics = facts["metrics"]
    assert metrics["images"] == facts["validation"]
    if metrics["instances"]:
        assert 0 <= metrics["map_50_95"] <= metrics["map_50"] <= 1


def _check_published(loop: Loop, version: str) -> None:
    """Each unlabelled task has exactly one prediction of the version, valid in every respect, and the queue uses it."""
    project = loop.owner.project(loop.project_id)
    assert (project.model_version, project.sampling) == (version, UNCERTAINTY_SAMPLING)
    annotated = loop.owner.annotated_task_ids(loop.project_id)
    regions = []
    for task_id, rows in loop.predictions(version).items():
        assert len(rows) == (0 if task_id in annotated else 1)
        for row in rows:
            assert 0 <= row["score"] <= 1
            assert len({region["id"] for region in row["result"]}) == len(row["result"])
            regions += row["result"]
    for region in regions:
        points = np.array(region["value"]["points"])
        assert len(points) >= 3
        assert points.min() >= 0
        assert points.max() <= 100
        assert is_simple_polygon(points)
        assert region["value"]["polygonlabels"][0] in loop.truth.class_names
        assert (region["original_width"], region["original_height"]) == (SIZE, SIZE)
        assert 0 <= region["score"] <= 1
        assert "certainty" in region["meta"]["text"][0]


def _label_second_batch_with_two_annotators(loop: Loop) -> list[Served]:
    """Both have a task open at the same time, then both submit, until the batch is complete.

    They ask one after the other: what happens when they ask in the same instant depends on Label Studio's database
    (test_two_annotators.py).
    """
    served: list[Served] = []
    for _ in range(BATCH // 2):
        tasks = [client.next_task(loop.project_id) for client in loop.clients]
        served += [annotator.annotate(task) for annotator, task in zip(loop.annotators, tasks, strict=True)]
    return served


def _check_order(loop: Loop, served: list[Served], version: str) -> None:
    """Strictly by S, no task twice, and what was not served scores no lower."""
    annotated = loop.owner.annotated_task_ids(loop.project_id)
    assert {s.model_version for s in served} == {version}
    assert len({s.task_id for s in served}) == len(served)
    scores = [s.score for s in served]
    assert scores == sorted(scores)
    left = [
        rows[0]["score"] for task_id, rows in loop.predictions(version).items() if rows and task_id not in annotated
    ]
    assert min(left) >= scores[-1]


def _kill_worker_while_it_trains(loop: Loop) -> None:
    """As if the plug was pulled: the cycle must go on where its last checkpoint was."""
    loop.wait_for(
        lambda s: (
            s["cycles"][0]["number"] == 2 and "training" in s["cycles"][0]["stage"] and s["cycles"][0]["done"] >= 4
        )
    )
    loop.backend.kill("worker")
    loop.backend.start_one("worker")


def _check_new_tasks_join_the_queue(loop: Loop, version: str) -> None:
    new = loop.owner.import_files(loop.project_id, [loop.truth.images[0].path])
    deadline = time.monotonic() + 60
    while not set(new) <= loop.owner.predicted_task_ids(loop.project_id, version):
        assert time.monotonic() < deadline, "the new task got no prediction"
        time.sleep(0.5)


def _press_start_training(loop: Loop) -> None:
    """The button in Label Studio: it must answer at once and start a cycle without a full batch."""
    backend = loop.owner.ml_backends(loop.project_id)[0]
    started = time.monotonic()
    with raw_api(loop.server) as api:
        assert api.post(f"/api/ml/{backend.id}/train").is_success
    assert time.monotonic() - started < 5
