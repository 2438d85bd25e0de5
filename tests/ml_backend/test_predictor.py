"""Predictions on demand; most of it is tested through `/predict` in test_app.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from ml_backend.predictor import UNTRAINED, Predictor
from ml_backend.service import Service
from model.errors import RegistryError
from tests.label_studio import POLYGON_CONFIG
from tests.ml_backend.examples import KEY, VERSION, add_version, data_uri, grey_images

TASKS = [{"id": number, "data": {"image": data_uri(png)}} for number, png in enumerate(grey_images(4), start=1)]
OTHER_CLASSES = POLYGON_CONFIG.replace("cell", "nucleus").replace("lesion", "axon")


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


def test_a_version_that_vanished_is_an_error_that_names_it(predictor: Predictor, lonely_service: Service) -> None:
    folder = lonely_service.registry.root / KEY / VERSION
    (folder / "weights.safetensors").unlink()
    with pytest.raises(RegistryError, match=f"version {VERSION} of {KEY} is damaged"):
        predictor.predict(KEY, TASKS, POLYGON_CONFIG)
