"""Labels and controls that change in the middle of a project, in a real Label Studio."""

import json
from typing import Any

import pytest
from sqlalchemy import select

from ml_backend.activation import activate_version
from ml_backend.cycle import snapshot
from ml_backend.cycle_log import ActivationLog
from ml_backend.db import ActivationRow
from ml_backend.errors import LabelConfigError
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.overview import overview
from ml_backend.pool import score_pool
from ml_backend.publish import import_missing, publish
from ml_backend.reconcile import reconcile
from ml_backend.service import Service
from scripts.label_studio_server import LabelStudioServer
from tests.label_studio import polygon_result, raw_api
from tests.ml_backend.examples import (
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    data_uri,
    grey_images,
    import_images,
    key_of,
    sha256,
)

pytestmark = pytest.mark.label_studio

NEVER_VALIDATION = sha256(grey_images(1)[0])


def config(*labels: str, control: str = "label") -> str:
    tags = "".join(f'<Label value="{label}"/>' for label in labels)
    return (
        f'<View><Image name="image" value="$image"/>'
        f'<PolygonLabels name="{control}" toName="image">{tags}</PolygonLabels></View>'
    )


@pytest.fixture
def tasks(client: LabelStudioClient, project: Project) -> list[int]:
    return import_images(client, project, grey_images(2))


def scored(service: Service, project: Project, tasks: list[int]) -> str:
    """The key of a project in each of whose tasks a version has seen a cell and a lesion."""
    key = key_of(service, project)
    add_version(service, key)
    path = service.scores_file(key, VERSION)
    path.parent.mkdir(parents=True)
    found = [polygon_result(region_id=f"r{n}", label=label, score=0.5) for n, label in enumerate(("cell", "lesion"))]
    lines = [{"task": task, "image": NEVER_VALIDATION, "score": 0.5, "result": found} for task in tasks]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return key


def published_by_a_cycle(service: Service, key: str) -> None:
    log = begin_cycle(service, key)
    publish(service, key, VERSION, log)
    log.finish("done")


@pytest.fixture
def key(service: Service, project: Project, tasks: list[int]) -> str:
    """A project whose active version has published a cell and a lesion in each task."""
    key = scored(service, project, tasks)
    published_by_a_cycle(service, key)
    return key


def wishes(service: Service, key: str) -> list[ActivationRow]:
    with service.database.session() as session:
        query = select(ActivationRow).where(ActivationRow.project_key == key).order_by(ActivationRow.number)
        return list(session.scalars(query))


def look(service: Service, key: str) -> str | None:
    """What the worker does at its next look: the reason for publishing anew, None when there is none."""
    before = len(wishes(service, key))
    reconcile(service, key)
    new = wishes(service, key)[before:]
    for wish in new:
        log = ActivationLog(service.database, key, wish.number)
        activate_version(service, key, wish.number, log)
        log.finish("done")
    return new[0].reason if new else None


def published(server: LabelStudioServer, tasks: list[int]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each prediction its version and its regions' controls and labels."""
    with raw_api(server) as api:
        found: list[dict[str, Any]] = [
            p for t in tasks for p in api.get("/api/predictions/", params={"task": t}).json()
        ]
    return [
        (p["model_version"], [(r["from_name"], r["value"]["polygonlabels"][0]) for r in p["result"]]) for p in found
    ]


def test_regions_of_labels_that_are_gone_disappear_and_come_back_with_the_label(
    service: Service, client: LabelStudioClient, project: Project, key: str, tasks: list[int],
    label_studio: LabelStudioServer,
) -> None:  # fmt: skip
    assert look(service, key) is None
    assert published(label_studio, tasks) == [(VERSION, [("label", "cell"), ("label", "lesion")])] * 2

    client.update_project(project.id, label_config=config("nodule", "cell"))
    assert look(service, key) == "the labelling configuration has changed: the label 'lesion' is gone"
    assert published(label_studio, tasks) == [(f"{VERSION}.1", [("label", "cell")])] * 2
    assert client.project(project.id).model_version == f"{VERSION}.1"
    (told,) = overview(service)
    assert told["labels"] == {"gone": ["lesion"], "new": ["nodule"]}
    assert look(service, key) is None

    client.update_project(project.id, label_config=config("lesion", "cell", "nodule", control="outline"))
    reason = "the label 'lesion' is back, the control 'label' is called 'outline'"
    assert look(service, key) == f"the labelling configuration has changed: {reason}"
    assert published(label_studio, tasks) == [(f"{VERSION}.2", [("outline", "cell"), ("outline", "lesion")])] * 2
    assert client.project(project.id).model_version == f"{VERSION}.2"

    client.update_project(project.id, label_config=config("lesion", "cell", "new", control="outline"))
    assert look(service, key) is None  # a label that no prediction has
    (told,) = overview(service)
    assert told["labels"] == {"gone": [], "new": ["new"]}
    assert client.model_versions(project.id) == {f"{VERSION}.2": 2}


def test_labels_that_change_between_the_scores_and_the_publication_of_a_cycle(
    service: Service, client: LabelStudioClient, project: Project, tasks: list[int], label_studio: LabelStudioServer
) -> None:
    key = scored(service, project, tasks)
    client.update_project(project.id, label_config=config("nodule", "cell", control="outline"))
    published_by_a_cycle(service, key)
    assert published(label_studio, tasks) == [(VERSION, [("outline", "cell")])] * 2
    assert client.project(project.id).model_version == VERSION
    (told,) = overview(service)
    assert told["labels"] == {"gone": ["lesion"], "new": ["nodule"]}
    assert look(service, key) is None


def test_a_label_that_is_gone_while_a_version_scores_comes_back_all_the_same(
    service: Service, client: LabelStudioClient, project: Project, tasks: list[int], label_studio: LabelStudioServer
) -> None:
    key = key_of(service, project)
    add_version(service, key)  # which sees cells everywhere
    client.update_project(project.id, label_config=config("lesion"))
    score_pool(service, key, VERSION)
    published_by_a_cycle(service, key)
    later = import_images(client, project, grey_images(3)[2:])
    score_pool(service, key, VERSION)
    import_missing(service, key, VERSION)
    assert published(label_studio, [*tasks, *later]) == [(VERSION, [])] * 3

    client.update_project(project.id, label_config=config("lesion", "cell"))
    assert look(service, key) == "the labelling configuration has changed: the label 'cell' is back"
    for name, regions in published(label_studio, [*tasks, *later]):
        assert (name, set(regions)) == (f"{VERSION}.1", {("label", "cell")})


def test_labels_that_change_while_a_publication_is_under_way(
    service: Service, client: LabelStudioClient, project: Project, tasks: list[int], label_studio: LabelStudioServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Label Studio drops regions of labels that it does not know, with the whole prediction, and says nothing."""
    key = scored(service, project, tasks)
    send = LabelStudioClient.import_predictions

    def change_before(ours: LabelStudioClient, *arguments: Any, **options: Any) -> int:
        monkeypatch.undo()
        client.update_project(project.id, label_config=config("cell"))
        return send(ours, *arguments, **options)

    monkeypatch.setattr(LabelStudioClient, "import_predictions", change_before)
    published_by_a_cycle(service, key)
    assert published(label_studio, tasks) == [(VERSION, [])] * 2  # each task has its place in the queue
    assert look(service, key) == "the labelling configuration has changed: the label 'lesion' is gone"
    assert published(label_studio, tasks) == [(f"{VERSION}.1", [("label", "cell")])] * 2
    assert client.project(project.id).model_version == f"{VERSION}.1"


def test_a_publication_that_failed_is_not_asked_for_again_and_again(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    reconcile(service, key)
    client.update_project(project.id, label_config=config("cell"))
    reconcile(service, key)
    reconcile(service, key)
    (wish,) = wishes(service, key)
    ActivationLog(service.database, key, wish.number).finish("failed", error="the disk is full")
    reconcile(service, key)
    assert len(wishes(service, key)) == 1


def test_a_configuration_that_lost_its_polygons_is_noticed_without_a_cycle(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    client.update_project(project.id, label_config='<View><Image name="image" value="$image"/></View>')
    with pytest.raises(LabelConfigError, match="expected a PolygonLabels tag"):
        reconcile(service, key)


def test_annotations_in_old_names_are_a_problem_that_says_how_to_mend_it(
    service: Service, client: LabelStudioClient, project: Project
) -> None:
    key = key_of(service, project)
    results = {
        "present": [polygon_result()],
        "an unknown label": [polygon_result(), polygon_result(region_id="r2", label="tumour")],
        "a control that is gone": [polygon_result(), {**polygon_result(region_id="r2"), "from_name": "outline"}],
    }
    images = [data_uri(image) for image in grey_images(3)]
    imported = client.import_tasks(
        project.id,
        [{"data": {"image": uri}, "annotations": [{"result": result}]} for uri, result in zip(images, results.values(),
                                                                                                  strict=True)],
    )  # fmt: skip
    log = begin_cycle(service, key)
    snapshot(service, key, 1, log)
    facts = cycle_row(service, key).facts
    assert (facts["training"], facts["problem_count"]) == (1, 2)
    mend = "give these regions one of the labels that the control 'label' has now (cell, lesion)"
    for problem, task, what in zip(
        facts["problems"], imported[1:], ("unknown label 'tumour'", "does not have: 'outline'"), strict=True
    ):
        assert problem.startswith(f"task {task}:")
        assert what in problem
        assert mend in problem
