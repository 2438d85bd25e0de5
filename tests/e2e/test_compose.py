"""The processes of docker-compose.yml, started with its environment but without containers, and one cycle through them.

Label Studio and our backend each on its own database of one real PostgreSQL, which deploy/databases.sql has made; one
web process and two workers.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from ml_backend.health import trouble_with
from ml_backend.ls_client import LabelStudioClient
from model.dataset import read_coco
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import HOST, LabelStudioServer, free_port
from scripts.make_phantoms import make_phantoms
from scripts.oracle import Oracle
from tests.compose import ROOT, load_compose
from tests.postgres import Postgres, postgres  # noqa: F401 - a fixture
from tests.test_deployment import SECRETS

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]

BATCH, SIZE, SECONDS = 8, 96, 300
BASIC = SECRETS["BASIC_AUTH_USER"], SECRETS["BASIC_AUTH_PASS"]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load_compose(SECRETS)["services"]


@pytest.fixture(scope="module")
def databases(postgres: Postgres) -> str:  # noqa: F811
    """host:port of a PostgreSQL that was prepared as the image prepares a new volume."""
    if shutil.which("psql") is None:
        pytest.skip("no psql is installed (apt install postgresql)")
    server = conninfo_to_dict(postgres.new_database())
    address = f"{server['host']}:{server['port']}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE postgres SUPERUSER LOGIN")  # the image's, which the script shuts out
    subprocess.run(
        ["psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--file", ROOT / "deploy/databases.sql"],
        env={"PATH": os.environ["PATH"], "PGHOST": str(server["host"]), "PGPORT": str(server["port"]),
             "PGUSER": "postgres", "PGDATABASE": "postgres", "POSTGRES_PASSWORD": SECRETS["POSTGRES_PASSWORD"]},
        check=True,
        capture_output=True,
        timeout=60,
    )  # fmt: skip
    return address


@pytest.fixture(scope="module")
def studio(
    compose: dict[str, Any], databases: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabelStudioServer]:
    host, port = databases.split(":")
    # Outside of a container, backend and Label Studio are neighbours on the loopback, which the stack forbids.
    own = {
        "POSTGRE_HOST": host,
        "POSTGRE_PORT": port,
        "USER_ADDITIONAL_BANNED_SUBNETS": "169.254.0.0/16",
        "LABEL_STUDIO_HOST": "",
        "CSRF_TRUSTED_ORIGINS": "",
    }
    with LabelStudioServer(
        data_dir=tmp_path_factory.mktemp("compose") / "label-studio",
        username=SECRETS["LABEL_STUDIO_USERNAME"],
        password=SECRETS["LABEL_STUDIO_PASSWORD"],
        token=SECRETS["LABEL_STUDIO_API_KEY"],
        environment={
            **compose["label-studio"]["environment"],
            **own,
            "LABEL_STUDIO_HOST": "",
            "CSRF_TRUSTED_ORIGINS": "",
        },
    ) as server:
        yield server


def test_one_cycle_through_the_stack(
    compose: dict[str, Any], databases: str, studio: LabelStudioServer, tmp_path: Path
) -> None:
    assert not list(studio.data_dir.glob("*.sqlite3"))
    truth_folder = tmp_path / "phantoms"
    make_phantoms(truth_folder, images=BATCH + 4, size=SIZE, seed=3)
    truth = read_coco(truth_folder / "annotations.json")
    alive = [tmp_path / f"alive-{number}" for number in (1, 2)]
    port = str(free_port())
    with ExitStack() as running:
        web, first, second = (
            BackendProcesses(
                settings={**_settings(compose[service], databases, studio, tmp_path), "PORT": port, **own},
                log_dir=tmp_path / "logs" / str(number),
            )
            for number, (service, own) in enumerate(
                [("web", {}), *(("worker", {"TSP_ALIVE_FILE": str(file)}) for file in alive)]
            )
        )
        for processes, name in ((web, "web"), (first, "worker"), (second, "worker")):
            running.callback(processes.stop)
            processes.start_one(name)
        web.wait_until_it_answers()
        owner = running.enter_context(LabelStudioClient(studio.url, studio.token))
        labels = "".join(f'<Label value="{name}"/>' for name in truth.class_names)
        project = owner.create_project(
            title="a team's",
            label_config=f'<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i">{labels}'
            "</PolygonLabels></View>",
        )
        owner.import_files(project.id, [image.path for image in truth.images])
        owner.connect_backend(project.id, url=web.url, title="TSP", basic_auth=BASIC)
        annotator = Oracle(owner, project.id, truth)
        for _ in range(BATCH):
            assert annotator.annotate_next() is not None

        deadline = time.monotonic() + SECONDS
        while True:
            status = httpx.get(f"{web.url}/status", auth=BASIC, timeout=30).json()
            cycles = [cycle for found in status["projects"] for cycle in found["cycles"]]
            if cycles and cycles[0]["finished_at"]:
                break
            for processes in (web, first, second):
                processes.check()
            assert time.monotonic() < deadline, status
            time.sleep(0.3)

        assert cycles[0]["status"] == "done", cycles[0]["error"]
        assert status["worker"]["living"] == 2
        assert owner.model_versions(project.id)[cycles[0]["version"]] == 4
        assert status["projects"][0]["url"].startswith("http://localhost:8080/")  # as browsers reach it
        assert httpx.get(f"{web.url}/status", timeout=30).status_code == 401
        for what in (f"{web.url}/health", *map(str, alive)):  # the health checks of the containers
            assert trouble_with(what) == ""


def _settings(service: dict[str, Any], databases: str, studio: LabelStudioServer, folder: Path) -> dict[str, str]:
    """The service's environment; names of containers are addresses here, and training is short."""
    environment = dict(service["environment"])
    return {
        **environment,
        "DATABASE_URL": environment["DATABASE_URL"].replace("db:5432", databases),
        "LABEL_STUDIO_URL": environment["LABEL_STUDIO_URL"].replace("http://label-studio:8080", studio.url),
        "TSP_HOST": HOST,
        "MODEL_DIR": str(folder / "models"),
        "TSP_BATCH_SIZE": str(BATCH),
        "TSP_IMAGE_SIZE": str(SIZE),
        "TSP_EPOCHS": "1",
        "TSP_MIN_STEPS": "4",
        "TSP_VALIDATION_FRACTION": "0.2",
    }
