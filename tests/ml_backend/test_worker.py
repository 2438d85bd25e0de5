"""The worker as a process of its own, with a real database and a real Label Studio."""

import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import torch
from fastapi.testclient import TestClient

from ml_backend.app import create_app
from ml_backend.db import ActivationRow, CycleRow
from ml_backend.durable_cycles import free_frames
from ml_backend.errors import SettingsError
from ml_backend.forget import forget, forgotten_projects
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.worker import check_torch, check_weights, is_queue_of
from model.errors import DiskFullError
from model.files import read_tensors
from model.registry import Registry
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import HOST, LabelStudioServer, free_port
from scripts.tiny_version import tiny_version
from tests.label_studio import POLYGON_CONFIG, polygon_result, raw_api
from tests.ml_backend.examples import (
    KEY,
    NOWHERE,
    UID,
    VERSION,
    add_version,
    grey_images,
    import_images,
    key_of,
    phantom_images,
    settings,
)
from tests.postgres import Postgres

SECONDS = 120.0


def environment(folder: Path, **others: str) -> dict[str, str]:
    """Variables of both processes: quick to train with, and Label Studio is away."""
    return {
        "MODEL_DIR": str(folder / "models"),
        "LABEL_STUDIO_URL": NOWHERE,
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "PORT": str(free_port()),
        "TSP_WEIGHTS": "none",
        "TSP_IMAGE_SIZE": "64",
        "TSP_DETECTIONS": "10",
        "TSP_RECONCILE_SECONDS": "1",
        "TSP_THREADS": "1",
        "TSP_NICENESS": "0",
        **others,
    }


class Running:
    """The worker as a process of its own, the web process as a part of this one; both end with the block."""

    def __init__(self, folder: Path, **others: str) -> None:
        self.log = folder / "worker.log"
        self.environment = environment(folder, **others)
        self.worker = BackendProcesses(settings=self.environment, log_dir=folder)

    def restart(self, **others: str) -> None:
        """The worker is killed, and another one started with these settings changed."""
        self.worker.kill("worker")
        self.environment |= others
        self.worker = BackendProcesses(settings=self.environment, log_dir=self.log.parent)
        self.worker.start_one("worker")

    def __enter__(self) -> Self:
        self.worker.start_one("worker")
        wait(lambda: "the worker is ready" in self.log.read_text(), self.log.read_text)
        self.web = TestClient(create_app(Settings(**self.environment)))
        self.web.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.web.__exit__()
        self.worker.stop()

    def connect(self, uid: str) -> None:
        self.web.post("/setup", json={"project": uid, "schema": POLYGON_CONFIG}).raise_for_status()

    def status(self) -> dict[str, Any]:
        """The one project that the web process tells of."""
        self.worker.check()
        (project,) = self.web.get("/status").json()["projects"]
        return dict(project)

    def wait(self, until: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        wait(lambda: until(self.status()), self.status)
        return self.status()


def wait(until: Callable[[], Any], describe: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)


@contextmanager
def door(url: str, port: int) -> Iterator[None]:
    """Another address of a server, which is there only inside of the block."""
    target = (urlsplit(url).hostname, urlsplit(url).port)
    listener = socket.create_server((HOST, port))

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with source, sink, suppress(OSError):  # whoever hangs up
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                visitor, _ = listener.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(target)
            for pair in ((visitor, server), (server.dup(), visitor.dup())):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_worker_that_is_first_on_an_empty_database_finds_projects_later(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    others = {}
    if database == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        others["DATABASE_URL"] = server.new_database()
    with Running(tmp_path, **others) as running:
        running.connect(UID)
        project = running.wait(lambda project: project["problem"])
    assert project["key"] == KEY
    assert "no answer from Label Studio" in project["problem"]


def test_a_forgotten_project_whose_data_cannot_be_removed_does_not_keep_the_others_waiting(
    postgres: Postgres, tmp_path: Path
) -> None:
    place = {"DATABASE_URL": postgres.new_database(), "TSP_STORE_URL": f"file://{tmp_path}/not-mounted"}
    with Running(tmp_path, **place) as running, closing(Service.connect(Settings(**running.environment))) as service:
        remember_project(service.database, ProjectName(KEY, 7), connected=True)
        forget(service, KEY, delete_data=True)
        remember_project(service.database, ProjectName("8-17", 8), connected=True)
        other = running.wait(lambda project: project["problem"])
        assert forgotten_projects(service) == [KEY]
    assert other["key"] == "8-17"
    assert f"project {KEY}: its data is not removed yet: the store does not answer" in running.log.read_text()


def test_a_label_studio_that_never_answers_does_not_keep_the_worker_from_giving_signs(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as silent:  # takes what is sent, and says nothing
        place = {"LABEL_STUDIO_URL": f"http://{HOST}:{silent.getsockname()[1]}"}
        with Running(tmp_path, **place) as running:
            signs = set()
            deadline = time.monotonic() + 15  # Label Studio is given up after 60
            while len(signs) < 2 and time.monotonic() < deadline:
                worker = running.web.get("/status").json()["worker"]
                signs.add(worker["seen_at"])
                time.sleep(0.1)
    assert None not in signs  # the first one is there when the worker is ready
    assert len(signs) == 2
    assert worker["problem"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test says is missing")
def test_a_device_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"TSP_DEVICE: expected a device that torch can use .*, got 'cuda'"):
        check_torch(settings(tmp_path, TSP_DEVICE="cuda"))
    check_torch(settings(tmp_path, TSP_DEVICE="auto"))


def test_weights_that_are_not_there_are_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"TSP_WEIGHTS: expected a file, got .*body\.safetensors, which is none"):
        check_weights(settings(tmp_path, TSP_WEIGHTS=str(tmp_path / "body.safetensors")))
    (tmp_path / "body.safetensors").touch()
    check_weights(settings(tmp_path, TSP_WEIGHTS=str(tmp_path / "body.safetensors")))
    check_weights(settings(tmp_path, TSP_WEIGHTS="imagenet"))


def test_a_precision_that_this_machine_does_not_have_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.bfloat16.has_bfloat16", lambda: False)
    check_torch(settings(tmp_path, TSP_DEVICE="cpu"))
    with pytest.raises(SettingsError, match=r"TSP_PRECISION: bfloat16: this CPU has no instructions for it"):
        check_torch(settings(tmp_path, TSP_DEVICE="cpu", TSP_PRECISION="bfloat16"))


def test_an_error_that_is_kept_does_not_keep_what_its_functions_held() -> None:
    class Network:
        pass

    held: list[weakref.ref[Network]] = []

    def write(network: Network) -> None:
        held.append(weakref.ref(network))
        raise OSError("no space")

    def train() -> None:
        network = Network()
        try:
            write(network)
        except OSError as error:
            raise DiskFullError("no space") from error

    with pytest.raises(DiskFullError) as kept:
        train()
    assert held[0]() is not None
    free_frames(kept.value)
    assert held[0]() is None


@pytest.mark.label_studio
def test_a_worker_that_is_killed_in_the_middle_of_training_finishes_the_same_cycle_once(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = import_images(client, project, [*phantom_images(4), *grey_images(2)])
    for task in tasks[:4]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    port = free_port()
    with Running(
        tmp_path,
        LABEL_STUDIO_URL=f"http://{HOST}:{port}",
        LABEL_STUDIO_API_KEY=label_studio.token,
        TSP_BATCH_SIZE="4",
        TSP_EPOCHS="16",  # of 2 steps
        TSP_CHECKPOINT_STEPS="5",
    ) as running:
        running.connect(project.uid)
        running.wait(lambda project: "no answer from Label Studio" in project["problem"])
        with door(label_studio.url, port):
            recovered = running.wait(lambda project: project["cycles"])
            assert (recovered["problem"], recovered["annotated"]) == ("", 4)
            running.wait(lambda project: is_training(project) and project["cycles"][0]["done"] > 5)
            running.worker.kill("worker")
            (before,) = running.status()["cycles"]
            assert before["status"] == "running"
            checkpoint = tmp_path / "models" / "cycles" / recovered["key"] / "1" / "checkpoint.safetensors"
            saved_steps = int(read_tensors(checkpoint)[1]["step"])
            assert 5 <= saved_steps < 32

            running.worker.start_one("worker")
            seen = []

            def is_over(project: dict[str, Any]) -> bool:
                if is_training(project):
                    seen.append(project["cycles"][0]["done"])
                return project["cycles"][0]["finished_at"] is not None

            (after,) = running.wait(is_over)["cycles"]
            assert (after["status"], after["error"]) == ("done", "")
            assert (after["planned_at"], after["facts"]["annotated"]) == (before["planned_at"], 4)
            assert all(done == 0 or done > saved_steps or done == before["done"] for done in seen)  # nothing was lost
            wait(lambda: not checkpoint.exists(), running.status)  # nobody goes on with it

            late = import_images(client, project, grey_images(3)[2:])  # a task that comes after the cycle
            wait(lambda: client.model_versions(project.id) == {after["version"]: 3}, running.status)
    assert client.predicted_task_ids(project.id, after["version"]) == {*tasks[4:], *late}
    assert client.project(project.id).model_version == after["version"]


@pytest.mark.label_studio
def test_a_spread_first_batch_leads_to_a_version_whose_batch_a_strategy_chose(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = import_images(client, project, phantom_images(9))
    with Running(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        TSP_BATCH_SIZE="3",
        TSP_EPOCHS="1",
        TSP_VALIDATION_FRACTION="0",
        TSP_STRATEGY="core_set",
        TSP_COLD_START="spread",
    ) as running:
        running.connect(project.uid)
        wait(lambda: client.project(project.id).model_version.startswith("tsp-0-"), running.status)
        first = client.predicted_task_ids(project.id, client.project(project.id).model_version)
        served = [annotate_next(client, project) for _ in range(3)]
        assert set(served) == first
        assert running.status()["active_version"] is None

        (cycle,) = running.wait(lambda project: project["cycles"] and project["cycles"][0]["finished_at"])["cycles"]
        assert (cycle["status"], cycle["error"]) == ("done", "")
        assert (cycle["facts"]["strategy"], cycle["facts"]["batch"]) == ("core_set", 3)
        assert client.model_versions(project.id) == {cycle["version"]: 3, f"{cycle['version']}.pool": 3}
        batch = client.predicted_task_ids(project.id, cycle["version"])
        served += [annotate_next(client, project) for _ in range(3)]
        assert set(served[3:]) == batch
        assert set(served) <= set(tasks)


@pytest.mark.label_studio
def test_a_loss_that_is_not_finite_fails_the_cycle_with_its_reason_and_the_old_model_stays(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = import_images(client, project, phantom_images(4))
    for task in tasks[:2]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    name = ProjectName.from_uid(project.uid)
    assert name is not None
    registry = Registry(tmp_path / "models" / "versions")
    registry.add(name.key, *tiny_version(VERSION, ("cell", "lesion")))
    registry.activate(name.key, VERSION)
    with Running(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        TSP_BATCH_SIZE="2",
        TSP_LEARNING_RATE="1e30",
        TSP_VALIDATION_FRACTION="0",
    ) as running:
        running.connect(project.uid)
        (cycle,) = running.wait(lambda project: project["cycles"] and project["cycles"][0]["finished_at"])["cycles"]
        assert cycle["status"] == "failed"
        assert "Lower the learning rate" in cycle["error"]
        assert ". Press Start Training in Label Studio to try again" in cycle["error"]
        log = running.log.read_text()
        assert "cycle 1 failed" in log
        assert "Traceback" not in log
        wait(lambda: client.model_versions(project.id) == {VERSION: 2}, running.status)  # it goes on serving
        status = running.wait(lambda _: client.project(project.id).model_version == VERSION)
        assert status["active_version"] == VERSION
        assert [kept["version"] for kept in status["versions"]] == [VERSION]


@pytest.mark.label_studio
def test_work_in_a_project_that_was_deleted_in_label_studio_ends_with_what_is_to_be_done(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, service: Service, tmp_path: Path
) -> None:
    key = key_of(service, project)
    add_version(service, key)
    with service.database.session() as session:
        session.add(CycleRow(project_key=key, number=1))
    with raw_api(label_studio) as api:
        api.delete(f"/api/projects/{project.id}/").raise_for_status()
    with Running(tmp_path, LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.token) as running:
        (cycle,) = running.wait(lambda seen: seen["cycles"][0]["finished_at"])["cycles"]
        with service.database.session() as session:
            session.add(ActivationRow(project_key=key, number=1, version=VERSION))
        (wish,) = running.wait(lambda seen: seen["activations"] and seen["activations"][0]["finished_at"])[
            "activations"
        ]
        for work in (cycle, wish):
            assert work["status"] == "failed"
            assert work["error"].startswith(f"project {project.id} is not in Label Studio any more")
            assert work["error"].endswith("or forget the project on the dashboard.")  # there is no other way
        running.wait(lambda seen: f"project {project.id} is not in Label Studio any more" in seen["problem"])
        assert "Traceback" not in running.log.read_text()


def annotate_next(client: LabelStudioClient, project: Project) -> int:
    task = client.next_task(project.id)
    assert task is not None
    client.submit_annotation(task["id"], result=[polygon_result()], lead_time_seconds=1)
    return int(task["id"])


def is_training(project: dict[str, Any]) -> bool:
    return bool(project["cycles"]) and project["cycles"][0]["stage"].startswith("training")


@pytest.mark.parametrize("what", ["cycles", "activations", "chunks"])
def test_a_worker_takes_the_queues_of_its_own_name_for_left_over_and_no_others(what: str) -> None:
    assert is_queue_of("gpu-1", f"{what}-gpu-1-0123abcd")
    for other in ("gpu-1-1-0123abcd", "gpu-11-0123abcd", "gpu-2-0123abcd", "gpu-1"):
        assert not is_queue_of("gpu-1", f"{what}-{other}")
