"""Two annotators who ask for a task in the same instant, in a Label Studio on PostgreSQL.

Label Studio looks for an unlocked task and then locks it. On PostgreSQL it does both in one transaction with row locks.
On SQLite it does not, and two requests within the same milliseconds can get the same task: nothing is promised there.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from psycopg.conninfo import conninfo_to_dict

from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import POLYGON_CONFIG, create_annotator, new_server, polygon_result, prediction
from tests.postgres import Postgres, postgres  # noqa: F401 - a fixture

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]

TASKS = 30


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:  # noqa: F811
    """A real Label Studio whose database is PostgreSQL."""
    address = conninfo_to_dict(postgres.new_database())
    environment = {
        "DJANGO_DB": "default",
        "POSTGRE_NAME": str(address["dbname"]),
        "POSTGRE_USER": str(address["user"]),
        "POSTGRE_PASSWORD": "",
        "POSTGRE_HOST": str(address["host"]),
        "POSTGRE_PORT": str(address["port"]),
    }
    with new_server(tmp_path_factory.mktemp("on-postgres") / "data", environment=environment) as server:
        yield server


def test_two_annotators_never_get_the_same_task_and_each_gets_the_most_uncertain_one_left(
    server: LabelStudioServer,
) -> None:
    second = create_annotator(server, "second@example.com")
    with (
        LabelStudioClient(server.url, server.token) as owner,
        LabelStudioClient(server.url, second) as other,
        ThreadPoolExecutor(2) as together,
    ):
        project = owner.create_project(title="at the same time", label_config=POLYGON_CONFIG)
        task_ids = owner.import_tasks(project.id, [{"image": f"/data/{number}.png"} for number in range(TASKS)])
        scores = {task_id: (7 * number % TASKS) / TASKS for number, task_id in enumerate(task_ids)}
        owner.import_predictions(project.id, [prediction(t, score=s) for t, s in scores.items()])
        owner.set_model_version(project.id, "v1")
        owner.update_project(project.id, sampling=UNCERTAINTY_SAMPLING)

        rounds = []
        for _ in range(TASKS // 2):
            tasks = list(together.map(lambda client: client.next_task(project.id), (owner, other)))
            rounds.append({task["id"] for task in tasks})
            for client, task in zip((owner, other), tasks, strict=True):
                client.submit_annotation(task["id"], result=[polygon_result()], lead_time_seconds=1)

    in_order = sorted(task_ids, key=scores.__getitem__)
    assert rounds == [set(in_order[i : i + 2]) for i in range(0, TASKS, 2)]
    assert _uses_postgres(server)


def _uses_postgres(server: LabelStudioServer) -> bool:
    """That the server did not quietly fall back to SQLite."""
    return not list(server.data_dir.glob("*.sqlite3"))
