"""What the dashboard and `/status` are told."""

from pathlib import Path
from typing import Any

import pytest

from ml_backend import inbox
from ml_backend.db import CycleRow, ProjectRow
from ml_backend.inbox import ProjectName, remember_project
from ml_backend.overview import overview, progress_title
from ml_backend.service import Service
from tests.ml_backend.examples import KEY, NOWHERE, VERSION, add_version, settings

OTHER = "8-1700000000"


def test_there_is_nothing_to_tell_before_a_project_is_known(lonely_service: Service) -> None:
    assert overview(lonely_service) == []


def test_a_new_project_has_no_version_and_no_cycle(lonely_service: Service) -> None:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    assert overview(lonely_service) == [
        {
            "key": KEY,
            "id": 7,
            "title": "",
            "url": f"{NOWHERE}/projects/7/data",
            "problem": "",
            "annotated": 0,
            "new_annotated": 0,
            "batch_size": 500,
            "checked_at": "",
            "active_version": None,
            "first_batch": None,
            "events": {"received": 0, "waiting": 0},
            "labels": {"gone": [], "new": []},
            "activations": [],
            "pool_look": None,
            "versions": [],
            "versions_problem": "",
            "cycles": [],
            "advice": "",
        }
    ]


def test_each_project_has_its_own_cycles_the_newest_first(lonely_service: Service) -> None:
    for key, number in ((OTHER, 8), (KEY, 7)):
        remember_project(lonely_service.database, ProjectName(key, number))
    with lonely_service.database.session() as session:
        session.add_all(CycleRow(project_key=key, number=n) for key, n in ((KEY, 1), (KEY, 2), (OTHER, 1), (KEY, 3)))
    first, second = overview(lonely_service)
    assert (first["key"], [cycle["number"] for cycle in first["cycles"]]) == (KEY, [3, 2, 1])
    assert (second["key"], [cycle["number"] for cycle in second["cycles"]]) == (OTHER, [1])


def test_a_project_whose_new_images_are_mostly_empty_has_an_advice_for_the_strategy_that_is_set(tmp_path: Path) -> None:
    for strategy, advised in (("tsp", True), ("tsp_expected", False)):
        service = Service.connect(settings(tmp_path / strategy, TSP_STRATEGY=strategy))
        remember_project(service.database, ProjectName(KEY, 7))
        with service.database.session() as session:
            facts = {"new_images": 50, "new_empty_images": 43}
            session.add(CycleRow(project_key=KEY, number=1, facts=facts))
        (project,) = overview(service)
        assert project["advice"].startswith("43 of the 50 images") == advised
        service.close()


def test_what_changes_is_told(lonely_service: Service) -> None:
    remember_project(lonely_service.database, ProjectName(KEY, 7))
    inbox.record(lonely_service.database, KEY, "TASKS_CREATED")
    add_version(lonely_service, KEY)
    lonely_service.registry.activate(KEY, VERSION)
    with lonely_service.database.session() as session:
        session.get_one(ProjectRow, KEY).problem = "Label Studio is away"
    (project,) = overview(lonely_service)
    assert project["active_version"] == VERSION
    assert project["events"] == {"received": 1, "waiting": 1}
    assert project["problem"] == "Label Studio is away"


def test_links_lead_where_browsers_reach_label_studio(tmp_path: Path) -> None:
    inside = {"LABEL_STUDIO_URL": "http://label-studio:8080"}
    public = {**inside, "TSP_PUBLIC_LABEL_STUDIO_URL": "https://labels.example.com/"}
    for environment, start in ((inside, "http://label-studio:8080"), (public, "https://labels.example.com")):
        service = Service.connect(settings(tmp_path, **environment))
        remember_project(service.database, ProjectName(KEY, 7))
        assert overview(service)[0]["url"] == f"{start}/projects/7/data"
        assert service.label_studio.own_path(f"{start}/data/upload/1/a.png") == "/data/upload/1/a.png"
        service.close()


def _project(
    *cycles: dict[str, Any], title: str = "CT", activations: tuple[dict[str, Any], ...] = ()
) -> dict[str, Any]:
    return {"id": 7, "title": title, "cycles": list(cycles), "activations": list(activations)}


TRAINING: dict[str, Any] = {"status": "running", "stage": "training on 14 annotated images", "done": 43, "total": 99,
                            "facts": {}}  # fmt: skip
STARTING = TRAINING | {"stage": "starting", "done": 0, "total": 0}
WAITING = TRAINING | {"facts": {"waiting": {"since": "2025-01-02T03:04:05+00:00", "for": "Label Studio"}}}
DONE = TRAINING | {"status": "done", "stage": "finished"}
PUBLISHING = TRAINING | {"stage": "publishing predictions", "done": 99}


@pytest.mark.parametrize(
    ("projects", "title"),
    [
        pytest.param([], "", id="no project"),
        pytest.param([_project(DONE)], "", id="nothing runs"),
        pytest.param([_project(), _project(TRAINING, DONE)], "43 % training - CT", id="a training"),
        pytest.param([_project(TRAINING, title="")], "43 % training - project 7", id="a project without a title"),
        pytest.param([_project(STARTING)], "starting - CT", id="no steps yet"),
        pytest.param([_project(WAITING)], "waiting - CT", id="a cycle that waits"),
        pytest.param(
            [_project(TRAINING, activations=(PUBLISHING,)), _project(TRAINING)],
            "100 % publishing predictions - CT and 2 more",
            id="an activation beside cycles",
        ),
    ],
)
def test_the_title_says_what_runs(projects: list[dict[str, Any]], title: str) -> None:
    assert progress_title(projects) == title
