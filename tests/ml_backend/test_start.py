"""What the web process loads when it starts, and what only later; in a process of its own, since ours has it all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from ml_backend.service import Service
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import free_port
from tests.label_studio import POLYGON_CONFIG
from tests.ml_backend.examples import KEY, NOWHERE, UID, VERSION, add_version, data_uri, grey_images, locked
from tests.ml_backend.test_worker import wait
from tests.postgres import Postgres

HEAVY = ("torch", "torchvision", "timm", "scipy", "pandas", "label_studio_ml", "label_studio_sdk", "dbos")

# Reads [path, body] lines, prints [status, answer, heavy modules that are loaded] for each.
ASKED = f"""
import json, sys
from fastapi.testclient import TestClient
from ml_backend.app import create_app

loads = []
with TestClient(create_app(after_first_load=lambda: loads.append(1))) as web:
    for path, body in json.load(sys.stdin):
        answer = web.post(path, json=body) if body else web.get(path)
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        print(json.dumps([answer.status_code, answer.json() if path != "/ui" else {{}}, heavy, len(loads)]))
"""


def ask(folder: Path, *requests: tuple[str, dict[str, Any] | None]) -> list[Any]:
    """[status, answer, heavy modules, how often weights were loaded first] after each request, of a new process."""
    environment = {
        "PATH": os.environ["PATH"],
        "MODEL_DIR": str(folder / "models"),
        "LABEL_STUDIO_URL": NOWHERE,
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "TSP_STRATEGY": "mc_dropout",
        "TSP_DEVICE": "cpu",
    }
    process = subprocess.run(
        [sys.executable, "-c", ASKED],
        input=json.dumps(requests),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


WEBHOOK = {
    "action": "ANNOTATION_CREATED",
    "project": {"id": 7, "created_at": "2023-11-14T22:13:20.654321Z"},
}
PREDICT = {
    "tasks": [{"id": 1, "data": {"image": data_uri(grey_images(1)[0])}}],
    "project": UID,
    "label_config": POLYGON_CONFIG,
}


def test_a_taken_port_is_named_before_anything_else(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {"PATH": os.environ["PATH"], "MODEL_DIR": str(tmp_path / "models"), "PORT": str(port)}
        web = subprocess.run(
            [sys.executable, "-m", "ml_backend.app"],
            env=environment | {"LABEL_STUDIO_API_KEY": "0" * 40},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert web.returncode == 1
    assert web.stderr.startswith(f"TSP_HOST and PORT: cannot listen at 127.0.0.1, port {port} (Address already in use")
    assert len(web.stderr.splitlines()) == 1


def test_nothing_heavy_is_loaded_before_there_is_a_version(tmp_path: Path) -> None:
    answers = ask(
        tmp_path,
        ("/health", None),
        ("/setup", {"project": UID, "schema": POLYGON_CONFIG}),
        ("/webhook", WEBHOOK),
        ("/predict", PREDICT),
        ("/ui", None),
        ("/status", None),
    )
    assert [(status, heavy, loads) for status, _, heavy, loads in answers] == [(200, [], 0)] * 6
    assert [project["key"] for project in answers[-1][1]["projects"]] == [KEY]


def test_weights_are_loaded_once_when_a_version_is_asked(tmp_path: Path, lonely_service: Service) -> None:
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    answers = ask(
        tmp_path,
        ("/setup", {"project": UID, "schema": POLYGON_CONFIG}),
        ("/ui", None),
        ("/predict", PREDICT),
        ("/predict", PREDICT),
    )
    assert [status for status, *_ in answers] == [200] * 4
    assert answers[0][1] == {"model_version": VERSION}
    assert [("torch" in heavy, loads) for _, _, heavy, loads in answers] == [(False, 0)] * 2 + [(True, 1)] * 2
    assert answers[3][1] == answers[2][1]
    assert answers[2][1]["results"][0]["model_version"] == VERSION


@pytest.mark.parametrize("module", ["ml_backend.app", "ml_backend.versions", "ml_backend.health"])
def test_commands_that_run_no_network_import_none(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"TSP_BATCH_SIZE": "many"}, "TSP_BATCH_SIZE"),
        ({"TSP_PROFILE": "vgg"}, "TSP_PROFILE"),
        ({"LABEL_STUDIO_API_KEY": ""}, "LABEL_STUDIO_API_KEY is not set"),
    ],
    ids=["a value", "a profile", "no token"],
)
def test_a_worker_tells_what_is_wrong_with_its_settings_before_it_loads_anything_heavy(
    settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], "MODEL_DIR": str(tmp_path), "LABEL_STUDIO_API_KEY": "0" * 40, **settings}
    command = [sys.executable, "-X", "importtime", "-m", "ml_backend.worker"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert told in ended.stderr
    loaded = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "ml_backend.settings" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_worker_whose_role_may_not_make_a_schema_tells_what_to_grant(tmp_path: Path, postgres: Postgres) -> None:
    address = postgres.new_database()
    role, name = "may_make_tables", urlsplit(address).path.removeprefix("/")
    with psycopg.connect(address, autocommit=True) as administrator:
        administrator.execute(f"CREATE ROLE {role} LOGIN")
        administrator.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
        settings = {
            "PATH": os.environ["PATH"],
            "MODEL_DIR": str(tmp_path),
            "DATABASE_URL": address.replace(f"{postgres.superuser}@", f"{role}@"),
            "LABEL_STUDIO_URL": NOWHERE,
            "LABEL_STUDIO_API_KEY": "0" * 40,
        }
        worker = [sys.executable, "-m", "ml_backend.worker"]
        ended = subprocess.run(worker, env=settings, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 1
        *_, told = ended.stderr.splitlines()
        assert told == (
            "DATABASE_URL: expected a role that may make the schema dbos for the records of the workflow engine (GRANT "
            "CREATE ON DATABASE, or an administrator's CREATE SCHEMA dbos AUTHORIZATION of that role), but: permission "
            f"denied for database {name}"
        )
        assert "Traceback" not in ended.stderr
        administrator.execute(f"CREATE SCHEMA dbos AUTHORIZATION {role}")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(worker, env=settings, stderr=log)
    try:
        wait(lambda: "the worker is ready" in (tmp_path / "log").read_text(), (tmp_path / "log").read_text)
    finally:
        process.kill()
        process.wait()


def test_it_ends_while_an_event_waits_for_a_locked_database(tmp_path: Path) -> None:
    state = tmp_path / "state.sqlite3"
    environment = {
        "MODEL_DIR": str(tmp_path),
        "DATABASE_URL": f"sqlite:///{state}?timeout=0.1",
        "LABEL_STUDIO_URL": NOWHERE,
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "PORT": str(free_port()),
    }
    web = BackendProcesses(settings=environment, log_dir=tmp_path)
    try:
        web.start_one("web")
        web.wait_until_it_answers()
        with locked(state), ThreadPoolExecutor(1) as pool:
            event = pool.submit(httpx.post, f"{web.url}/webhook", json=WEBHOOK, timeout=60)
            while not httpx.get(f"{web.url}/status").json()["events"]["problem"]:
                time.sleep(0.05)
            os.kill(web.pid("web"), signal.SIGTERM)
            deadline = time.monotonic() + 30
            while web.ended("web") is None:
                assert time.monotonic() < deadline, "it does not end"
                time.sleep(0.1)
            assert event.exception() or event.result().status_code >= 500
        assert "1 events are lost" in (tmp_path / "web.log").read_text()
    finally:
        web.stop()
