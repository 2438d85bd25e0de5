"""No secret is written down: a real Label Studio, web process and worker go through a cycle with the log at DEBUG, and
everything that they left behind is searched."""

import base64
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from ml_backend.ls_client import LabelStudioClient
from ml_backend.webhook_secret import HEADER
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import LabelStudioServer, free_port
from tests.label_studio import POLYGON_CONFIG, polygon_result, raw_api
from tests.ml_backend.examples import import_images, phantom_images
from tests.postgres import Postgres

USER, PASSWORD, DATABASE_PASSWORD = "studio", "open-sesame-4711", "database-sesame-4711"
SECONDS = 180.0


def wait(until: Callable[[], Any], describe: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)


def stored(database_url: str, folder: Path) -> Iterator[tuple[str, object]]:
    """(table, value) of every value in every table, those of the workflow engine included."""
    if database_url:
        with psycopg.connect(database_url) as connection:
            tables = connection.execute(
                "SELECT table_schema, table_name FROM information_schema.tables "
                "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')"
            ).fetchall()
            for schema, table in tables:
                for row in connection.execute(f'SELECT * FROM "{schema}"."{table}"').fetchall():
                    yield from ((f"{schema}.{table}", value) for value in row)
        return
    for path in folder.glob("*.sqlite3"):
        with sqlite3.connect(path) as lite:
            for (table,) in lite.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in lite.execute(f'SELECT * FROM "{table}"').fetchall():
                    yield from ((f"{path.name}: {table}", value) for value in row)
        lite.close()


def as_bytes(value: object) -> bytes:
    return bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode()


@pytest.mark.label_studio
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_secret_is_in_a_log_in_the_database_or_in_an_answer(
    database: str, label_studio: LabelStudioServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database_url = ""
    if database == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        database_url = server.new_database().replace("tests@", f"tests:{DATABASE_PASSWORD}@")
    account = {"email": f"{database}@example.com", "password": "an account's password"}
    owner_token = label_studio.create_annotator(**account)
    personal = label_studio.create_personal_access_token(**account)
    models, logs = tmp_path / "models", tmp_path / "logs"
    environment = {
        "LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": personal, "LOG_LEVEL": "DEBUG",
        "BASIC_AUTH_USER": USER, "BASIC_AUTH_PASS": PASSWORD, "DATABASE_URL": database_url, "MODEL_DIR": str(models),
        "PORT": str(free_port()), "TSP_WEIGHTS": "none", "TSP_IMAGE_SIZE": "64", "TSP_DETECTIONS": "10",
        "TSP_EPOCHS": "1", "TSP_BATCH_SIZE": "3", "TSP_RECONCILE_SECONDS": "1", "TSP_THREADS": "1",
    }  # fmt: skip
    answers: list[str] = []
    with (
        BackendProcesses(settings=environment, log_dir=logs) as backend,
        httpx.Client(base_url=backend.url, auth=(USER, PASSWORD), timeout=60) as web,
        LabelStudioClient(label_studio.url, personal) as client,
        raw_api(label_studio) as api,
    ):

        def project_status() -> dict[str, Any]:
            backend.check()
            (status,) = web.get("/status").json()["projects"]
            return dict(status)

        project = client.create_project(title=database, label_config=POLYGON_CONFIG)
        client.connect_backend(project.id, url=backend.url, title="TSP", basic_auth=(USER, PASSWORD))

        def secret() -> str:
            (hook,) = api.get("/api/webhooks/", params={"project": project.id}).json()
            return str((hook["headers"] or {}).get(HEADER, ""))

        wait(secret, lambda: (logs / "worker.log").read_text())
        tasks = import_images(client, project, [*phantom_images(5), "http://127.0.0.1:1/a.png?signature=a-signature"])
        for task in tasks[:3]:
            client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
        wait(lambda: any(cycle["finished_at"] for cycle in project_status()["cycles"]), project_status)
        assert project_status()["cycles"][0]["status"] == "done", project_status()
        assert project_status()["events"]["received"] > 0  # the webhooks got in with the secret
        needles = {
            "personal access token": personal,
            "legacy token that /setup carries": owner_token,
            "password": PASSWORD,
            "basic authentication": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
            "secret of the webhook": secret(),
            "password of the database": DATABASE_PASSWORD,
            "signature": "a-signature",
        }
        label_studio_says = {"project": project.uid, "schema": POLYGON_CONFIG, "access_token": owner_token}
        broken = {"tasks": [{"id": tasks[0], "data": {"image": "s3://not/connected.png"}}], "project": project.uid}
        answers += [web.get(path).text for path in ("/status", "/ui", "/openapi.json", "/versions")]
        answers += [web.post("/setup", json=label_studio_says).text, web.post("/setup", json={"access_token": 1}).text]
        answers += [httpx.post(f"{backend.url}/webhook", headers={HEADER: "0" * 64}, json={}).text]
        assert web.post("/predict", json={**broken, "label_config": POLYGON_CONFIG}).status_code == 200
        assert web.post("/predict", json={**broken, "label_config": "<View"}).status_code == 422
    found = {path.name: path.read_bytes() for path in logs.iterdir()}
    assert b" DEBUG " in found["worker.log"]
    found |= {
        str(path.relative_to(models)): path.read_bytes()
        for path in models.rglob("*")
        if path.is_file() and path.name != "webhook-secret" and "cache/images" not in str(path)
    }
    found |= {f"answer {number}": answer.encode() for number, answer in enumerate(answers)}
    values = list(stored(database_url, models))
    assert {"projects", "workflow_status"} <= {re.split(r"[. ]+", table)[-1] for table, _ in values}
    for table, value in values:
        found[table] = found.get(table, b"") + b"\n" + as_bytes(value)
    leaks = [(name, kind) for name, content in found.items() for kind, needle in needles.items()
             if needle.encode() in content]  # fmt: skip
    assert leaks == []
    web_token = re.compile(rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.")  # such as the access tokens that Label Studio hands out
    assert [name for name, content in found.items() if web_token.search(content)] == []
    assert [table for table, value in values if is_pickled(value)] == []


def is_pickled(value: object) -> bool:
    """Whether a value is a pickle, plain or in base64, as the workflow engine would write it by default."""
    content = as_bytes(value)
    return content.startswith((b"\x80\x04", b"\x80\x05", b"gAS", b"gAW"))


def test_a_pickle_is_recognised() -> None:
    pickled = b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94."
    assert is_pickled(pickled)
    assert is_pickled(base64.b64encode(pickled).decode())
    assert not is_pickled(json.dumps({"json": "is none"}))
