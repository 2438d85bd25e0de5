"""A machine that takes part in trainings: what it is told when its settings cannot be used."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from ml_backend.machines import meeting_of
from tests.ml_backend.examples import settings


def started(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ml_backend.machine"]
    place = {**os.environ, "MODEL_DIR": str(folder / "models"), **environment}
    return subprocess.run(command, env=place, capture_output=True, text=True, timeout=60, check=False)


def test_without_a_meeting_point_it_says_what_it_needs(tmp_path: Path) -> None:
    done = started(tmp_path)
    assert done.returncode == 1
    assert "TSP_MEETING_POINT is not set: expected host:port" in done.stderr


def test_a_meeting_point_that_is_none_is_told(tmp_path: Path) -> None:
    done = started(tmp_path, TSP_MEETING_POINT="somewhere")
    assert done.returncode == 1
    assert "TSP_MEETING_POINT: expected host:port, like 10.0.0.5:29400, " in done.stderr
    assert done.stderr.count("got 'somewhere'") == 1


def test_who_shares_the_folder_shares_the_secret(tmp_path: Path) -> None:
    options = {"TSP_MACHINES": 2, "TSP_IMAGES_PER_STEP": 2, "TSP_MEETING_POINT": "10.0.0.5:29400"}
    ours, theirs = (meeting_of(settings(tmp_path, **options)) for _ in range(2))
    assert ours == theirs
    assert ours is not None
    assert (ours.host, ours.port, ours.machines) == ("10.0.0.5", 29400, 2)
    assert len(ours.secret) == 64
    assert stat.S_IMODE((tmp_path / "models" / "machines-secret").stat().st_mode) == 0o600
    assert meeting_of(settings(tmp_path / "other")) is None
