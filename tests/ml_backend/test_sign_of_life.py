"""The worker's sign of life, with and without a real Label Studio, and what the dashboard makes of it."""

from pathlib import Path

import pytest

from ml_backend.db import WorkerRow
from ml_backend.overview import worker_overview
from ml_backend.service import Service
from ml_backend.sign_of_life import SignOfLife
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import USERNAME
from tests.ml_backend.examples import settings

NAME = "host-1"


def sign_of_life(service: Service, name: str = NAME) -> SignOfLife:
    return SignOfLife(service.database, service.label_studio, name=name, ask_every_seconds=60)


def test_a_worker_that_was_never_started_is_a_problem(lonely_service: Service) -> None:
    assert "start `python -m ml_backend.worker`" in worker_overview(lonely_service)["problem"]


def test_a_worker_that_lives_is_none(lonely_service: Service) -> None:
    sign_of_life(lonely_service).give()
    assert worker_overview(lonely_service)["problem"] == ""


def test_a_worker_that_fell_silent_is_a_problem(lonely_service: Service) -> None:
    sign_of_life(lonely_service).give()
    with lonely_service.database.session() as session:
        session.get_one(WorkerRow, NAME).seen_at = "2025-01-02T03:04:05.000000+00:00"
    assert "no sign of life since 2025-01-02T03:04:05 UTC" in worker_overview(lonely_service)["problem"]


def test_label_studio_being_away_is_told_before_any_project_is_known(
    lonely_service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    life = sign_of_life(lonely_service)
    life.ask()
    life.give()  # does not forget the answer
    life.ask()
    assert "no answer from Label Studio" in worker_overview(lonely_service)["problem"]
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 1  # once, not every minute


@pytest.mark.label_studio
def test_the_owner_of_a_good_token_is_told_to_the_log_alone_and_a_wrong_token_with_what_to_do(
    service: Service, label_studio: LabelStudioServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ml_backend.sign_of_life")
    sign_of_life(service).ask()
    assert f"knows us as {USERNAME}" in caplog.text
    assert worker_overview(service)["problem"] == ""
    with service.database.session() as session:
        row = vars(session.get_one(WorkerRow, NAME))
    assert USERNAME not in f"{worker_overview(service)} {row}"  # anybody may read /status

    wrong = Service.connect(settings(tmp_path, LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY="f" * 40))
    sign_of_life(wrong).ask()
    told = worker_overview(wrong)
    wrong.close()
    assert "Label Studio refused the token" in told["problem"]
    assert "f" * 40 not in told["problem"]
