"""The health checks of containers, as the commands they are."""

import os
import subprocess
import sys
import time
from pathlib import Path

from ml_backend.app import create_app
from scripts.served_app import served
from tests.ml_backend.examples import NOWHERE, settings


def health(*arguments: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    command = [sys.executable, "-m", "ml_backend.health", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_web_process_that_answers_is_well(tmp_path: Path) -> None:
    with served(create_app(settings(tmp_path))) as url:
        assert health(f"{url}/health") == (0, "")
        code, said = health(f"{url}/no-such-page")
    assert code == 1
    assert "404" in said


def test_a_web_process_that_is_away_is_not() -> None:
    code, said = health(f"{NOWHERE}/health")
    assert code == 1
    assert "Connection refused" in said


def test_a_worker_is_well_for_a_while_after_its_sign(tmp_path: Path) -> None:
    file = tmp_path / "alive"
    file.touch()
    assert health(str(file)) == (0, "")
    a_minute_ago = time.time() - 60
    os.utime(file, (a_minute_ago, a_minute_ago))
    code, said = health(str(file))
    assert code == 1
    assert "expected at most 30 s" in said


def test_a_worker_that_never_gave_a_sign_is_not_well(tmp_path: Path) -> None:
    code, said = health(str(tmp_path / "alive"))
    assert code == 1
    assert "TSP_ALIVE_FILE" in said


def test_without_a_question_the_usage_is_told() -> None:
    code, said = health()
    assert code == 1
    assert "python -m ml_backend.health" in said
