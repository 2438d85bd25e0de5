"""Fixtures that several rooms of the tests share."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, prepared_server

hypothesis.settings.register_profile("untimed", deadline=None)  # machines are busy
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--e2e-data", help="COCO folder whose crops the end-to-end test uses instead of CT phantoms")


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[LabelStudioServer]:
    """A real Label Studio with a data folder of its own, stopped at the end whatever happens."""
    folder = tmp_path_factory.mktemp("label_studio")
    local_files = folder / "files"
    local_files.mkdir()
    templates = Path(pytestconfig.cache.mkdir("label_studio"))
    with prepared_server(folder / "data", template_folder=templates, local_files=local_files) as server:
        yield server


@pytest.fixture(scope="session")
def local_files(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that this Label Studio may serve as local files."""
    return label_studio.data_dir.parent / "files"


@pytest.fixture
def client(label_studio: LabelStudioServer) -> Iterator[LabelStudioClient]:
    """Our client, as the first user."""
    with LabelStudioClient(label_studio.url, label_studio.token) as client:
        yield client


@pytest.fixture
def project(client: LabelStudioClient, request: pytest.FixtureRequest) -> Project:
    """A new project with polygon labels, named after the test."""
    return client.create_project(title=request.node.name[:50], label_config=POLYGON_CONFIG)
