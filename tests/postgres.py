"""A PostgreSQL server of the tests' own, in a temporary folder."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from scripts.label_studio_server import HOST, free_port

_START_SECONDS = 30.0


@dataclass
class Postgres:
    """A running server; each test takes a database of its own."""

    port: int
    folder: Path  # where its socket is
    superuser: str
    options: dict[str, Any] = field(default_factory=dict)  # under which account its programs run
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        programs = postgres_programs()
        assert programs is not None
        command: list[str | Path] = [
            programs / "postgres",
            "-D",
            self.folder / "data",
            "-h",
            HOST,
            "-p",
            str(self.port),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "-k", self.folder, "-c", "fsync=off"], stdout=log, stderr=subprocess.STDOUT, **self.options
            )
        _wait_until_it_answers(self, self.process, self.folder / "log")

    def stop(self) -> None:
        """The quick way in order: whoever is connected is cut off."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(timeout=_START_SECONDS)
        self.process = None

    def url(self, database: str) -> str:
        """The address as people write it into DATABASE_URL."""
        return f"postgresql://{self.superuser}@{HOST}:{self.port}/{database}"

    def local_url(self, database: str) -> str:
        """The address by the socket, where no password is asked for."""
        return f"postgresql://{self.superuser}@/{database}?host={self.folder}&port={self.port}"

    def new_database(self) -> str:
        """The address of an empty database."""
        name = f"test{next(self.numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL; skips where none is installed."""
    with running_postgres() as server:
        yield server


@contextmanager
def running_postgres(
    *, superuser: str = "tests", asks_for_passwords: bool = False, encoding: str = "UTF8"
) -> Iterator[Postgres]:
    """A PostgreSQL of its own; passwords are asked for by TCP only, if at all. Skips where none is installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed (apt install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    options = _unprivileged(folder)
    server = Postgres(free_port(), folder, superuser, options)
    try:
        subprocess.run(
            [
                programs / "initdb",
                f"--username={superuser}",
                f"--encoding={encoding}",
                "--locale=C",
                "--auth-local=trust",
                f"--auth-host={'scram-sha-256' if asks_for_passwords else 'trust'}",
                "--no-sync",
                folder / "data",
            ],
            check=True,
            capture_output=True,
            **options,
        )
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def postgres_programs() -> Path | None:
    """The folder with `initdb` and `postgres`; Debian keeps it out of the PATH."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "initdb").exists() and (f / "postgres").exists()), None)


def _unprivileged(folder: Path) -> dict[str, Any]:
    """How to start a program there as somebody else when we are root: PostgreSQL refuses to run as root."""
    options: dict[str, Any] = {"cwd": folder}
    if os.geteuid() != 0:
        return options
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return options | {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _wait_until_it_answers(server: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(server.local_url("postgres")).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}") from None
            time.sleep(0.1)
        else:
            return
