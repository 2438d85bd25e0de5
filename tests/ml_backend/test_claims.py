"""Claims of real processes, by files and by a real PostgreSQL."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from ml_backend.claims import Claims, FileClaims, PostgresClaims, free_name
from tests.postgres import Postgres

HOLD = """
import sys, time
from pathlib import Path
from ml_backend.claims import FileClaims, PostgresClaims
place = sys.argv[1]
claims = PostgresClaims(place) if place.startswith("postgres") else FileClaims(Path(place))
print(claims.take("7-1"), flush=True)
time.sleep(600)
"""
SECONDS = 60.0


@pytest.fixture(params=["files", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the claims are: a folder or a database."""
    if request.param == "files":
        return str(tmp_path / "claims")
    server: Postgres = request.getfixturevalue("postgres")
    return make_url(server.new_database()).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def claims_at(place: str) -> Iterator[Claims]:
    claims = PostgresClaims(place) if place.startswith("postgres") else FileClaims(Path(place))
    yield claims
    claims.close()


def holder(place: str) -> subprocess.Popen[str]:
    """Another process that has taken the project."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def take_in_time(claims: Claims, project_key: str) -> bool:
    deadline = time.monotonic() + SECONDS
    while not claims.take(project_key) and time.monotonic() < deadline:
        time.sleep(0.05)
    return claims.take(project_key)


def test_a_project_is_one_process_s_until_that_is_killed(place: str) -> None:
    with claims_at(place) as ours, holder(place) as other:
        assert not ours.take("7-1")
        assert ours.take("8-1")
        other.kill()
        assert take_in_time(ours, "7-1")


def test_what_is_released_is_free_for_others_and_releasing_twice_is_harmless(place: str) -> None:
    with claims_at(place) as ours, claims_at(place) as theirs:
        assert ours.take("7-1")
        assert ours.take("7-1")
        assert not theirs.take("7-1")
        ours.release("7-1")
        ours.release("7-1")
        assert theirs.take("7-1")


def test_no_two_living_workers_have_the_same_name(place: str) -> None:
    with claims_at(place) as ours, claims_at(place) as theirs:
        assert free_name(ours) != free_name(theirs)


def test_a_release_is_one_although_a_child_process_has_inherited_the_file(tmp_path: Path) -> None:
    ours, theirs = FileClaims(tmp_path), FileClaims(tmp_path)
    assert ours.take("7-1")
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    try:
        ours.release("7-1")
        assert theirs.take("7-1")
    finally:
        theirs.close()
        child.kill()
        child.join()


def test_a_process_whose_connection_breaks_ends_itself(postgres: Postgres) -> None:
    url = make_url(postgres.new_database()).set(drivername="postgresql").render_as_string(hide_password=False)
    with holder(url) as other:
        with psycopg.connect(url, autocommit=True) as connection:
            ours = "datname = current_database() AND application_name = 'tsp-claims'"
            connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {ours}")
        assert other.wait(timeout=SECONDS) == 1
        assert other.stderr is not None
        assert "its connection to the database is lost" in other.stderr.read()
