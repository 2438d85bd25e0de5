"""docker-compose.yml played without containers: its commands with its environment as plain processes, on a real
PostgreSQL, from an empty database to published predictions, through a backup and its restoration.

Names of the containers' network become ports of this machine, volumes become folders.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.webhook_secret import HEADER
from model.dataset import LabeledSet, read_coco
from scripts.check_dockerfile import environment_of, final, read_dockerfile
from scripts.label_studio_server import EXECUTABLE, HOST, free_port
from scripts.make_phantoms import make_phantoms
from scripts.oracle import Oracle
from tests.compose import ROOT, load_compose
from tests.postgres import Postgres, postgres_programs, running_postgres

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]

IMAGES, BATCH, SIZE = 16, 6, 64
SECRETS = {
    "POSTGRES_PASSWORD": "5d41402abc4b2a76b9719d911017c592",
    "LABEL_STUDIO_USERNAME": "first@example.com",
    "LABEL_STUDIO_PASSWORD": "correct horse battery",
    "LABEL_STUDIO_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "BASIC_AUTH_USER": "label-studio",
    "BASIC_AUTH_PASS": "s3cret: with a colon",
}
TSP_ENV = {  # what a person would write into tsp.env
    "TSP_BATCH_SIZE": str(BATCH),
    "TSP_IMAGE_SIZE": str(SIZE),
    "TSP_EPOCHS": "2",
    "TSP_RECONCILE_SECONDS": "5",
}
_, STAGES = read_dockerfile((ROOT / "Dockerfile").read_text())


@dataclass
class Stack:
    """The services of docker-compose.yml; `name` and a number are one container's."""

    folder: Path
    database: Postgres
    ports: dict[str, int] = field(default_factory=lambda: {"label-studio": free_port(), "web": free_port()})
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        published = {"LABEL_STUDIO_PORT": self.ports["label-studio"], "DASHBOARD_PORT": self.ports["web"]}
        self.services = load_compose(SECRETS | {name: str(port) for name, port in published.items()})["services"]
        (alias,) = self.services["web"]["networks"]["default"]["aliases"]
        self.backend_url = self.moved(f"http://{alias}:9090", "label-studio", 1)
        self.label_studio_url = self.moved(self.services["web"]["environment"]["LABEL_STUDIO_URL"], "web", 1)
        self.public_url = f"http://localhost:{self.ports['label-studio']}"

    def moved(self, text: str, name: str, number: int) -> str:
        """A text from the compose file or the Dockerfile with everything at its place on this machine."""
        if text == self.services[name]["environment"].get("USER_ADDITIONAL_BANNED_SUBNETS", ""):
            return ",".join(part for part in text.split(",") if part != "127.0.0.0/8")  # here the backend is there
        (volume,) = (mount.partition(":")[0] for mount in self.services[name]["volumes"])
        places = {
            r"^/data": str(self.volume(volume)),
            r"^/tmp": str(self.folder / f"tmp-{name}-{number}"),
            r"//label-studio:8080": f"//{HOST}:{self.ports['label-studio']}",
            r"//backend\.tsp\.internal:9090": f"//{HOST}:{self.ports['web']}",
            r"//127\.0\.0\.1:8080": f"//{HOST}:{self.ports['label-studio']}",
            r"//127\.0\.0\.1:9090": f"//{HOST}:{self.ports['web']}",
            r"@db:5432": f"@{HOST}:{self.database.port}",
            r"^db$": HOST,
            r"^5432$": str(self.database.port),
            r"^8080$": str(self.ports["label-studio"]),
            r"^9090$": str(self.ports["web"]),
            r"^0\.0\.0\.0$": HOST,
            r"^python$": sys.executable,
            r"^label-studio$": str(EXECUTABLE),
        }
        for pattern, place in places.items():
            if re.search(pattern, text):
                return re.sub(pattern, lambda _, place=place: place, text)
        return text

    def volume(self, name: str) -> Path:
        return self.folder / "volumes" / name

    def environment(self, name: str, number: int) -> dict[str, str]:
        """The image's variables, then tsp.env's, then those of the compose file."""
        service = self.services[name]
        image = environment_of(STAGES, service["build"]["target"])
        given = image | (TSP_ENV if "env_file" in service else {}) | service["environment"]
        secrets = [key for key, value in given.items() if value in SECRETS.values()]
        moved = {key: value if key in secrets else self.moved(value, name, number) for key, value in given.items()}
        return moved | {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}

    def start(self, name: str, number: int = 1) -> None:
        service = self.services[name]
        command = service.get("command") or json.loads(str(final(STAGES, service["build"]["target"], "CMD")))
        environment = self.environment(name, number)
        for mount in service["volumes"]:
            self.volume(mount.partition(":")[0]).mkdir(parents=True, exist_ok=True)
        Path(environment["HOME"]).mkdir(exist_ok=True)
        with (self.folder / f"{name}-{number}.log").open("ab") as log:
            self.running[name, number] = subprocess.Popen(
                [self.moved(word, name, number) for word in command],
                env=environment,
                cwd=environment["HOME"] if name == "label-studio" else ROOT,  # the package is not installed here
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_healthy(self, name: str, number: int = 1) -> bool:
        """What the container's health check says."""
        _, *command = self.services[name]["healthcheck"]["test"]
        done = subprocess.run(
            [self.moved(word, name, number) for word in command], cwd=ROOT, capture_output=True, timeout=60, check=False
        )
        return done.returncode == 0

    def up(self, *, workers: int) -> None:
        """As `docker compose up --wait --scale worker=...`."""
        names = [("label-studio", 1), ("web", 1), *(("worker", number + 1) for number in range(workers))]
        for name, number in names:
            self.start(name, number)
        for name, number in names:
            self.wait_for(lambda name=name, number=number: self.is_healthy(name, number), f"{name} {number} healthy")

    def stop(self, *, kill: bool = False) -> list[int]:
        """As `docker compose stop`: SIGTERM, and the time of grace; returns the exit codes."""
        codes = []
        for (name, _), process in self.running.items():
            process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            grace = self.services[name].get("stop_grace_period", "10s")
            codes.append(process.wait(timeout=float(grace.removesuffix("s")) if not kill else None))
        self.running.clear()
        return codes

    def wait_for(self, what: Callable[[], Any], words: str, *, seconds: float = 400) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            for (name, number), process in self.running.items():
                log = (self.folder / f"{name}-{number}.log").read_text(errors="replace")[-3000:]
                assert process.poll() is None, f"{name} {number} ended ({process.returncode}):\n{log}"
                assert time.monotonic() < deadline, f"not {words} within {seconds} s; {name} {number}:\n{log}"
            time.sleep(0.5)
        return found

    def status(self) -> dict[str, Any]:
        """What the dashboard shows."""
        auth = (SECRETS["BASIC_AUTH_USER"], SECRETS["BASIC_AUTH_PASS"])
        answer = httpx.get(f"{self.backend_url}/status", auth=auth, timeout=60)
        answer.raise_for_status()
        shown: dict[str, Any] = answer.json()
        return shown

    def finished_cycle(self) -> dict[str, Any] | None:
        cycles = [cycle for project in self.status()["projects"] for cycle in project["cycles"]]
        assert all(cycle["status"] in ("planned", "running", "done") for cycle in cycles), cycles
        return next((cycle for cycle in cycles if cycle["finished_at"]), None)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Nothing runs yet but PostgreSQL, with what the image makes of deploy/databases.sql."""
    with running_postgres(superuser="postgres", asks_for_passwords=True) as database:
        _make_databases(database)
        stack = Stack(tmp_path, database)
        try:
            yield stack
        finally:
            stack.stop(kill=True)


def _make_databases(database: Postgres) -> None:
    (mount,) = (m for m in load_compose(SECRETS)["services"]["db"]["volumes"] if m.startswith("./"))
    command = ["psql", "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--file", ROOT / mount.partition(":")[0]]
    environment = {"PATH": os.environ["PATH"], "POSTGRES_PASSWORD": SECRETS["POSTGRES_PASSWORD"]}
    subprocess.run([*command, database.local_url("postgres")], env=environment, check=True, timeout=60)


def test_from_nothing_to_predictions_and_back_from_a_backup(stack: Stack, tmp_path: Path) -> None:
    """One story, in order: each part stands on what the one before has done."""
    make_phantoms(tmp_path / "images", images=IMAGES, size=SIZE, seed=1)
    truth = read_coco(tmp_path / "images" / "annotations.json")
    stack.up(workers=2)
    with LabelStudioClient(stack.label_studio_url, SECRETS["LABEL_STUDIO_API_KEY"]) as client:
        assert SECRETS["LABEL_STUDIO_USERNAME"] in client.whoami()
        project = _connected_project(stack, client, truth)
        _annotate(client, project, truth)
        cycle = stack.wait_for(stack.finished_cycle, "a finished cycle")
        _check_published(client, project, cycle["version"])
        _check_dashboard(stack, project)
        _check_webhook(stack, client, project)
        annotated = client.annotated_task_ids(project.id)
    _check_health_of_workers(stack)
    stack.stop()
    _play(stack, "backup")
    _start_anew(stack)
    _play(stack, "restore")
    stack.up(workers=1)
    with LabelStudioClient(stack.label_studio_url, SECRETS["LABEL_STUDIO_API_KEY"]) as client:
        assert client.annotated_task_ids(project.id) == annotated
        _check_published(client, project, cycle["version"])
        assert stack.finished_cycle() == cycle
        _annotate(client, project, truth)
        stack.wait_for(lambda: (stack.finished_cycle() or cycle)["number"] == 2, "finished with a second cycle")


def _connected_project(stack: Stack, client: LabelStudioClient, truth: LabeledSet) -> Project:
    """What a person does in Label Studio's pages, by its API."""
    labels = "".join(f'<Label value="{name}"/>' for name in truth.class_names)
    config = f'<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i">{labels}</PolygonLabels></View>'
    project = client.create_project(title="a team's", label_config=config)
    client.import_files(project.id, [image.path for image in truth.images])
    auth = (SECRETS["BASIC_AUTH_USER"], SECRETS["BASIC_AUTH_PASS"])
    client.connect_backend(project.id, url=stack.backend_url, title="TSP", basic_auth=auth)
    return project


def _annotate(client: LabelStudioClient, project: Project, truth: LabeledSet) -> None:
    annotator = Oracle(client, project.id, truth)
    for _ in range(BATCH):
        assert annotator.annotate_next() is not None


def _check_published(client: LabelStudioClient, project: Project, version: str) -> None:
    unlabelled = {task.id for task in client.tasks(project.id)} - client.annotated_task_ids(project.id)
    assert client.predicted_task_ids(project.id, version) == unlabelled
    assert client.project(project.id).model_version == version


def _check_dashboard(stack: Stack, project: Project) -> None:
    status = stack.status()
    assert status["worker"]["problem"] == ""
    assert status["worker"]["living"] == 2
    (shown,) = status["projects"]
    assert shown["url"] == f"{stack.public_url}/projects/{project.id}/data"
    assert httpx.get(f"{stack.backend_url}/ui").status_code == 401


def _check_webhook(stack: Stack, client: LabelStudioClient, project: Project) -> None:
    """Label Studio made it by itself, because the alias has a dot; the worker gave it the secret of the volume."""
    (hook,) = client.webhooks(project.id)
    assert hook.url == f"{stack.backend_url}/webhook"
    secret = (stack.volume("models") / "webhook-secret").read_text()
    assert not client.webhooks_without(project.id, {HEADER: secret})
    stack.wait_for(lambda: stack.status()["projects"][0]["events"]["received"] > 0, "told by the webhook")


def _check_health_of_workers(stack: Stack) -> None:
    """A worker that died is not well; the other one goes on giving signs."""
    process = stack.running.pop(("worker", 2))
    process.kill()
    process.wait()
    for number in (1, 2):
        os.utime(stack.moved("/tmp/alive", "worker", number), (0, 0))
    stack.wait_for(lambda: stack.is_healthy("worker", 1), "giving signs")
    assert not stack.is_healthy("worker", 2)


def _start_anew(stack: Stack) -> None:
    """Nothing is left but the backup: new volumes, and the databases as the image makes them."""
    shutil.rmtree(stack.folder / "volumes")
    with psycopg.connect(stack.database.local_url("postgres"), autocommit=True) as connection:
        for name in ("label_studio", "tsp"):
            connection.execute(f"DROP DATABASE {name}")
            connection.execute(f"DROP ROLE {name}")
    _make_databases(stack.database)
    for name in ("label-studio", "models"):
        stack.volume(name).mkdir(parents=True)


def _play(stack: Stack, what: str) -> None:
    """Run the README's commands: inside a container becomes here; starting and stopping is left to the test."""
    block = re.search(rf"<!-- {what} -->\n(.*?)<!-- /{what} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    lines = [line.strip() for line in block[1].splitlines()]
    programs = postgres_programs()
    assert programs is not None
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PGHOST": str(stack.database.folder),
        "PGPORT": str(stack.database.port),
    }
    played = 0
    for line in lines:
        match = re.fullmatch(r"docker compose (?:exec -T|run --rm --no-deps -T) ([\w-]+) (.*)", line)
        if match is None:
            assert re.match(r"docker compose (stop|up) ", line)
            continue
        name, command = match.groups()
        if name != "db":
            (volume,) = (mount.partition(":")[0] for mount in stack.services[name]["volumes"])
            command = command.replace(" /data ", f" {shlex.quote(str(stack.volume(volume)))} ")
        subprocess.run(["/bin/sh", "-ec", command], cwd=stack.folder, env=environment, check=True, timeout=120)
        played += 1
    assert played == 4
