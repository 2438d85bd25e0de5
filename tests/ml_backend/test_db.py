"""The state in real SQLite files and a real PostgreSQL."""

import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from ml_backend.cycle_log import CycleLog
from ml_backend.db import CycleRow, Database, ProjectRow, passes_by_itself
from scripts.label_studio_server import HOST, free_port
from tests.ml_backend.examples import KEY, locked
from tests.postgres import Postgres

PROJECT = {"key": KEY, "label_studio_id": 7}


def test_what_is_committed_is_there_after_reopening(database: Database, database_url: str) -> None:
    with database.session() as session:
        session.add(ProjectRow(**PROJECT, title="Zähne 🦷"))
        session.flush()
        session.add(CycleRow(project_key=KEY, number=1, facts={"metrics": {"map_50": None, "images": 3}}))
    database.close()
    again = Database(database_url)
    with again.session() as session:
        assert session.get_one(ProjectRow, KEY).title == "Zähne 🦷"
        cycle = session.get_one(CycleRow, (KEY, 1))
    again.close()
    assert cycle.facts == {"metrics": {"map_50": None, "images": 3}}
    assert (cycle.status, cycle.finished_at) == ("planned", None)


def test_an_error_in_a_session_rolls_all_of_it_back(database: Database) -> None:
    def write_half() -> None:
        with database.session() as session:
            session.add(ProjectRow(**PROJECT))
            session.flush()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_half()
    with database.session() as session:
        assert session.get(ProjectRow, KEY) is None


def test_a_cycle_of_an_unknown_project_is_refused(database: Database) -> None:
    with pytest.raises(IntegrityError), database.session() as session:
        session.add(CycleRow(project_key="8-1", number=1))


def test_processes_that_start_together_on_an_empty_database_all_get_it(database_url: str) -> None:
    together = threading.Barrier(6)

    def start() -> None:
        together.wait()
        database = Database(database_url)
        database.ping()
        database.close()

    with ThreadPoolExecutor(6) as pool:
        for started in [pool.submit(start) for _ in range(6)]:
            started.result()


def test_ping_raises_when_the_database_is_away() -> None:
    with pytest.raises(OperationalError):
        Database("postgresql+psycopg://tests@127.0.0.1:1/none")


def test_sqlite_keeps_a_write_ahead_log_and_makes_the_folder(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'new' / 'state.sqlite3'}")
    with database.engine.connect() as connection:
        modes = [connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")]
    database.close()
    assert modes == ["wal", 2, 1]


def test_another_process_reads_while_this_one_writes(database: Database, database_url: str) -> None:
    with database.session() as session:
        session.add(ProjectRow(**PROJECT, title="before"))
    with database.session() as session:
        session.get_one(ProjectRow, KEY).title = "after"
        session.flush()  # the write lock is held now
        assert _title_seen_by_another_process(database_url) == "before"
    assert _title_seen_by_another_process(database_url) == "after"


def test_writers_wait_for_each_other(database: Database) -> None:
    with database.session() as session:
        session.add(ProjectRow(**PROJECT))
        session.flush()
        session.add_all(CycleRow(project_key=KEY, number=number) for number in range(8))

    def write(number: int) -> None:
        log = CycleLog(database, KEY, number)
        log.begin()
        for done in range(10):
            log.facts({str(done): number})

    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(write, number) for number in range(8)]:
            written.result()
    with database.session() as session:
        cycles = session.scalars(select(CycleRow).order_by(CycleRow.number)).all()
    assert [cycle.facts for cycle in cycles] == [{str(done): number for done in range(10)} for number in range(8)]


def test_what_is_no_lock_is_not_called_one(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}")
    database.close()
    path.unlink()
    path.write_bytes(b"no database" * 500)
    assert database.lock_problem() == f"{path} cannot be written: file is not a database."
    path.unlink()
    path.mkdir()
    assert database.lock_problem() == f"{path} cannot be written: unable to open database file."


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        pytest.param({"database": "nowhere"}, 'database "nowhere" does not exist', id="its name is wrong"),
        pytest.param({"username": "nobody"}, "nobody", id="its user is unknown"),
    ],
)
def test_a_database_that_refuses_for_good_does_not_pass_by_itself(
    postgres: Postgres, spoilt: dict[str, str], said: str
) -> None:
    url = make_url(postgres.new_database()).set(drivername="postgresql+psycopg")
    assert not passes_by_itself(refusal(url.set(**spoilt), said))


def test_a_server_that_is_away_passes_by_itself(postgres: Postgres) -> None:
    url = make_url(postgres.new_database()).set(drivername="postgresql+psycopg")
    assert passes_by_itself(refusal(url.set(host=HOST, port=free_port()), "refused"))


def refusal(url: URL, said: str) -> DBAPIError:
    engine = create_engine(url)
    with pytest.raises(DBAPIError, match=said) as error, engine.connect():
        pass
    engine.dispose()
    return error.value


def test_a_lock_of_another_process_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    database = Database(f"sqlite:///{path}")
    assert database.lock_problem() == ""
    with locked(path):
        assert f"Another program keeps {path} from being written (database is locked)" in database.lock_problem()
    assert database.lock_problem() == ""
    database.close()


def test_the_address_may_say_how_long_a_writer_waits(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    for query, milliseconds in (("", 30_000), ("?timeout=0.25", 250)):
        database = Database(f"sqlite:///{path}{query}")
        with database.engine.connect() as connection:
            assert connection.scalar(text("PRAGMA busy_timeout")) == milliseconds
        database.close()


@pytest.mark.parametrize("own", [{}, {"connect_timeout": "7", "keepalives_idle": "60"}], ids=["ours", "the address's"])
def test_a_server_that_falls_silent_is_noticed_after_seconds(postgres: Postgres, own: dict[str, str]) -> None:
    url = make_url(postgres.new_database()).set(drivername="postgresql+psycopg", query=own)
    database = Database(url.render_as_string(hide_password=False))
    with database.engine.connect() as connection:
        used = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
    database.close()
    ours = {"connect_timeout": "5", "keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "3"}
    expected = {**ours, "tcp_user_timeout": "15000", **own}
    assert {name: used[name] for name in expected} == expected


def test_a_file_that_is_no_database_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(Exception, match="file is not a database") as caught:
        Database(f"sqlite:///{path}")
    assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)


def _title_seen_by_another_process(database_url: str) -> str:
    code = (
        "import sys; from ml_backend.db import Database, ProjectRow\n"
        "with Database(sys.argv[1]).session() as session: print(session.get_one(ProjectRow, sys.argv[2]).title)"
    )
    command = [sys.executable, "-c", code, database_url, KEY]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
