"""`TSPBackend` as label-studio-ml 1.0.9 and as the 2.x line use it."""

from pathlib import Path

import pytest
from label_studio_ml.model import LabelStudioMLBase

from ml_backend import inbox
from ml_backend.backend import TSPBackend
from ml_backend.errors import LabelConfigError, SettingsError
from ml_backend.inbox import START_TRAINING, ProjectName
from ml_backend.service import Service
from model.errors import InvalidInputError
from tests.label_studio import POLYGON_CONFIG
from tests.ml_backend.examples import KEY, NOWHERE, UID, VERSION, add_version, data_uri, grey_images

PAYLOAD = {"project": {"id": 7, "created_at": "2023-11-14T22:13:20.654321Z"}, "annotation": {"id": 1}}
TASKS = [{"id": 1, "data": {"image": data_uri(grey_images(1)[0])}}]
EMPTY = {"model_version": "untrained", "score": 0.0, "result": []}


def actions(service: Service) -> list[str]:
    return [action for _, action in inbox.unhandled(service.database, KEY)]


def test_it_is_a_class_of_label_studio_ml() -> None:
    assert issubclass(TSPBackend, LabelStudioMLBase)


def test_it_predicts_as_release_2_calls_it(lonely_service: Service) -> None:
    backend = TSPBackend(project_id=UID, label_config=POLYGON_CONFIG, service=lonely_service)
    assert backend.setup() == {"model_version": "untrained"}
    assert backend.predict(TASKS, context=None) == [EMPTY]
    assert backend.predict(TASKS, {"result": []}) == [EMPTY]


def test_it_predicts_with_the_active_version(lonely_service: Service) -> None:
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    backend = TSPBackend(UID, POLYGON_CONFIG, service=lonely_service)
    assert backend.setup() == {"model_version": VERSION}
    assert [prediction["model_version"] for prediction in backend.predict(TASKS)] == [VERSION]


def test_it_records_events_as_release_2_sends_them(lonely_service: Service) -> None:
    backend = TSPBackend(project_id=UID, label_config=POLYGON_CONFIG, service=lonely_service)
    assert backend.fit("ANNOTATION_CREATED", PAYLOAD) == {}
    assert backend.fit(event=START_TRAINING, data={}) == {}
    assert actions(lonely_service) == ["ANNOTATION_CREATED", START_TRAINING]


def test_it_records_events_as_release_1_sends_them(lonely_service: Service) -> None:
    backend = TSPBackend(label_config=POLYGON_CONFIG, train_output={}, service=lonely_service)
    result = backend.process_event("ANNOTATION_UPDATED", PAYLOAD, "job-1", {"workdir": "somewhere"})
    assert result == {}
    assert actions(lonely_service) == ["ANNOTATION_UPDATED"]


def test_a_project_that_sends_events_is_remembered(lonely_service: Service) -> None:
    TSPBackend(service=lonely_service).fit("ANNOTATION_CREATED", PAYLOAD)
    assert inbox.known_project(lonely_service.database, 7) == ProjectName(KEY, 7)


def test_what_release_1_passes_to_a_class_is_kept(lonely_service: Service) -> None:
    backend = TSPBackend(
        label_config=POLYGON_CONFIG,
        train_output={"a": 1},
        hostname="http://ls",
        access_token="t",
        service=lonely_service,
    )
    assert (backend.label_config, backend.train_output, backend.hostname) == (POLYGON_CONFIG, {"a": 1}, "http://ls")


def test_it_connects_by_the_environment_when_nothing_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="LABEL_STUDIO_API_KEY is not set"):
        TSPBackend(UID, POLYGON_CONFIG)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "0" * 40)
    monkeypatch.setenv("LABEL_STUDIO_URL", NOWHERE)
    backend = TSPBackend(UID, POLYGON_CONFIG)
    assert backend.predict(TASKS) == [EMPTY]
    backend._service.close()


@pytest.mark.parametrize("project_id", [None, "", "7", "7.x", "a.b"])
def test_a_project_that_is_not_named_as_label_studio_names_it_is_an_error(
    lonely_service: Service, project_id: str | None
) -> None:
    backend = TSPBackend(project_id, POLYGON_CONFIG, service=lonely_service)
    for use in (backend.setup, lambda: backend.predict(TASKS), lambda: backend.fit("ANNOTATION_CREATED", {})):
        with pytest.raises(InvalidInputError, match="expected '<id>"):
            use()


@pytest.mark.parametrize("label_config", [None, "", "<View/>", "<View"], ids=["none", "empty", "no tags", "broken"])
def test_a_configuration_that_nothing_can_be_drawn_with_is_an_error(
    lonely_service: Service, label_config: str | None
) -> None:
    backend = TSPBackend(UID, label_config, service=lonely_service)
    with pytest.raises(LabelConfigError, match="Labelling configuration: "):
        backend.predict(TASKS)
