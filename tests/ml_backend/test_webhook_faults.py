"""Whatever becomes of webhooks on their way, the planner and the model know the same in the end: a web process of its
own, a real Label Studio, and between them what loses, doubles and spoils the events."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from ml_backend import inbox
from ml_backend.cycle import snapshot
from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, EventRow, ProjectRow, UsedTaskRow
from ml_backend.inbox import ProjectName
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from model.dataset import read_coco
from scripts.backend_processes import BackendProcesses
from scripts.fault_proxy import Call, Fault, FaultProxy, Kind
from scripts.label_studio_server import LabelStudioServer, free_port
from tests.label_studio import POLYGON_CONFIG, polygon_result, raw_api
from tests.ml_backend.examples import grey_images, import_images, settings, sha256

pytestmark = pytest.mark.label_studio

BATCH = 2
IMAGES = grey_images(11)
LATE = 9  # the image whose task is imported while the first cycle runs
INDEX = {sha256(image): number for number, image in enumerate(IMAGES)}
JSON_BODY = {"Content-Type": "application/json"}


@dataclass(kw_only=True)
class Site:
    """Label Studio, a web process behind a proxy that can spoil /webhook, and the reconciler on the same database."""

    server: LabelStudioServer
    client: LabelStudioClient
    api: httpx.Client
    service: Service
    web: BackendProcesses
    proxy: FaultProxy
    fault: Kind | None
    calls: list[bytes]  # bodies of events, as Label Studio sent them
    other: Project  # connected as well; nobody annotates in it

    def post(self, body: bytes) -> int:
        """An event on a way of its own; the status."""
        return httpx.post(f"{self.web.url}/webhook", content=body, headers=JSON_BODY, timeout=30).status_code


@pytest.fixture(scope="module")
def site(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("webhooks")
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    ours = settings(folder, TSP_BATCH_SIZE=BATCH, TSP_VALIDATION_FRACTION=0, **place)
    environment = {**place, "MODEL_DIR": str(ours.model_dir), "PORT": str(free_port()), "TSP_THREADS": "1"}
    web = BackendProcesses(settings=environment, log_dir=folder)
    service = Service.connect(ours)

    def look(call: Call) -> None:
        if call.path == "/webhook":
            site.calls.append(call.body)

    def choose(call: Call) -> Fault | None:
        return Fault(kind=site.fault) if site.fault and call.path == "/webhook" else None

    with (
        LabelStudioClient(label_studio.url, label_studio.token) as client,
        raw_api(label_studio) as api,
        FaultProxy(web.url, choose, look=look) as proxy,
    ):
        try:
            web.start_one("web")
            web.wait_until_it_answers()
            other = client.create_project(title="another", label_config=POLYGON_CONFIG)
            client.connect_backend(other.id, url=web.url, title="TSP")
            site = Site(
                server=label_studio, client=client, api=api, service=service, web=web, proxy=proxy, fault=None,
                calls=[], other=other,
            )  # fmt: skip
            yield site
        finally:
            web.stop()
            service.close()


class Annotator:
    """What people do in one project; tasks are named by the numbers of their images."""

    def __init__(self, site: Site, project: Project) -> None:
        self._site, self._project = site, project
        self.tasks: dict[int, int] = {}  # image -> task
        self._annotations: dict[int, int] = {}  # image -> its newest annotation

    def add_tasks(self, *images: int) -> None:
        made = import_images(self._site.client, self._project, [IMAGES[image] for image in images])
        self.tasks |= dict(zip(images, made, strict=True))

    def annotate(self, *images: int) -> None:
        for image in images:
            self._annotations[image] = self._site.client.submit_annotation(
                self.tasks[image], result=[polygon_result()], lead_time_seconds=1
            )

    def skip(self, image: int) -> None:
        self._annotations[image] = self._site.client.skip(self.tasks[image])

    def change(self, image: int, label: str = "lesion") -> None:
        """Another label; what was skipped is no longer."""
        fields = {"result": [polygon_result(label=label)], "was_cancelled": False}
        self._ask("PATCH", f"/api/annotations/{self._annotations[image]}/", json=fields)

    def delete(self, image: int) -> None:
        self._ask("DELETE", f"/api/annotations/{self._annotations[image]}/")

    def to_draft(self, image: int) -> None:
        self._ask("POST", f"/api/annotations/{self._annotations[image]}/convert-to-draft")

    def delete_task(self, image: int) -> None:
        self._ask("DELETE", f"/api/tasks/{self.tasks.pop(image)}/")

    def delete_all_of(self, *images: int) -> None:
        """One event for the annotations of several tasks."""
        self._act("delete_tasks_annotations", *images)

    def accept_predictions_of(self, *images: int) -> None:
        """One event for several new annotations."""
        rows = [
            {"task": self.tasks[image], "model_version": "theirs", "score": 0.5, "result": [polygon_result(score=0.5)]}
            for image in images
        ]
        self._site.client.import_predictions(self._project.id, rows)
        self._act("predictions_to_annotations", *images)

    def _act(self, action: str, *images: int) -> None:
        chosen = {"selectedItems": {"all": False, "included": [self.tasks[image] for image in images]}}
        self._ask("POST", "/api/dm/actions", params={"id": action, "project": self._project.id}, json=chosen)

    def _ask(self, method: str, path: str, **options: Any) -> None:
        self._site.api.request(method, path, **options).raise_for_status()


@dataclass(frozen=True)
class State:
    """What decides when a cycle starts and what it learns, with tasks named by their images."""

    annotated: int
    new: int
    cycles: tuple[str, ...]  # why each started
    used: Mapping[int, int]  # image -> the first cycle that had it
    learnt: tuple[Mapping[int, tuple[int, ...]], ...]  # by cycle: image -> its labels


class Play:
    """A project in which people act, a cycle runs, people act on, and the next cycle takes its snapshot."""

    def __init__(self, site: Site, name: str) -> None:
        self._site, self._service = site, site.service
        self.project = site.client.create_project(title=name[:50], label_config=POLYGON_CONFIG)
        site.client.connect_backend(self.project.id, url=site.proxy.url, title="TSP")
        known = ProjectName.from_uid(self.project.uid)
        assert known is not None
        self.key = known.key
        self._annotator = Annotator(site, self.project)
        self._annotator.add_tasks(*(image for image in range(len(IMAGES)) if image != LATE))
        self._tasks = dict(self._annotator.tasks)
        site.calls.clear()

    def run(self, deliver: Callable[[], None] = lambda: None) -> State:
        """`deliver` brings what was held back, when people have done everything and the cycle is over."""
        begin(self._annotator)
        reconcile(self._service, self.key)
        log = self._begin(1)
        go_on(self._annotator)
        self._tasks |= self._annotator.tasks
        assert not reconcile(self._service, self.key).start
        log.finish("done")
        deliver()
        reconcile(self._service, self.key)
        assert inbox.unhandled(self._service.database, self.key) == []
        with self._service.database.session() as session:
            row = session.get_one(ProjectRow, self.key)
        self._begin(2)
        return self._state(row.annotated, row.new_annotated)

    def received(self) -> Counter[str]:
        """The events about annotations that have come."""
        with self._service.database.session() as session:
            query = select(EventRow.action).where(EventRow.project_key == self.key)
            return Counter(action for action in session.scalars(query) if "ANNOTATION" in action)

    def _begin(self, number: int) -> CycleLog:
        """The cycle that the reconciler has planned takes its snapshot."""
        log = CycleLog(self._service.database, self.key, number)
        log.begin()
        snapshot(self._service, self.key, number, log)
        return log

    def _state(self, annotated: int, new: int) -> State:
        image_of = {task: image for image, task in self._tasks.items()}
        with self._service.database.session() as session:
            used = session.scalars(select(UsedTaskRow).where(UsedTaskRow.project_key == self.key)).all()
            cycles = session.scalars(select(CycleRow).where(CycleRow.project_key == self.key)).all()
        learnt = []
        for cycle in sorted(cycles, key=lambda cycle: cycle.number):
            folder = self._service.cycle_folder(self.key, cycle.number)
            images = read_coco(folder / "training.json", Path("/")).images
            learnt.append({INDEX[image.image_id]: tuple(map(int, image.labels)) for image in images})
        return State(
            annotated, new, tuple(c.reason for c in cycles), {image_of[u.task_id]: u.first_cycle for u in used},
            tuple(learnt),
        )  # fmt: skip


def begin(people: Annotator) -> None:
    """Before the first cycle."""
    people.annotate(0, 1, 2, 3)
    people.skip(4)
    people.skip(10)
    people.change(1)
    people.delete(2)
    people.to_draft(3)


def go_on(people: Annotator) -> None:
    """While the first cycle runs."""
    people.change(4)
    people.annotate(5)
    people.accept_predictions_of(6, 7)
    people.delete_all_of(0, 6)
    people.delete_task(1)
    people.delete_task(8)
    people.add_tasks(LATE)
    people.annotate(LATE)


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> tuple[State, Counter[str]]:
    """What all of this leads to when every event arrives at once, and the events about annotations."""
    play = Play(site, "nothing goes wrong")
    return play.run(), play.received()


CELL, LESION, NOTHING = (1,), (2,), None


@pytest.mark.parametrize(
    ("image", "learnt"),
    [
        pytest.param(5, [NOTHING, CELL], id="is annotated while a cycle runs"),
        pytest.param(1, [LESION, NOTHING], id="is changed, and its task deleted while a cycle runs"),
        pytest.param(2, [NOTHING, NOTHING], id="loses its annotation"),
        pytest.param(0, [CELL, NOTHING], id="loses its annotation, with others, while a cycle runs"),
        pytest.param(3, [NOTHING, NOTHING], id="is turned into a draft"),
        pytest.param(10, [NOTHING, NOTHING], id="is skipped"),
        pytest.param(4, [NOTHING, LESION], id="is skipped and is not skipped any more"),
        pytest.param(7, [NOTHING, CELL], id="is annotated with others at once"),
        pytest.param(6, [NOTHING, NOTHING], id="is annotated with others at once, and they are deleted at once"),
        pytest.param(8, [NOTHING, NOTHING], id="loses its task while a cycle runs"),
        pytest.param(9, [NOTHING, CELL], id="gets its task while a cycle runs"),
    ],
)
def test_both_cycles_learn_what_people_left_in_label_studio_of_an_image_that(
    undisturbed: tuple[State, Counter[str]], image: int, learnt: list[tuple[int, ...] | None]
) -> None:
    state, _ = undisturbed
    assert [cycle.get(image) for cycle in state.learnt] == learnt
    first = next((number for number, labels in enumerate(learnt, start=1) if labels), None)
    assert state.used.get(image) == first


def test_the_planner_counts_images_and_not_events(undisturbed: tuple[State, Counter[str]]) -> None:
    state, events = undisturbed
    assert (state.annotated, state.new) == (4, 4)
    assert state.cycles == tuple(f"{new} newly annotated images (a batch is 2)" for new in (2, 4))
    assert events == {  # none of the draft
        "ANNOTATION_CREATED": 8,
        "ANNOTATIONS_CREATED": 1,
        "ANNOTATION_UPDATED": 2,
        "ANNOTATIONS_DELETED": 2,
    }


Delivery = Callable[[Site, list[bytes]], None]


def as_they_are(site: Site, events: list[bytes]) -> None:
    assert {site.post(event) for event in events} == {200}


def in_reverse(site: Site, events: list[bytes]) -> None:
    as_they_are(site, events[::-1])


def for_another_project(site: Site, events: list[bytes]) -> None:
    project = {"id": site.other.id, "created_at": site.other.created_at.isoformat()}
    as_they_are(site, [json.dumps({**json.loads(event), "project": project}).encode() for event in events])
    name = ProjectName.from_uid(site.other.uid)
    assert name is not None
    assert not reconcile(site.service, name.key).start
    with site.service.database.session() as session:
        assert session.get_one(ProjectRow, name.key).annotated == 0


def malformed(site: Site, events: list[bytes]) -> None:
    spoilt = [event[: len(event) // 2] for event in events]
    spoilt += [json.dumps({**json.loads(event), "project": [], "action": None}).encode() for event in events]
    assert {site.post(event) for event in spoilt} == {422}


def without_task_ids(site: Site, events: list[bytes]) -> None:
    known = [json.loads(event) for event in events]
    as_they_are(site, [json.dumps({"action": e["action"], "project": e["project"]}).encode() for e in known])


def after_a_restart(site: Site, events: list[bytes]) -> None:
    """They were sent to nobody, and Label Studio does not send them again."""
    site.web.start_one("web")
    site.web.wait_until_it_answers()


def never(site: Site, events: list[bytes]) -> None:
    """Lost, or on their way already."""


@pytest.mark.parametrize(
    ("fault", "deliver", "arrivals"),
    [
        pytest.param("drop", never, 0, id="events are lost"),
        pytest.param("double", never, 2, id="every event comes twice"),
        pytest.param("drop", in_reverse, 1, id="events come in the reverse order"),
        pytest.param("drop", as_they_are, 1, id="events come hours later, when what they tell of is gone"),
        pytest.param(None, after_a_restart, 0, id="the web process is down"),
        pytest.param("drop", for_another_project, 0, id="events are sent for another project"),
        pytest.param("drop", malformed, 0, id="events are malformed"),
        pytest.param("drop", without_task_ids, 1, id="events say nothing of tasks and annotations"),
    ],
)
def test_faults_of_webhooks_change_nothing_in_the_end(
    site: Site, undisturbed: tuple[State, Counter[str]], fault: Kind | None, deliver: Delivery, arrivals: int
) -> None:
    expected, events = undisturbed
    play = Play(site, deliver.__name__)

    def end_of_the_fault() -> None:
        site.fault = None
        sent = [event for event in site.calls if "ANNOTATION" in json.loads(event)["action"]]
        assert Counter(json.loads(event)["action"] for event in sent) == events
        deliver(site, sent)

    site.fault = fault
    if deliver is after_a_restart:
        site.web.kill("web")
    try:
        assert play.run(end_of_the_fault) == expected
    finally:
        site.fault = None
    assert play.received() == {action: arrivals * count for action, count in events.items() if arrivals}
