"""Fixtures of the service's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ml_backend import ls_http
from ml_backend.db import Database
from ml_backend.service import Service
from ml_backend.settings import Settings
from ml_backend.store import Store
from scripts.label_studio_server import LabelStudioServer
from tests.ml_backend.examples import settings
from tests.postgres import Postgres, postgres
from tests.s3 import S3, running_s3

__all__ = ["postgres"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny networks are quickest on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields.values():
        monkeypatch.delenv(str(field.validation_alias), raising=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, as SQLAlchemy wants it."""
    if request.param == "sqlite":
        return settings(tmp_path).database
    server: Postgres = request.getfixturevalue("postgres")
    return settings(tmp_path, DATABASE_URL=server.new_database()).database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def lonely_service(tmp_path: Path) -> Iterator[Service]:
    """The service while Label Studio is away."""
    service = Service.connect(settings(tmp_path))
    yield service
    service.close()


@pytest.fixture
def service(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Service]:
    """The service with a real Label Studio."""
    service = Service.connect(
        settings(tmp_path, LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.token)
    )
    yield service
    service.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label Studio is asked again at once."""
    monkeypatch.setattr(ls_http, "_PAUSES_SECONDS", (0.01, 0.01))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an empty one, which the store finds."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.new_bucket()


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        (tmp_path / "shared").mkdir()
        return f"file://{tmp_path / 'shared'}"
    bucket: str = request.getfixturevalue("bucket")
    return f"s3://{bucket}/a/prefix"


@pytest.fixture
def machine(store_url: str, tmp_path: Path) -> Callable[..., Store]:
    """The store as a machine with a MODEL_DIR of this name sees it."""

    def store(name: str, *, remembers_seconds: float = 0.0) -> Store:
        (tmp_path / name).mkdir(exist_ok=True)
        return Store(store_url, tmp_path / name, remembers_seconds=remembers_seconds)

    return store
