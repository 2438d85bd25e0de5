"""Strategies in a live project: what they choose, that it is frozen, and that Label Studio serves it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ml_backend.batch import choose_batch
from ml_backend.cycle import evaluate_version, snapshot, train_version
from ml_backend.cycle_log import CycleLog
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.order import order_of
from ml_backend.pool import feature_of, packed, read_scores, score_pool
from ml_backend.predictor import Predictor
from ml_backend.publish import publish
from ml_backend.service import Service
from model.strategies import STRATEGIES
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, polygon_result
from tests.ml_backend.examples import (
    UNREADABLE,
    begin_cycle,
    cycle_row,
    data_uri,
    import_images,
    key_of,
    phantom_images,
    served_order,
    settings,
)

BATCH = 3
ANNOTATED, POOL = phantom_images(10)[:3], phantom_images(10)[3:]
SETS = [name for name, strategy in STRATEGIES.items() if strategy.chooses_a_set]


@pytest.fixture(params=list(STRATEGIES))
def service(request: pytest.FixtureRequest, label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(settings(tmp_path, TSP_STRATEGY=request.param, TSP_BATCH_SIZE=BATCH, **place))
    yield service
    service.close()


@pytest.fixture
def key(service: Service, project: Project) -> str:
    return key_of(service, project)


@pytest.fixture
def log(service: Service, key: str) -> CycleLog:
    return begin_cycle(service, key)


@pytest.fixture
def version(service: Service, client: LabelStudioClient, project: Project, key: str, log: CycleLog) -> str:
    """Trained on three images, before the others are imported."""
    for task in import_images(client, project, ANNOTATED):
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    version = snapshot(service, key, 1, log)
    train_version(service, key, 1, log)
    evaluate_version(service, key, 1, version, log)
    return version


def batch_of(service: Service, key: str, version: str) -> list[int]:
    return list(order_of(service, key, version).batch)


def test_a_feature_survives_as_text() -> None:
    feature = np.random.default_rng(0).normal(size=320).astype(np.float32)
    assert (feature_of(packed(feature)) == feature).all()


@pytest.mark.label_studio
def test_every_strategy_serves_what_it_chose(
    service: Service, client: LabelStudioClient, project: Project, key: str, version: str, log: CycleLog
) -> None:
    strategy = STRATEGIES[service.settings.strategy]
    network, card = service.registry.load(key, version)
    assert card.strategy == strategy.name
    assert (network.config.dropout > 0, network.config.learning_loss) == (
        strategy.name == "mc_dropout", strategy.name == "learning_loss"
    )  # fmt: skip
    tasks = import_images(client, project, [*POOL, *phantom_images(2, validation=True), UNREADABLE])
    teaching = set(tasks[: len(POOL)])
    score_pool(service, key, version, log)
    choose_batch(service, key, 1, version, log)
    publish(service, key, version, log)
    lines = {line["task"]: line for line in read_scores(service.scores_file(key, version))}
    assert all(lines[task]["score"] is None or 0 <= lines[task]["score"] <= 1 for task in teaching)
    facts = cycle_row(service, key).facts
    assert facts["strategy"] == strategy.name

    batch = batch_of(service, key, version)
    counts = client.model_versions(project.id)
    if strategy.chooses_a_set:
        assert (len(batch), facts["batch"]) == (BATCH, BATCH)
        assert set(batch) < teaching
        assert counts == {version: BATCH, f"{version}.pool": len(tasks) - BATCH}
    else:
        assert counts == {version: len(tasks)}
        order = order_of(service, key, version)
        batch = sorted(teaching, key=lambda task: order.score_of(lines[task]))
    answers = Predictor(service).predict(
        key, [{"id": task, "data": {"image": data_uri(image)}} for task, image in zip(tasks, POOL, strict=False)],
        POLYGON_CONFIG,
    )  # fmt: skip
    scores = dict(zip(tasks, (answer["score"] for answer in answers), strict=False))
    assert [scores[task] for task in batch] == sorted(scores[task] for task in batch)
    if strategy.chooses_a_set:
        assert {scores[task] for task in teaching - set(batch)} == {1.0}
    else:
        assert scores == {task: order.score_of(lines[task]) for task in scores}
    assert served_order(client, project)[: len(batch)] == batch


@pytest.mark.label_studio
@pytest.mark.parametrize("service", SETS, indirect=True)
def test_only_images_that_can_teach_something_new_are_chosen(
    service: Service, client: LabelStudioClient, project: Project, key: str, version: str, log: CycleLog
) -> None:
    validation = phantom_images(2, validation=True)
    good, twice, skipped, late, *_ = import_images(
        client, project, [POOL[0], POOL[0], POOL[1], POOL[2], *validation, UNREADABLE, ANNOTATED[0]]
    )
    client.skip(skipped)
    score_pool(service, key, version, log)
    client.submit_annotation(late, result=[], lead_time_seconds=1)
    choose_batch(service, key, 1, version, log)
    assert batch_of(service, key, version) == [good]  # the second task with the same image is `twice`
    assert cycle_row(service, key).facts["batch"] == 1
    assert order_of(service, key, version).version_of(twice) == f"{version}.pool"


@pytest.mark.label_studio
@pytest.mark.parametrize("service", SETS, indirect=True)
def test_the_batch_is_frozen_when_it_is_chosen(
    service: Service, client: LabelStudioClient, project: Project, key: str, version: str, log: CycleLog
) -> None:
    import_images(client, project, POOL[:5])
    score_pool(service, key, version)
    choose_batch(service, key, 1, version, log)
    batch = batch_of(service, key, version)
    service.batch_file(key, version).unlink()
    choose_batch(service, key, 1, version, log)
    assert batch_of(service, key, version) == batch  # it is the same when it is chosen again
    import_images(client, project, POOL[5:])
    score_pool(service, key, version)
    choose_batch(service, key, 1, version, log)
    assert batch_of(service, key, version) == batch


@pytest.mark.label_studio
@pytest.mark.parametrize("service", ["core_set", "hybrid"], indirect=True)
def test_the_features_of_the_annotated_images_are_made_once_and_resumed_in_the_middle(
    service: Service, client: LabelStudioClient, project: Project, key: str, version: str, log: CycleLog
) -> None:
    import_images(client, project, POOL[:4])
    score_pool(service, key, version)
    choose_batch(service, key, 1, version, log)
    path = service.annotated_file(key, version)
    whole, batch = path.read_bytes(), batch_of(service, key, version)
    assert len(whole.splitlines()) == len(ANNOTATED)
    path.write_bytes(whole[: len(whole) // 2])
    service.batch_file(key, version).unlink()
    choose_batch(service, key, 1, version, log)
    assert (path.read_bytes(), batch_of(service, key, version)) == (whole, batch)


@pytest.mark.label_studio
@pytest.mark.parametrize("service", ["core_set"], indirect=True)
def test_core_set_keeps_away_from_the_annotated_images(
    service: Service, client: LabelStudioClient, project: Project, key: str, version: str, log: CycleLog
) -> None:
    tasks = import_images(client, project, POOL)
    score_pool(service, key, version)
    choose_batch(service, key, 1, version, log)
    annotated = [feature_of(line["feature"]) for line in read_scores(service.annotated_file(key, version))]
    lines = read_scores(service.scores_file(key, version))
    distance = {
        line["task"]: min(np.linalg.norm(feature_of(line["feature"]) - centre) for centre in annotated)
        for line in lines
    }
    assert batch_of(service, key, version)[0] == max(tasks, key=lambda task: distance[task])


@pytest.mark.label_studio
@pytest.mark.parametrize("service", ["random"], indirect=True)
def test_a_pool_that_cannot_teach_is_served_by_score(
    service: Service, client: LabelStudioClient, project: Project, key: str, version: str, log: CycleLog
) -> None:
    tasks = import_images(client, project, [*phantom_images(1, validation=True), UNREADABLE])
    score_pool(service, key, version)
    choose_batch(service, key, 1, version, log)
    assert json.loads(service.batch_file(key, version).read_text()) == {"tasks": []}
    publish(service, key, version, log)
    assert client.model_versions(project.id) == {version: 2}
    assert client.predicted_task_ids(project.id, version) == set(tasks)
