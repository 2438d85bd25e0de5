"""The gate, going back to an older version and changes of the labels, with a worker process and a real Label Studio."""

import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ml_backend.actions import form_token
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.settings import Settings
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import create_annotator, polygon_result, raw_api
from tests.ml_backend.examples import import_images, phantom_images
from tests.ml_backend.test_worker import Running, wait
from tests.postgres import Postgres

pytestmark = pytest.mark.label_studio

BATCH = 4


def predictions(server: LabelStudioServer, tasks: list[int]) -> dict[int, list[dict[str, Any]]]:
    with raw_api(server) as api:
        return {task: api.get("/api/predictions/", params={"task": task}).json() for task in tasks}


def activate(running: Running, version: str) -> int:
    """Press the button; the status of the answer."""
    key, token = running.status()["key"], form_token(Settings(**running.environment))
    page = running.web.get("/ui").text
    assert f'action="projects/{key}/activate"' in page
    assert token in page
    fields = {"version": version, "token": token}
    return running.web.post(f"/projects/{key}/activate", data=fields, follow_redirects=False).status_code


def is_idle(project: dict[str, Any]) -> bool:
    return all(work["finished_at"] for work in (*project["cycles"], *project["activations"]))


def test_a_worse_version_is_refused_and_people_can_promote_it_and_go_back(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    """What the first version sees in twelve validation images is declared to be the truth, so the second, which saw
    other things, is surely worse."""
    first_batch = import_images(client, project, phantom_images(3))
    validation = import_images(client, project, phantom_images(12, validation=True))
    others = import_images(client, project, phantom_images(13)[3:])
    for task in first_batch:
        client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    with Running(
        tmp_path,
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.token,
        TSP_BATCH_SIZE=str(BATCH),
        TSP_EPOCHS="4",
        TSP_VALIDATION_FRACTION="0.3",
        TSP_STRATEGY="random",
        TSP_SHOWN_THRESHOLD="0.05",
        TSP_QUEUE_THRESHOLD="0.05",
        TSP_SEMI_SUPERVISED="false",
    ) as running:
        running.connect(project.uid)
        ask_to_train(running, project)
        (cycle,) = running.wait(lambda p: p["cycles"] and is_idle(p))["cycles"]
        assert (cycle["status"], cycle["error"]) == ("done", "")
        assert cycle["facts"]["gate"]["reason"] == "accepted: the first version"
        first = cycle["version"]
        assert client.project(project.id).model_version == first
        batch = client.predicted_task_ids(project.id, first)
        assert len(batch) == BATCH

        running.worker.kill("worker")  # so that the next snapshot has all that follows
        for task, stored in predictions(label_studio, validation).items():
            client.submit_annotation(task, result=stored[0]["result"], lead_time_seconds=1)
        for task in batch:
            client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
        running.worker.start_one("worker")
        status = running.wait(lambda p: len(p["cycles"]) == 2 and is_idle(p) and p["activations"])
        cycle = status["cycles"][0]
        assert (cycle["status"], cycle["error"]) == ("refused", "")
        second, gate = cycle["version"], cycle["facts"]["gate"]
        assert (gate["active"], gate["accepted"]) == (first, False)
        assert gate["images"] >= 10
        assert gate["active_map_50"] > gate["new_map_50"] + 0.02
        assert gate["high"] < -0.02
        assert gate["reason"].startswith("refused: mask mAP@0.5")
        assert status["active_version"] == first
        assert {v["version"]: v["is_active"] for v in status["versions"]} == {second: False, first: True}
        page = running.web.get("/ui").text
        assert "surely worse" in page
        assert 'class="refused"' in page
        # All of the batch is annotated, so the first version has chosen another one.
        (wish,) = status["activations"]
        assert (wish["version"], wish["status"], wish["error"]) == (first, "done", "")
        assert wish["reason"] == f"cycle 2 was refused: {first} chooses the next batch"
        check_queue(client, label_studio, project, others, name=f"{first}.1", old=batch)
        assert (status["new_annotated"], status["annotated"]) == (0, 3 + 12 + BATCH)

        # The refused version is promoted, and the worker killed meanwhile.
        assert activate(running, second) == 303
        running.wait(lambda p: p["activations"][0]["status"] == "running")
        running.worker.kill("worker")
        assert activate(running, first) == 422  # one at a time
        running.worker.start_one("worker")
        status = running.wait(lambda p: len(p["activations"]) == 2 and is_idle(p))
        assert (status["activations"][0]["status"], status["activations"][0]["error"]) == ("done", "")
        assert status["active_version"] == second
        check_queue(client, label_studio, project, others, name=second, old=batch)

        assert activate(running, first) == 303  # back again
        status = running.wait(lambda p: len(p["activations"]) == 3 and is_idle(p))
        assert (status["activations"][0]["status"], status["active_version"]) == ("done", first)
        check_queue(client, label_studio, project, others, name=f"{first}.1", old=batch)
        assert activate(running, "tsp-9-00000000") == 422


def test_a_project_that_is_forgotten_while_it_trains_can_begin_anew(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, postgres: Postgres, tmp_path: Path
) -> None:
    (task,) = import_images(client, project, phantom_images(1))
    client.submit_annotation(task, result=[polygon_result()], lead_time_seconds=1)
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    with Running(tmp_path, **place, DATABASE_URL=postgres.new_database(), TSP_EPOCHS="40") as running:
        for forgotten in (True, False):
            running.connect(project.uid)
            ask_to_train(running, project)
            running.wait(lambda p: p["cycles"] and p["cycles"][0]["stage"].startswith("training"))
            if forgotten:
                key = running.status()["key"]
                fields = {"token": form_token(Settings(**running.environment)), "delete_data": "yes"}
                running.web.post(f"/projects/{key}/forget", data=fields).raise_for_status()
                folder = tmp_path / "models" / "cycles" / key
                wait(lambda folder=folder: not folder.exists(), running.log.read_text)
                wait(lambda: running.web.get("/ui").text.count("Forgotten:") == 0, running.log.read_text)
                assert running.web.get("/status").json()["projects"] == []
        (cycle,) = running.wait(lambda p: p["cycles"] and is_idle(p))["cycles"]  # the workflow engine runs it again
        assert (cycle["number"], cycle["status"], cycle["error"]) == (1, "done", "")
    assert "people have asked to forget this project" in running.log.read_text()


def check_queue(
    client: LabelStudioClient,
    server: LabelStudioServer,
    project: Project,
    pool: list[int],
    *,
    name: str,
    old: frozenset[int],
) -> None:
    """The version's name holds a batch of waiting tasks, `<name>.pool` the rest; each waiting task has one prediction
    of ours."""
    assert client.project(project.id).model_version == name
    annotated = client.annotated_task_ids(project.id)
    waiting = set(pool) - annotated
    batch = client.predicted_task_ids(project.id, name)
    assert len(batch & waiting) == BATCH
    assert not batch & old
    counts = Counter(p["model_version"] for task in waiting for p in predictions(server, [task])[task])
    assert counts == {name: BATCH, f"{name}.pool": len(waiting) - BATCH}
    assert set(client.model_versions(project.id)) == {name, f"{name}.pool"}
    # To somebody new: who has opened a task gets it again, whatever the queue says meanwhile.
    with LabelStudioClient(server.url, create_annotator(server, f"{uuid.uuid4()}@example.com")) as newcomer:
        served = newcomer.next_task(project.id)
    assert served is not None
    assert served["id"] in batch


def ask_to_train(running: Running, project: Project) -> None:
    event = {"action": "START_TRAINING", "project": {"id": project.id, "created_at": project.created_at.isoformat()}}
    running.web.post("/webhook", json=event).raise_for_status()
