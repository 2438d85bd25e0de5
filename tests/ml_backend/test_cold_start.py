"""The first batch before there is a version, in a real Label Studio."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ml_backend import cold_start
from ml_backend.cold_start import prepare_first_batch, spread_batch
from ml_backend.first_batch import first_batch
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from ml_backend.ls_format import Json
from ml_backend.ls_types import Project
from ml_backend.overview import overview
from ml_backend.pool import packed, score_pool
from ml_backend.predictor import UNTRAINED, Predictor
from ml_backend.publish import publish
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from model.network import MaskRCNNWithScores, build_model
from scripts.label_studio_server import HOST, LabelStudioServer, free_port
from tests.label_studio import POLYGON_CONFIG, polygon_result, prediction, raw_api
from tests.ml_backend.examples import (
    UNREADABLE,
    VALIDATION_FRACTION,
    VERSION,
    add_version,
    begin_cycle,
    data_uri,
    grey_images,
    import_images,
    key_of,
    phantom_images,
    served_order,
    settings,
    sha256,
)

BATCH = 4  # one of them is for validation


@pytest.fixture
def service(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(
        settings(tmp_path, TSP_COLD_START="spread", TSP_BATCH_SIZE=BATCH, TSP_WEIGHTS="imagenet", **place)
    )
    yield service
    service.close()


@pytest.fixture
def key(service: Service, project: Project) -> str:
    return key_of(service, project)


def prepare(service: Service, key: str) -> int:
    """To the end; how many images were looked at."""
    return sum(1 for _ in prepare_first_batch(service, key))


def batch_of(service: Service, key: str) -> list[int]:
    batch = first_batch(service, key)
    assert batch is not None
    return list(batch.tasks)


def shown_progress(service: Service) -> Json | None:
    (project,) = overview(service)
    shown: Json | None = project["first_batch"]
    return shown


# --- what is chosen

TEACHING = [sha256(image) for image in grey_images(6)]
MEASURING = [sha256(image) for image in grey_images(4, validation=True)]


def lines(images: list[str], features: list[float], first_task: int = 0) -> list[Json]:
    return [
        {"task": first_task + number, "image": image, "feature": packed(np.array([feature]))}
        for number, (image, feature) in enumerate(zip(images, features, strict=False))
    ]


def spread(pool: list[Json], annotated: list[Json], count: int) -> list[int]:
    return spread_batch(pool, annotated, count, validation_fraction=VALIDATION_FRACTION, seed=0)


def test_what_will_train_is_spread_out() -> None:
    pool = lines(TEACHING, [0.0, 0.1, 0.2, 10.0, 10.1, 4.0])
    assert spread(pool, [], 3) == [5, 4, 0]  # the most ordinary one first
    assert spread(pool, lines(TEACHING[:1], [10.0], 100), 2) == [0, 5]  # far from what is annotated


@pytest.mark.parametrize(
    ("count", "measuring"),
    [(0, 0), (1, 0), (2, 1), (4, 1), (10, 3)],
)
def test_the_first_batch_has_its_share_of_images_that_measure(count: int, measuring: int) -> None:
    pool = lines(TEACHING * 2, [*range(12)]) + lines(MEASURING, [*range(4)], 100)
    chosen = spread(pool, [], count)
    assert len(chosen) == len(set(chosen)) == count
    assert sum(task >= 100 for task in chosen) == measuring == round(count * VALIDATION_FRACTION)


def test_those_that_measure_come_evenly_in_between() -> None:
    pool = lines(TEACHING, [*range(6)]) + lines(MEASURING, [*range(4)], 100)
    assert [task >= 100 for task in spread(pool, [], 8)] == [False, False, True, False, False, False, True, False]


@pytest.mark.parametrize(
    "pool", [lines(TEACHING, [1.0]), lines(MEASURING, [1.0]), []], ids=["one", "measuring", "none"]
)
def test_there_may_be_fewer_images_than_wanted(pool: list[Json]) -> None:
    assert spread(pool, [], 5) == [line["task"] for line in pool]


# --- in Label Studio


@pytest.mark.label_studio
def test_the_first_batch_is_served_in_its_order_and_is_no_model(
    service: Service, client: LabelStudioClient, project: Project, key: str, label_studio: LabelStudioServer
) -> None:
    images = phantom_images(8)
    tasks = import_images(client, project, [*images, images[0], UNREADABLE, *phantom_images(2, validation=True)])
    assert prepare(service, key) == len(tasks)
    batch = batch_of(service, key)
    assert len(batch) == BATCH
    assert len(set(batch) & set(tasks[-2:])) == 1
    assert tasks[9] not in batch
    frozen = first_batch(service, key)
    assert frozen is not None
    assert (frozen.is_full, frozen.is_published) == (True, True)
    assert client.model_versions(project.id) == {frozen.version: BATCH}
    shown = client.project(project.id)
    assert (shown.model_version, shown.sampling) == (frozen.version, UNCERTAINTY_SAMPLING)
    with raw_api(label_studio) as api:
        (stored,) = api.get("/api/predictions/", params={"task": batch[2]}).json()
    assert (stored["score"], stored["result"]) == (0.5, [])

    assert service.registry.active(key) is None
    task = {"id": batch[0], "data": {"image": data_uri(images[0])}}
    (answer,) = Predictor(service).predict(key, [task], POLYGON_CONFIG)
    assert (answer["model_version"], answer["result"]) == (UNTRAINED, [])
    assert served_order(client, project)[:BATCH] == batch


@pytest.mark.label_studio
def test_preparing_goes_on_in_the_middle_and_ends_once(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    import_images(client, project, phantom_images(6))
    assert shown_progress(service) is None
    steps = prepare_first_batch(service, key)
    assert len(list(islice(steps, 2))) == 2
    steps.close()  # type: ignore[attr-defined]
    progress = shown_progress(service)
    assert progress is not None
    assert progress["done"] in (1, 2)  # told once a second
    assert (progress["total"], progress["tasks"], progress["is_published"]) == (6, 0, False)
    (path,) = service.scores_folder(key).glob("cold-start-*.jsonl")
    with path.open("a") as file:
        file.write('{"task": 1, "ima')  # cut off
    assert first_batch(service, key) is None
    assert prepare(service, key) == 4
    assert shown_progress(service) == {"done": 6, "total": 6, "tasks": BATCH, "is_published": True}
    before = first_batch(service, key)

    (service.scores_folder(key) / "cold-start.json").unlink()
    client.delete_model_version(project.id, before.version if before else "")
    assert prepare(service, key) == 0
    assert first_batch(service, key) == before  # chosen anew, the same
    client.import_predictions(project.id, [prediction(batch_of(service, key)[0], score=0.9, version="theirs")])
    client.set_model_version(project.id, "theirs")
    import_images(client, project, phantom_images(8)[6:])
    assert prepare(service, key) == 0  # the batch was full
    assert client.project(project.id).model_version == "theirs"  # people may choose


@pytest.mark.label_studio
def test_what_people_did_during_the_looking_counts(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    images = phantom_images(9)
    tasks = import_images(client, project, images[:8])
    steps = prepare_first_batch(service, key)
    next(steps)
    done, skipped = tasks[: BATCH - 1], tasks[-1]
    for task in done:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    client.skip(skipped)
    import_images(client, project, images[8:])
    assert len(list(steps)) == 7
    batch = first_batch(service, key)
    assert batch is not None
    assert (len(batch.tasks), batch.is_full, batch.looked_at) == (1, True, len(tasks))
    assert not set(batch.tasks) & {*done, skipped}


@pytest.mark.label_studio
def test_a_body_at_random_is_the_same_after_a_restart(
    service: Service, client: LabelStudioClient, project: Project, key: str, tmp_path: Path
) -> None:
    place = {
        "LABEL_STUDIO_URL": service.settings.label_studio_url,
        "LABEL_STUDIO_API_KEY": service.settings.require_api_key(),
    }
    tasks = import_images(client, project, phantom_images(4))
    for seed in (0, 1):
        random = Service.connect(
            settings(tmp_path, TSP_COLD_START="spread", TSP_WEIGHTS="none", TSP_SEED=seed, **place)
        )
        before = set(random.scores_folder(key).glob("cold-start-*.jsonl"))
        steps = prepare_first_batch(random, key)
        assert len(list(islice(steps, 2))) == 2
        steps.close()  # type: ignore[attr-defined]
        torch.rand(1)  # what else a process draws
        assert prepare(random, key) == 2
        (path,) = set(random.scores_folder(key).glob("cold-start-*.jsonl")) - before
        restarted = path.read_bytes()
        (random.scores_folder(key) / "cold-start.json").unlink()
        path.unlink()
        assert prepare(random, key) == len(tasks)
        assert path.read_bytes() == restarted
        (random.scores_folder(key) / "cold-start.json").unlink()
        random.close()


@pytest.mark.label_studio
def test_a_publication_that_broke_off_is_completed(
    service: Service,
    client: LabelStudioClient,
    project: Project,
    key: str,
    label_studio: LabelStudioServer,
) -> None:
    import_images(client, project, phantom_images(6))
    prepare(service, key)
    path = service.scores_folder(key) / "cold-start.json"
    batch = first_batch(service, key)
    assert batch is not None
    client.delete_model_version(project.id, batch.version)
    client.import_predictions(project.id, [prediction(batch.tasks[0], score=0.0, version=batch.version)])
    path.write_text(path.read_text().replace('"is_published": true', '"is_published": false'))
    assert prepare(service, key) == 0
    assert client.model_versions(project.id) == {batch.version: BATCH}
    assert client.project(project.id).model_version == batch.version
    assert first_batch(service, key) == batch
    assert served_order(client, project)[:BATCH] == list(batch.tasks)


@pytest.mark.label_studio
def test_a_batch_that_is_not_full_is_chosen_again_when_tasks_come(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    assert prepare(service, key) == 0  # there is nothing yet
    assert client.model_versions(project.id) == {}
    images = phantom_images(8)
    first = import_images(client, project, images[:2])
    assert prepare(service, key) == 2
    assert set(batch_of(service, key)) == set(first)
    assert prepare(service, key) == 0
    client.submit_annotation(first[0], result=[polygon_result()], lead_time_seconds=1)
    import_images(client, project, images[2:])
    assert prepare(service, key) == 6
    batch = first_batch(service, key)
    assert batch is not None
    assert (len(batch.tasks), batch.is_full) == (BATCH - 1, True)  # one is annotated
    assert first[0] not in batch.tasks
    assert client.model_versions(project.id) == {batch.version: BATCH - 1}
    assert served_order(client, project)[: BATCH - 1] == list(batch.tasks)


@pytest.mark.label_studio
def test_images_whose_host_is_away_join_a_batch_that_is_not_full_when_it_is_back(
    service: Service, client: LabelStudioClient, project: Project, key: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    place = {
        "LABEL_STUDIO_URL": service.settings.label_studio_url,
        "LABEL_STUDIO_API_KEY": service.settings.require_api_key(),
    }
    environment = {"TSP_COLD_START": "spread", "TSP_BATCH_SIZE": BATCH, "TSP_ALLOWED_IMAGE_HOSTS": HOST, **place}
    port, images = free_port(), phantom_images(4)
    (tmp_path / "files").mkdir()
    for number, image in enumerate(images[2:]):
        (tmp_path / "files" / f"{number}.png").write_bytes(image)
    own = import_images(client, project, images[:2])
    foreign = import_images(client, project, [f"http://{HOST}:{port}/{number}.png" for number in (0, 1, 2)])
    with closing(Service.connect(settings(tmp_path, **environment))) as service:
        assert prepare(service, key) == 5  # nothing listens there
        batch = first_batch(service, key)
        assert set(batch_of(service, key)) == set(own)
        assert caplog.text.count("3 images are looked at later") == 1
        assert prepare(service, key) == 3
        assert first_batch(service, key) == batch  # there is nothing new to choose from

        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "files"))
        with ThreadingHTTPServer((HOST, port), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert prepare(service, key) == 3
            server.shutdown()
        assert set(batch_of(service, key)) == {*own, *foreign[:2]}
        batch = first_batch(service, key)
        assert batch is not None
        assert (batch.is_full, batch.looked_at) == (True, 5)  # 404 stays an answer
        assert client.model_versions(project.id) == {batch.version: BATCH}


@pytest.mark.label_studio
def test_a_batch_that_an_older_release_chose_is_gone_on_with(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    import_images(client, project, phantom_images(2))
    prepare(service, key)
    path, batch = service.scores_folder(key) / "cold-start.json", first_batch(service, key)
    older = json.loads(path.read_text())
    older["newest_task"] = older.pop("looked_at")
    path.write_text(json.dumps(older))
    assert prepare(service, key) == 0
    assert first_batch(service, key) == batch


@pytest.mark.label_studio
def test_an_image_that_does_not_fit_into_memory_is_left_out(
    service: Service, client: LabelStudioClient, project: Project, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def refuse_the_second(*_: object) -> None:
        looks.append(1)
        if len(looks) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def in_little_memory(*arguments: Any, **options: Any) -> MaskRCNNWithScores:
        network = build_model(*arguments, **options)
        network.register_forward_pre_hook(refuse_the_second)
        return network

    monkeypatch.setattr(cold_start, "build_model", in_little_memory)
    tasks = import_images(client, project, phantom_images(4))
    assert prepare(service, key) == 4
    assert set(batch_of(service, key)) == {tasks[0], *tasks[2:]}


@pytest.mark.label_studio
def test_a_project_that_lost_its_model_version_shows_the_first_batch_again(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    import_images(client, project, phantom_images(5))
    prepare(service, key)
    version = client.project(project.id).model_version
    client.update_project(project.id, model_version="")
    assert client.project(project.id).model_version == ""
    reconcile(service, key)
    assert client.project(project.id).model_version == version


@pytest.mark.label_studio
def test_the_first_trained_version_replaces_the_first_batch(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    import_images(client, project, phantom_images(5))
    prepare(service, key)
    add_version(service, key)
    score_pool(service, key, VERSION)
    publish(service, key, VERSION, begin_cycle(service, key))
    assert client.model_versions(project.id) == {VERSION: 5}
    assert client.project(project.id).model_version == VERSION
    assert shown_progress(service) is None
