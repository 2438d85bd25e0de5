"""Label Studio fails in every way in the middle of a cycle: what was read is whole, what was written is there once.

A proxy spoils requests to a real Label Studio; Label Studio itself is stopped, and its tokens are taken back.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ml_backend import ls_client
from ml_backend import publish as publish_module
from ml_backend.cycle import snapshot
from ml_backend.db import used_tasks
from ml_backend.ls_client import LabelStudioClient, Project
from ml_backend.publish import import_missing, publish
from ml_backend.service import Service
from ml_backend.worker import _is_worth_waiting
from model.dataset import read_coco
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result, raw_api
from tests.ml_backend.examples import (
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    grey_images,
    key_of,
    settings,
    sha256,
)
from tests.ml_backend.test_publish import SECOND, scored, stored, write_scores

pytestmark = pytest.mark.label_studio

IMAGES = grey_images(5)
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
            if not _is_worth_waiting(error):
                raise
        else:
            return waits
    raise AssertionError("it never worked")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience, and exports and imports in parts of two tasks."""
    monkeypatch.setattr(ls_client, "_PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(ls_client, "_IDS_AN_EXPORT", 2)
    monkeypatch.setattr(ls_client, "_LONG_SECONDS", 2.0)
    monkeypatch.setattr(publish_module, "_LINES_AN_IMPORT", 2)
    monkeypatch.setattr(publish_module, "_SETTLING_SECONDS", 0.05)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param({"fault": Fault(kind="status", status=500)}, id="answers 500"),
        pytest.param({"fault": Fault(kind="status", status=429, retry_after="0")}, id="answers 429"),
        pytest.param({"fault": Fault(kind="status", status=401)}, id="refuses the token for a while"),
        pytest.param({"fault": Fault(kind="status_after", status=502)}, id="obeys and answers 502"),
        pytest.param({"fault": Fault(kind="slow", seconds=2.5), "only_in_parts": True}, id="is slow"),
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
    project: Project,
    tmp_path: Path,
) -> None:
    tasks = upload(client, project, tmp_path)
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    choose = Trouble(**trouble)
    with FaultProxy(label_studio.url, choose) as proxy, connected(proxy, label_studio, tmp_path) as service:
        key = key_of(service, project)
        for version in (VERSION, SECOND):
            add_version(service, key, version)
            write_scores(service, key, [scored(task, 0.5) for task in tasks], version)
        publish(service, key, VERSION, begin_cycle(service, key))
        log = begin_cycle(service, key, 2)

        choose.active = True
        assert again_and_again(lambda: snapshot(service, key, 2, log)) >= 1
        assert set(learnt(service, key, 2)) == {sha256(image) for image in IMAGES}
        assert used_tasks(service.database, key) == set(tasks)
        facts = cycle_row(service, key, 2).facts
        assert (facts["annotated"], facts["training"], facts["problem_count"]) == (5, 5, 0)

        shown = watch_the_switch(choose, client, project)
        assert again_and_again(lambda: publish(service, key, SECOND, log)) >= 1
        import_missing(service, key, SECOND)  # the worker's next look finds what came late
        assert set(shown) == {5}  # asked for twice where the answer was lost
        assert service.registry.active(key) == SECOND
    assert client.project(project.id).model_version == SECOND
    assert client.model_versions(project.id) == {SECOND: 5}
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
        assert set(learnt(service, key, 1)) == {sha256(image) for image in IMAGES[2:]}
        assert used_tasks(service.database, key) == set(tasks[2:])
        assert cycle_row(service, key).facts["annotated"] == 3


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


def learnt(service: Service, key: str, number: int) -> list[str]:
    images = read_coco(service.cycle_folder(key, number) / "training.json", Path("/")).images
    return [image.image_id for image in images if len(image.labels) == 1]


def watch_the_switch(choose: Trouble, client: LabelStudioClient, project: Project) -> list[int]:
    """How many predictions of the second version there were whenever Label Studio was asked to show it."""
    found: list[int] = []

    def look(call: Call) -> None:
        if call.method == "PATCH" and SECOND.encode() in call.body:
            found.append(client.model_versions(project.id).get(SECOND, 0))

    choose.look = look
    return found
