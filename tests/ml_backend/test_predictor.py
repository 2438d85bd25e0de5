"""Predictions on demand; most of it is tested through `/predict` in test_app.py."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from fastapi.testclient import TestClient

from ml_backend.app import create_app
from ml_backend.errors import StoreUnavailableError, TooManyTasksError
from ml_backend.ls_format import Json
from ml_backend.order import keep_order, order_of, published_order_of
from ml_backend.pool import load_to_look
from ml_backend.predictor import UNTRAINED, Predictor
from ml_backend.service import Service
from model.empty_images import EmptyImagePolicy
from model.errors import RegistryError
from scripts.tiny_version import tiny_version
from tests.label_studio import POLYGON_CONFIG
from tests.ml_backend.examples import KEY, UID, VERSION, add_version, data_uri, grey_images, settings, sha256

TASKS = [{"id": number, "data": {"image": data_uri(png)}} for number, png in enumerate(grey_images(4), start=1)]
SECOND = "tsp-2-00000000"
OTHER_CLASSES = POLYGON_CONFIG.replace("cell", "nucleus").replace("lesion", "axon")


class Loads:
    """Which projects' networks were loaded, in that order, and which of them are in the memory."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self._networks: list[tuple[str, ReferenceType[torch.nn.Module]]] = []

    def note(self, key: str, network: torch.nn.Module) -> None:
        self.keys.append(key)
        self._networks.append((key, ref(network)))

    def alive(self) -> list[str]:
        return sorted(key for key, network in self._networks if network() is not None)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    noted = Loads()

    def load(service: Service, key: str, version: str) -> Any:
        loaded = load_to_look(service, key, version)
        noted.note(key, loaded[0])
        return loaded

    monkeypatch.setattr("ml_backend.loaded_version.load_to_look", load)
    return noted


class Interrupted(list[dict[str, Any]]):
    """Tasks before each of which something else is done."""

    def __init__(self, tasks: list[dict[str, Any]], do: Callable[[], None]) -> None:
        super().__init__(tasks)
        self._do = do

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for task in super().__iter__():
            self._do()
            yield task


def keeping(service: Service, versions: int) -> Service:
    """The service with so many versions in the memory."""
    return replace(service, settings=service.settings.model_copy(update={"loaded_versions": versions}))


def add_projects(service: Service, count: int) -> list[str]:
    """Projects whose versions answer differently; their keys."""
    keys = [f"{number}-1700000000" for number in range(1, count + 1)]
    for number, key in enumerate(keys, start=1):
        card, network = tiny_version(VERSION, ("cell", "lesion"))
        for weights in network.roi_heads.parameters():
            weights.data.mul_(1 + 0.1 * number)
        service.registry.add(key, card, network)
        service.registry.activate(key, VERSION)
    return keys


@pytest.fixture
def predictor(lonely_service: Service) -> Predictor:
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    return Predictor(lonely_service)


def test_there_is_a_version_before_the_first_model(lonely_service: Service) -> None:
    predictor = Predictor(lonely_service)
    assert predictor.version(KEY) == UNTRAINED
    assert [p["model_version"] for p in predictor.predict(KEY, TASKS, POLYGON_CONFIG)] == [UNTRAINED] * 4


def test_a_task_gets_the_same_prediction_alone_and_among_others(predictor: Predictor) -> None:
    together = predictor.predict(KEY, TASKS, POLYGON_CONFIG)
    assert [predictor.predict(KEY, [task], POLYGON_CONFIG)[0] for task in TASKS] == together


def test_threads_may_share_a_predictor(predictor: Predictor) -> None:
    expected = [predictor.predict(KEY, [task], POLYGON_CONFIG) for task in TASKS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: predictor.predict(KEY, [task], POLYGON_CONFIG), TASKS * 3))
    assert found == expected * 3


def test_classes_that_the_project_no_longer_has_are_not_shown(lonely_service: Service) -> None:
    add_version(lonely_service, KEY, class_names=("axon", "gone"))
    lonely_service.registry.activate(KEY, VERSION)
    predictions = Predictor(lonely_service).predict(KEY, TASKS, OTHER_CLASSES)
    labels = {label for p in predictions for region in p["result"] for label in region["value"]["polygonlabels"]}
    assert labels <= {"axon"}


def test_one_task_does_not_wait_for_the_many_of_another_request(predictor: Predictor) -> None:
    expected = predictor.predict(KEY, TASKS, POLYGON_CONFIG)
    others: list[list[Json]] = []
    with ThreadPoolExecutor(1) as pool:

        def ask() -> None:
            others.append(pool.submit(predictor.predict, KEY, TASKS[:1], POLYGON_CONFIG).result(timeout=60))

        assert predictor.predict(KEY, Interrupted(TASKS, ask), POLYGON_CONFIG) == expected
    assert others == [expected[:1]] * 4


def test_the_version_that_was_used_least_lately_goes_and_comes_back_the_same(
    lonely_service: Service, loads: Loads
) -> None:
    predictor = Predictor(keeping(lonely_service, 2))
    projects = add_projects(lonely_service, 3)
    gc.disable()  # nothing else is needed
    try:
        first = [predictor.predict(key, TASKS, POLYGON_CONFIG) for key in projects]
        assert first[0] != first[1] != first[2]
        assert loads.alive() == projects[1:]
        predictor.predict(projects[1], TASKS[:1], POLYGON_CONFIG)
        assert predictor.predict(projects[0], TASKS, POLYGON_CONFIG) == first[0]
        assert loads.alive() == [projects[0], projects[1]]
    finally:
        gc.enable()
    assert predictor.predict(projects[2], TASKS, POLYGON_CONFIG) == first[2]
    assert loads.keys == [*projects, projects[0], projects[2]]


def test_a_version_takes_the_room_of_its_predecessor(lonely_service: Service, loads: Loads) -> None:
    predictor = Predictor(keeping(lonely_service, 2))
    projects = add_projects(lonely_service, 2)
    for key in projects:
        predictor.predict(key, TASKS[:1], POLYGON_CONFIG)
    add_version(lonely_service, projects[1], SECOND)
    lonely_service.registry.activate(projects[1], SECOND)
    for key in (*projects[::-1], *projects):
        predictor.predict(key, TASKS[:1], POLYGON_CONFIG)
    assert loads.keys == [*projects, projects[1]]
    assert loads.alive() == projects


def test_requests_that_come_together_load_a_version_once(lonely_service: Service, loads: Loads) -> None:
    predictor = Predictor(keeping(lonely_service, 2))
    projects = add_projects(lonely_service, 2)
    expected = {key: Predictor(lonely_service).predict(key, TASKS, POLYGON_CONFIG) for key in projects}
    loads.keys.clear()
    together = Barrier(8)

    def ask(number: int) -> tuple[str, list[Json]]:
        together.wait(timeout=60)
        key = projects[number % 2]
        return key, predictor.predict(key, TASKS, POLYGON_CONFIG)

    with ThreadPoolExecutor(8) as pool:
        for key, found in pool.map(ask, range(8)):
            assert found == expected[key]
    assert sorted(loads.keys) == projects


def test_a_request_keeps_its_version_while_others_need_the_room(lonely_service: Service, loads: Loads) -> None:
    predictor = Predictor(keeping(lonely_service, 1))
    projects = add_projects(lonely_service, 3)
    expected = predictor.predict(projects[0], TASKS, POLYGON_CONFIG)
    found: list[list[Json]] = []
    with ThreadPoolExecutor(1) as pool:

        def ask() -> None:
            asked = [pool.submit(predictor.predict, projects[n], TASKS[:1], POLYGON_CONFIG) for n in (1, 2, 0)]
            found.extend(answer.result(timeout=60) for answer in asked)

        assert predictor.predict(projects[0], Interrupted(TASKS, ask), POLYGON_CONFIG) == expected
    assert found[2::3] == [expected[:1]] * 4
    # The first questions are asked before the request has one; from then on its own serves the others, too.
    assert loads.keys.count(projects[0]) == 2
    assert loads.alive() == [projects[0]]


def test_what_follows_the_first_load_is_done_once(lonely_service: Service) -> None:
    done: list[int] = []
    predictor = Predictor(keeping(lonely_service, 1), after_first_load=lambda: done.append(1))
    for key in add_projects(lonely_service, 2) * 2:
        predictor.predict(key, TASKS[:1], POLYGON_CONFIG)
    assert done == [1]


def test_more_tasks_than_label_studio_waits_for_are_refused(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.predict(KEY, TASKS, POLYGON_CONFIG)
    monkeypatch.setattr("ml_backend.predictor._MOST_SECONDS", 0.5)
    looks: list[int] = []

    def dawdle(*_: object) -> None:
        looks.append(1)
        time.sleep(0.3)

    predictor._kept[KEY]._network.register_forward_pre_hook(dawdle)
    with pytest.raises(TooManyTasksError, match=r"[0-2] of 4 tasks were done, and none is kept"):
        predictor.predict(KEY, TASKS, POLYGON_CONFIG)
    assert len(looks) < len(TASKS)


def test_who_waits_for_another_request_all_the_time_is_refused_as_well(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.predict(KEY, TASKS[:1], POLYGON_CONFIG)
    monkeypatch.setattr("ml_backend.predictor._MOST_SECONDS", 0.1)
    over = Event()
    other = predictor._networks.submit(over.wait)
    with pytest.raises(TooManyTasksError, match="0 of 1 tasks were done"):
        predictor.predict(KEY, TASKS[:1], POLYGON_CONFIG)
    over.set()
    assert other.result(timeout=60)
    predictor._networks.submit(lambda: None).result(timeout=60)  # what was refused is not done later


def test_an_image_that_does_not_fit_into_memory_spares_the_others(predictor: Predictor) -> None:
    expected = predictor.predict(KEY, TASKS, POLYGON_CONFIG)
    looks: list[int] = []

    def refuse_the_second(*_: object) -> None:
        looks.append(1)
        if len(looks) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    network = predictor._kept[KEY]._network
    network.register_forward_pre_hook(refuse_the_second)
    found = predictor.predict(KEY, TASKS, POLYGON_CONFIG)
    assert (found[1]["result"], found[1]["score"]) == ([], 1.0)
    assert [found[n] for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]


def test_a_version_that_vanished_is_an_error_that_names_it(predictor: Predictor, lonely_service: Service) -> None:
    folder = lonely_service.registry.root / KEY / VERSION
    (folder / "weights.safetensors").unlink()
    with pytest.raises(RegistryError, match=f"version {VERSION} of {KEY} is damaged"):
        predictor.predict(KEY, TASKS, POLYGON_CONFIG)


# With a store


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Service]]:
    """The service with a MODEL_DIR of its own and a common store; in one of three scored images nothing was found."""
    (tmp_path / "store").mkdir()
    made: list[Service] = []

    def service(name: str) -> Service:
        place = {"store_url": f"file://{tmp_path / 'store'}", "model_dir": tmp_path / name}
        of_this_machine = settings(tmp_path).model_copy(update=place)
        made.append(Service.connect(of_this_machine, remembers_seconds=1e-9))
        return made[-1]

    worker = service("worker")
    add_version(worker, KEY)
    worker.registry.activate(KEY, VERSION)
    scores = worker.scores_file(KEY, VERSION)
    scores.parent.mkdir(parents=True)
    lines = [{"task": task, "image": sha256(b""), "score": score} for task, score in enumerate((0.25, None, 0.75))]
    scores.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    worker.share_lines(scores)
    keep_order(worker, KEY, VERSION, order_of(worker, KEY, VERSION))
    yield service
    for one in made:
        one.close()


def test_a_machine_that_answers_needs_no_lines_of_what_was_scored(machine: Callable[[str], Service]) -> None:
    web = machine("web")
    assert published_order_of(web, KEY, VERSION) == order_of(machine("worker"), KEY, VERSION)
    assert len(Predictor(web).predict(KEY, TASKS, POLYGON_CONFIG)) == 4
    assert not web.scores_file(KEY, VERSION).exists()


def test_with_another_policy_for_empty_images_the_lines_are_looked_at(machine: Callable[[str], Service]) -> None:
    web = machine("web")
    assert published_order_of(web, KEY, VERSION).when_empty == 0.5
    last = replace(web, settings=web.settings.model_copy(update={"empty_policy": EmptyImagePolicy.LAST}))
    assert published_order_of(last, KEY, VERSION).when_empty == 1.0


def test_while_the_store_is_away_images_are_had_from_their_hosts(
    machine: Callable[[str], Service], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.store._REST_SECONDS", 0.0)
    web, store, away = machine("web"), tmp_path / "store", tmp_path / "away"
    told = "images come from their hosts for the time being: the store does not answer"
    predictor = Predictor(web)
    predictor.predict(KEY, TASKS[:1], POLYGON_CONFIG)
    store.rename(away)
    without = [predictor.predict(KEY, TASKS, POLYGON_CONFIG) for _ in range(2)][-1]
    assert [answer["model_version"] for answer in without] == [VERSION] * 4
    assert caplog.text.count(told) == 1
    away.rename(store)
    assert len(list(store.glob("cache/index/*/*"))) == 1  # that of before
    assert predictor.predict(KEY, TASKS, POLYGON_CONFIG) == without
    assert len(list(store.glob("cache/index/*/*"))) == 4  # now they are kept
    store.rename(away)
    another = data_uri(grey_images(5)[-1])
    web.images.fetch(task_id=5, uri=another, may_do_without_store=True)
    assert caplog.text.count(told) == 2
    with pytest.raises(StoreUnavailableError):  # a worker waits: others must find there what it knows
        web.images.fetch(task_id=5, uri=another)


def test_while_the_store_is_away_no_project_is_connected(
    machine: Callable[[str], Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ml_backend.store._REST_SECONDS", 0.0)
    web, store, away = machine("web"), tmp_path / "store", tmp_path / "away"
    question = {"project": UID, "schema": POLYGON_CONFIG}
    with TestClient(create_app(web.settings)) as client:
        store.rename(away)
        answer = client.post("/setup", json=question)
        assert answer.status_code == 503
        assert "the folder is not there: create it, or mount it" in answer.json()["detail"]
        assert client.get("/status").json()["projects"] == []
        away.rename(store)
        assert client.post("/setup", json=question).json() == {"model_version": VERSION}
        assert [project["key"] for project in client.get("/status").json()["projects"]] == [KEY]
