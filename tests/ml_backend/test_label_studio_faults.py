"""Label Studio fails in every way in the middle of a cycle: what was read is whole, what was written is there once.

A proxy spoils requests to a real Label Studio; Label Studio itself is stopped, and its tokens are taken back.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ml_backend import ls_client, ls_http
from ml_backend import publish as publish_module
from ml_backend.cycle import snapshot
from ml_backend.db import used_tasks
from ml_backend.durable_cycles import is_worth_waiting
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.publish import import_missing, publish
from ml_backend.service import Service
from model.dataset import read_coco
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import PASSWORD, POLYGON_CONFIG, create_annotator, polygon_result, prediction, raw_api
from tests.ml_backend.examples import (
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    grey_images,
    import_images,
    key_of,
    phantom_images,
    settings,
    sha256,
)
from tests.ml_backend.test_publish import scored, stored, write_scores
from tests.ml_backend.test_worker import SECONDS, Running, wait

pytestmark = pytest.mark.label_studio

IMAGES = grey_images(5)
EMAIL = "worker@example.com"
LIVES = 8  # requests of an access token
LET_GO = threading.Event()  # what is slow comes only now
REFUSED = Fault(kind="status", status=401)
IN_PARTS = ("/export", "/import/predictions")  # requests of which a stage makes several


@dataclass(kw_only=True)
class Trouble:
    """Spoils each kind of request at first, and an export and an import in the middle, for longer than our client tries
    by itself."""

    fault: Fault
    only_in_parts: bool = False
    active: bool = False
    look: Callable[[Call], None] = lambda call: None
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self, call: Call) -> Fault | None:
        path = call.path.partition("?")[0]
        self.look(call)
        if not self.active or (self.fault.kind == "shorten" and path.startswith("/data/")):
            return None  # half an image looks like a damaged one
        self._seen[call.method, path] += 1
        number = self._seen[call.method, path]
        if path.endswith(IN_PARTS):
            return self.fault if 2 <= number <= (2 if self.only_in_parts else 4) else None
        return self.fault if number == 1 and not self.only_in_parts else None


def again_and_again(stage: Callable[[], object]) -> int:
    """As the worker repeats a stage; how often it had to wait."""
    for waits in range(50):
        try:
            stage()
        except Exception as error:
            if not is_worth_waiting(error):
                raise
        else:
            return waits
    raise AssertionError("it never worked")


@dataclass(frozen=True)
class Annotated:
    """A project in which all tasks are annotated, and carry predictions of an older version."""

    project: Project
    tasks: list[int]


@pytest.fixture(scope="module")
def annotated(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Annotated:
    with LabelStudioClient(label_studio.url, label_studio.token) as client:
        project = client.create_project(title="faults", label_config=POLYGON_CONFIG)
        tasks = upload(client, project, tmp_path_factory.mktemp("images"))
        for task in tasks:
            client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
        client.import_predictions(project.id, [prediction(task, score=0.5, version=VERSION) for task in tasks])
    return Annotated(project, tasks)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience, and exports and imports in parts of two tasks."""
    monkeypatch.setattr(ls_http, "_PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(ls_client, "_IDS_AN_EXPORT", 2)
    monkeypatch.setattr(ls_client, "_LONG_SECONDS", 2.0)
    monkeypatch.setattr(ls_client, "_BYTES_AN_IMPORT", 900)
    monkeypatch.setattr(publish_module, "_SETTLING_SECONDS", 0.05)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param({"fault": Fault(kind="status", status=500)}, id="answers 500"),
        pytest.param({"fault": Fault(kind="status", status=429, retry_after="0")}, id="answers 429"),
        pytest.param({"fault": Fault(kind="status", status=401)}, id="refuses the token for a while"),
        pytest.param({"fault": Fault(kind="status_after", status=502)}, id="obeys and answers 502"),
        pytest.param({"fault": Fault(kind="slow", seconds=60, until=LET_GO), "only_in_parts": True}, id="is slow"),
        pytest.param({"fault": Fault(kind="cut")}, id="hangs up in the middle of an answer"),
        pytest.param({"fault": Fault(kind="shorten")}, id="sends half an answer as a whole one"),
        pytest.param({"fault": Fault(kind="lose_answer")}, id="obeys and hangs up"),
        pytest.param({"fault": Fault(kind="refuse")}, id="hangs up"),
    ],
)
def test_a_snapshot_is_whole_and_a_publication_is_there_once_when_label_studio(
    trouble: dict[str, Any],
    label_studio: LabelStudioServer,
    client: LabelStudioClient,
    annotated: Annotated,
    tmp_path: Path,
) -> None:
    project, tasks = annotated.project, annotated.tasks
    choose = Trouble(**trouble)
    version = f"tsp-2-{sha256(repr(trouble).encode())[:8]}"
    with FaultProxy(label_studio.url, choose) as proxy, connected(proxy, label_studio, tmp_path) as service:
        key = key_of(service, project)
        add_version(service, key, version)
        write_scores(service, key, [scored(task, 0.5) for task in tasks], version)
        log = begin_cycle(service, key)
        choose.active = True
        assert again_and_again(lambda: snapshot(service, key, 1, log)) >= 1
        assert set(learnt(service, key)) == {sha256(image) for image in IMAGES}
        assert used_tasks(service.database, key) == set(tasks)
        facts = cycle_row(service, key).facts
        assert (facts["annotated"], facts["training"], facts["problem_count"]) == (5, 5, 0)

        shown = watch_the_switch(choose, client, project, version)
        assert again_and_again(lambda: publish(service, key, version, log)) >= 1
        assert set(shown) == {5}  # asked for twice where the answer was lost
        if choose.fault.until:
            choose.fault.until.set()
            wait(lambda: client.model_versions(project.id)[version] > 5, lambda: client.model_versions(project.id))
        import_missing(service, key, version)  # the worker's next look finds what came late
        assert service.registry.active(key) == version
    assert client.project(project.id).model_version == version
    assert client.model_versions(project.id) == {version: 5}
    assert [len(stored(label_studio, task)) for task in tasks] == [1] * 5


def test_what_is_taken_away_while_a_snapshot_is_read_does_not_count_as_learnt(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = upload(client, project, tmp_path)
    annotations = [client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1) for task in tasks]
    choose = Trouble(fault=Fault(kind="drop"))
    with (
        FaultProxy(label_studio.url, choose) as proxy,
        connected(proxy, label_studio, tmp_path) as service,
        raw_api(label_studio) as api,
    ):
        key = key_of(service, project)

        def take_away(call: Call) -> None:
            if "/export" in call.path:  # the annotated tasks have been listed by now
                api.delete(f"/api/annotations/{annotations[0]}/").raise_for_status()
                api.delete(f"/api/tasks/{tasks[1]}/").raise_for_status()

        choose.look = take_away
        snapshot(service, key, 1, begin_cycle(service, key))
        assert set(learnt(service, key)) == {sha256(image) for image in IMAGES[2:]}
        assert used_tasks(service.database, key) == set(tasks[2:])
        assert cycle_row(service, key).facts["annotated"] == 3


class ShortLives:
    """Access tokens are refused after a few requests instead of five minutes; Label Studio must give new ones. `events`
    happen at an import of predictions, one at each."""

    def __init__(self, *events: Callable[[], Fault]) -> None:
        self.uses = Counter[str]()
        self._events = list(events)

    def __call__(self, call: Call) -> Fault | None:
        if not call.authorization.startswith("Bearer "):
            return None
        if self._events and call.method == "POST" and call.path.endswith("/import/predictions"):
            return self._events.pop(0)()
        self.uses[call.authorization] += 1
        return REFUSED if self.uses[call.authorization] > LIVES else None

    def end_all(self) -> None:
        self.uses = Counter(dict.fromkeys(self.uses, LIVES))


def test_neither_a_token_that_is_taken_back_nor_a_restart_of_label_studio_loses_the_cycle(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    tasks = import_images(client, project, [*phantom_images(4), *grey_images(3)])
    for task in tasks[:4]:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    create_annotator(label_studio, EMAIL)
    first = label_studio.create_personal_access_token(email=EMAIL, password=PASSWORD)
    is_importing = threading.Event()

    def take_token_back() -> Fault:
        with raw_api(label_studio) as api:
            api.post("/api/token/blacklist/", json={"refresh": first}).raise_for_status()
        choose.end_all()
        return REFUSED

    def be_restarted() -> Fault:
        is_importing.set()  # Label Studio is stopped while it imports, or just before or after it
        return Fault(kind="lose_answer")

    choose = ShortLives(take_token_back, be_restarted)
    with (
        FaultProxy(label_studio.url, choose) as proxy,
        Running(
            tmp_path,
            LABEL_STUDIO_URL=proxy.url,
            LABEL_STUDIO_API_KEY=first,
            TSP_BATCH_SIZE="4",
            TSP_EPOCHS="1",
        ) as running,
    ):
        running.connect(project.uid)
        (cycle,) = running.wait(lambda status: waits_for(status) and status["problem"])["cycles"]
        assert cycle["status"] == "running"
        for told in (running.status()["problem"], cycle["facts"]["waiting"]["for"]):
            assert "Make a new one (Account & Settings > Personal Access Token) and set LABEL_STUDIO_API_KEY" in told
        assert cycle["facts"]["waiting"]["for"].endswith(
            "Then start web process and worker again: this goes on where it was."
        )
        trained = cycle["facts"]["training_seconds"]

        second = label_studio.create_personal_access_token(email=EMAIL, password=PASSWORD)
        running.restart(LABEL_STUDIO_API_KEY=second)
        assert is_importing.wait(SECONDS), running.status()
        label_studio.stop()
        running.wait(lambda status: "no answer from Label Studio" in waits_for(status) or "502" in waits_for(status))
        label_studio.start()
        (cycle,) = running.wait(lambda status: status["cycles"][0]["finished_at"])["cycles"]
    assert (cycle["status"], cycle["error"]) == ("done", "")
    facts = cycle["facts"]
    assert "waiting" not in facts
    assert (facts["annotated"], facts["training_seconds"]) == (4, trained)  # it was trained once
    assert client.model_versions(project.id) == {cycle["version"]: 3}
    assert [len(stored(label_studio, task)) for task in tasks] == [0] * 4 + [1] * 3
    assert client.project(project.id).model_version == cycle["version"]
    assert len(choose.uses) > 3


def waits_for(status: dict[str, Any]) -> str:
    """What the cycle waits for, "" when it does not."""
    return str(status["cycles"] and status["cycles"][0]["facts"].get("waiting", {}).get("for", ""))


def upload(client: LabelStudioClient, project: Project, folder: Path) -> list[int]:
    """Tasks whose images are asked of Label Studio, too."""
    paths = [folder / f"{number}.png" for number in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        path.write_bytes(image)
    return client.import_files(project.id, paths)


@contextmanager
def connected(proxy: FaultProxy, server: LabelStudioServer, folder: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": proxy.url, "LABEL_STUDIO_API_KEY": server.token}
    service = Service.connect(settings(folder, TSP_VALIDATION_FRACTION=0, **place))
    try:
        yield service
    finally:
        service.close()


def learnt(service: Service, key: str) -> list[str]:
    """The images that the snapshot has with their one instance."""
    images = read_coco(service.cycle_folder(key, 1) / "training.json", Path("/")).images
    return [image.image_id for image in images if len(image.labels) == 1]


def watch_the_switch(choose: Trouble, client: LabelStudioClient, project: Project, version: str) -> list[int]:
    """How many predictions of the version there were whenever Label Studio was asked to show it."""
    found: list[int] = []

    def look(call: Call) -> None:
        if call.method == "PATCH" and version.encode() in call.body:
            found.append(client.model_versions(project.id).get(version, 0))

    choose.look = look
    return found
