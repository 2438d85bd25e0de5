"""Annotated images whose host is away when a cycle takes its snapshot: waited for, postponed, and learnt in the end."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ml_backend import postponed
from ml_backend.cycle import snapshot
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, ProjectRow, used_tasks
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.postponed import postponed_tasks
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from model.dataset import read_coco
from model.errors import TSPError
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result
from tests.ml_backend.examples import begin_cycle, cycle_row, grey_images, import_images, key_of, settings, sha256
from tests.ml_backend.test_frozen import image_server

pytestmark = pytest.mark.label_studio

IMAGES = grey_images(3)
HERE, FIRST_AWAY, SECOND_AWAY = range(3)  # numbers of images
SILENT, BUSY = Fault(kind="refuse"), Fault(kind="status", status=503)


class Host:
    """Somebody else's image server. While `fault` is set it gives no image."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.asked: list[str] = []

    def __call__(self, call: Call) -> Fault | None:
        self.asked.append(call.path)
        return self.fault


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def urls(host: Host, tmp_path: Path) -> Iterator[list[str]]:
    """The addresses of two images of the host, and of one that another host does not have."""
    folder = tmp_path / "host"
    folder.mkdir()
    for number in (FIRST_AWAY, SECOND_AWAY):
        (folder / f"{number}.png").write_bytes(IMAGES[number])
    with image_server(folder) as url, FaultProxy(url, host) as proxy:
        yield [*(f"{proxy.url}/{number}.png" for number in (FIRST_AWAY, SECOND_AWAY)), f"{url}/gone.png"]


@pytest.fixture
def service(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(
        settings(
            tmp_path,
            **place,
            TSP_ALLOWED_IMAGE_HOSTS="127.0.0.0/8",
            TSP_VALIDATION_FRACTION=0,
            TSP_BATCH_SIZE=2,
        )
    )
    yield service
    service.close()


@pytest.fixture
def key(service: Service, project: Project) -> str:
    return key_of(service, project)


@pytest.fixture
def tasks(client: LabelStudioClient, project: Project, urls: list[str]) -> list[int]:
    """Annotated ones, with an image each: one in the task itself, two of the host, one that nobody has."""
    tasks = import_images(client, project, [IMAGES[HERE], *urls])
    for task in tasks:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    return tasks


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postponed, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(postponed, "_LOOK_AGAIN_SECONDS", 0.0)


class Waiting(CycleLog):
    """Does something when the snapshot has waited for images this many times."""

    def __init__(self, service: Service, key: str, *, times: int, do: Callable[[], None]) -> None:
        super().__init__(service.database, key, 1)
        self.reasons: list[str] = []
        self._times, self._do = times, do

    def wait(self, reason: str) -> None:
        super().wait(reason)
        self.reasons.append(reason)
        if len(self.reasons) == self._times:
            self._do()


def learnt(service: Service, key: str, number: int = 1) -> list[str]:
    images = read_coco(service.cycle_folder(key, number) / "training.json", Path("/")).images
    return [image.image_id for image in images]


def hashes(*numbers: int) -> list[str]:
    return [sha256(IMAGES[number]) for number in numbers]


@pytest.mark.parametrize("fault", [SILENT, BUSY], ids=["is silent", "is busy"])
def test_a_snapshot_waits_for_images_whose_host(
    fault: Fault, service: Service, key: str, tasks: list[int], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postponed, "_ASK_AGAIN_SECONDS", 0.01)
    host.fault = fault

    def come_back() -> None:
        told = cycle_row(service, key)
        assert told.stage == "waiting for 2 annotated images whose hosts are away"
        assert told.facts["waiting"]["for"] == log.reasons[0]
        host.fault = None

    begin_cycle(service, key)
    log = Waiting(service, key, times=3, do=come_back)
    snapshot(service, key, 1, log)
    assert len(log.reasons) == 3
    assert learnt(service, key) == hashes(HERE, FIRST_AWAY, SECOND_AWAY)
    assert used_tasks(service.database, key) == set(tasks)
    facts = cycle_row(service, key).facts
    assert (facts["annotated"], facts["problem_count"], "waiting" in facts) == (4, 1, False)
    assert postponed_tasks(service.database, key) == set()


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("fault", [SILENT, BUSY], ids=["is silent", "is busy"])
def test_what_stays_away_starts_one_cycle_when_it_is_there_and_none_before(
    fault: Fault, service: Service, client: LabelStudioClient, key: str, tasks: list[int], host: Host
) -> None:
    here, *away, gone = tasks
    host.fault = fault
    log = begin_cycle(service, key)
    snapshot(service, key, 1, log)
    log.finish("done")
    assert learnt(service, key) == hashes(HERE)
    assert used_tasks(service.database, key) == {here, gone}  # what is broken has had its turn
    assert postponed_tasks(service.database, key) == set(away)
    facts = cycle_row(service, key).facts
    assert (facts["annotated"], facts["problem_count"]) == (4, 3)
    assert sum("it counts for the next batch once it is there" in problem for problem in facts["problems"]) == 2

    for _ in range(2):  # a whole batch is not learnt, but would not be learnt now either
        assert not reconcile(service, key).start
    with service.database.session() as session:
        row = session.get_one(ProjectRow, key)
        assert (row.annotated, row.new_annotated) == (4, 0)

    host.fault = None
    assert reconcile(service, key).reason == "2 newly annotated images (a batch is 2)"
    host.fault = fault  # the images are in the cache by now
    log = CycleLog(service.database, key, 2)
    log.begin()
    snapshot(service, key, 2, log)
    log.finish("done")
    assert learnt(service, key, 2) == hashes(HERE, FIRST_AWAY, SECOND_AWAY)
    assert used_tasks(service.database, key) == set(tasks)
    assert not reconcile(service, key).start


def test_a_silent_host_is_asked_for_one_image_and_a_second_snapshot_does_not_wait_again(
    service: Service, key: str, tasks: list[int], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postponed, "_PATIENCE_SECONDS", 0.0)
    host.fault = SILENT
    first = begin_cycle(service, key)
    snapshot(service, key, 1, first)
    first.finish("done")
    assert len(host.asked) == 1
    monkeypatch.undo()  # ten minutes
    assert not reconcile(service, key).start  # within a minute nobody is asked again
    assert len(host.asked) == 1
    log = begin_cycle(service, key, 2)
    snapshot(service, key, 2, log)
    assert len(host.asked) == 2
    assert postponed_tasks(service.database, key) == set(tasks[1:3])


@pytest.mark.usefixtures("_impatient")
def test_a_look_that_takes_long_leaves_the_rest_for_the_next(
    service: Service, key: str, tasks: list[int], host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.fault = BUSY
    log = begin_cycle(service, key)
    snapshot(service, key, 1, log)
    log.finish("done")
    host.fault = None
    monkeypatch.setattr(postponed, "_LOOK_SECONDS", -1.0)
    for at_once in (200, 1):
        monkeypatch.setattr(postponed, "_LOOKED_AT_ONCE", at_once)
        assert not reconcile(service, key).start
        assert postponed_tasks(service.database, key) == set(tasks[1:3])
    monkeypatch.setattr(postponed, "_LOOK_SECONDS", 20.0)
    assert reconcile(service, key).start


@pytest.mark.usefixtures("_impatient")
def test_a_project_all_of_whose_images_are_away_trains_by_itself_when_they_are_back(
    service: Service, client: LabelStudioClient, project: Project, key: str, urls: list[str], host: Host
) -> None:
    for task in import_images(client, project, urls[:2]):
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    host.fault = SILENT
    log = begin_cycle(service, key)
    with pytest.raises(TSPError, match=r"none of the 2 annotated tasks can be trained on \(0 are .*, 2 have problems"):
        snapshot(service, key, 1, log)
    log.finish("failed")
    assert not reconcile(service, key).start
    host.fault = None
    assert reconcile(service, key).start
    with service.database.session() as session:
        assert session.get_one(CycleRow, (key, 2)).status == "planned"
