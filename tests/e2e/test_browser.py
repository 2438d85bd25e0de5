"""What annotators and project owners see in a real browser: Label Studio with our predictions, and the dashboard."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from jinja2 import Environment, FileSystemLoader
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from ml_backend import ls_format
from ml_backend.app import create_app
from ml_backend.db import CycleRow, ProjectRow, WorkerRow
from ml_backend.label_config import parse_label_config
from ml_backend.ls_client import UNCERTAINTY_SAMPLING, LabelStudioClient
from ml_backend.ls_types import Project
from ml_backend.overview import overview
from ml_backend.service import Service
from model.config import FEWEST_IMAGES
from model.geometry import rle_to_mask
from model.types import Detections
from scripts.backend_processes import BackendProcesses
from scripts.label_studio_server import LabelStudioServer, free_port
from scripts.screenshots import chromium, find_chromium, label_all_tasks, log_in, new_page, select_region
from scripts.served_app import served
from tests.label_studio import PASSWORD, POLYGON_CONFIG, USERNAME
from tests.ml_backend.examples import KEY, add_version, settings

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="chromium is not installed: apt install chromium"),
]

IMAGE_HW = (160, 200)
VERSION = "tsp-1-browser"
RECTANGLES_CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="label" toName="image"><Label value="cell"/></RectangleLabels>
</View>
"""
CONFIG = parse_label_config(POLYGON_CONFIG)
# Tips are not served, and after the last task there is no next one; both are 404 in the browser's console.
NOT_FOUND_WITHOUT_US = ("/heidi-tips", "/api/dm/actions?id=next_task")
OTHER_VERSION = "tsp-2-browser"
_NEXT_LOOK_MS = 60_000  # which the dashboard has after three seconds, on a machine that is not busy
UI = Path(__file__).parents[2] / "ml_backend" / "ui"
DASHBOARD = Environment(loader=FileSystemLoader(UI), autoescape=True).get_template("ui.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own, without the log-in of another test."""
    page = new_page(browser)
    yield page
    page.close()


@dataclass(frozen=True)
class Predicted:
    """A project with one task, which has our prediction."""

    project_id: int
    task_id: int
    prediction: dict[str, Any]


@pytest.fixture
def predicted(client: LabelStudioClient, project: Project, tmp_path: Path) -> Predicted:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, IMAGE_HW, dtype=np.uint8)).save(path)
    (task_id,) = client.import_files(project.id, [path])
    prediction = ls_format.prediction(_two_instances(), CONFIG, model_version=VERSION, score=0.31)
    assert client.import_predictions(project.id, [ls_format.for_task(prediction, task_id)]) == 1
    client.set_model_version(project.id, VERSION)
    client.update_project(project.id, sampling=UNCERTAINTY_SAMPLING, maximum_annotations=1)
    return Predicted(project.id, task_id, prediction)


def _two_instances() -> Detections:
    """A lesion in one part, and a cell in two that do not touch."""
    rows, columns = np.mgrid[0:28, 0:28]
    disc = (rows - 13.5) ** 2 + (columns - 13.5) ** 2 < 12**2
    halves = (columns < 11) | (columns > 17)
    return Detections(
        image_hw=IMAGE_HW,
        boxes_xyxy=np.array([[20, 20, 90, 100], [110, 60, 190, 120]], dtype=np.float32),
        labels=np.array([2, 1]),
        class_scores=np.array([0.93, 0.58]),
        box_scores=np.array([0.88, 0.71]),
        mask_scores=np.array([0.79, 0.64]),
        roi_masks=np.stack([disc, halves]).astype(np.float32),
    )


@pytest.mark.label_studio
def test_an_annotator_sees_our_regions_and_submits_them_unchanged(
    label_studio: LabelStudioServer, client: LabelStudioClient, predicted: Predicted, page: Page
) -> None:
    log_in(page, label_studio.url, email=USERNAME, password=PASSWORD)
    errors = _errors(page)

    label_all_tasks(page, label_studio.url, predicted.project_id)
    rows = page.get_by_role("treeitem")
    expect(rows).to_have_count(3)
    for index, (name, confidence) in enumerate((("lesion", "0.93"), ("cell", "0.58"), ("cell", "0.58"))):
        expect(rows.nth(index)).to_contain_text(name)
        expect(rows.nth(index)).to_contain_text(confidence)
    assert "class .93 box .88 mask .79, certainty" in select_region(page, 0)

    with page.expect_response(lambda r: r.request.method == "POST" and "/annotations" in r.url) as submitted:
        page.get_by_role("button", name="Submit current annotation").click()
    assert submitted.value.ok
    page.get_by_text("No More Tasks Left in Queue").wait_for()
    assert [error for error in errors if not any(path in error for path in NOT_FOUND_WITHOUT_US)] == []
    (task,) = client.annotated_tasks(predicted.project_id, [predicted.task_id])
    (annotation,) = task["annotations"]
    assert [region.get("parentID") for region in annotation["result"]] == [
        region.get("parentID") for region in predicted.prediction["result"]
    ]
    _check_same_instances(annotation, predicted.prediction)


def _errors(page: Page) -> list[str]:
    """Filled with the errors that the page reports from now on, and where each comes from."""
    errors: list[str] = []

    def keep(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(f"{message.text} ({message.location['url']})")

    page.on("console", keep)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return errors


def _check_same_instances(annotation: dict[str, Any], prediction: dict[str, Any]) -> None:
    submitted = ls_format.instances_from_annotation(annotation, CONFIG, IMAGE_HW)
    shown = ls_format.instances_from_annotation(prediction, CONFIG, IMAGE_HW)
    assert not submitted.ignored
    assert submitted.labels.tolist() == shown.labels.tolist() == [2, 1]
    for mine, theirs in zip(map(rle_to_mask, shown.rles), map(rle_to_mask, submitted.rles), strict=True):
        assert (mine & theirs).sum() / (mine | theirs).sum() > 0.95


@pytest.fixture
def backend(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[BackendProcesses]:
    settings = {
        "LABEL_STUDIO_URL": label_studio.url,
        "LABEL_STUDIO_API_KEY": label_studio.token,
        "MODEL_DIR": str(tmp_path / "models"),
        "PORT": str(free_port()),
    }
    with BackendProcesses(settings=settings, log_dir=tmp_path / "logs") as backend:
        yield backend


@pytest.mark.label_studio
def test_connecting_a_project_without_polygons_shows_why_it_was_refused(
    label_studio: LabelStudioServer, client: LabelStudioClient, backend: BackendProcesses, page: Page
) -> None:
    project = client.create_project(title="rectangles", label_config=RECTANGLES_CONFIG)
    log_in(page, label_studio.url, email=USERNAME, password=PASSWORD)
    page.goto(f"{label_studio.url}/projects/{project.id}/settings/ml")
    page.locator("button", has_text="Connect Model").click()
    page.fill("input[name=title]", "TSP")
    page.fill("input[name=url]", backend.url)
    page.locator("button", has_text="Validate and Save").click()
    reason = page.get_by_text("expected-a-PolygonLabels-tag").first
    expect(reason).to_be_visible()
    expect(reason).to_contain_text("Tags-found:-View,-Image,-RectangleLabels,-Label")
    assert client.ml_backends(project.id) == []


BOX_RELIABILITY: dict[str, Any] = {
    "spearman": 0.61,
    "calibration_error": 0.083,
    "bins": [[0.55, 0.4, 3], [0.74, 0.81, 12], [0.97, 0.9, 31]],
    "count": 46,
}
MASK_RELIABILITY: dict[str, Any] = BOX_RELIABILITY | {"spearman": -0.2, "bins": [[0.35, 0.6, 5], [0.83, 0.7, 41]]}
UNSURE = {"spearman": None, "calibration_error": None, "bins": [], "count": 0}
METRICS = {"map_50": 0.8, "map_50_95": 0.4, "images": 6, "ap_50_by_class": {"cell": 0.8, "lesion": None}}
CYCLE: dict[str, Any] = {
    "number": 1,
    "status": "done",
    "stage": "finished",
    "reason": "20 newly annotated images (a batch is 20)",
    "done": 0,
    "total": 0,
    "version": "tsp-1-0123abcd",
    "facts": {"annotated": 20, "pseudo_labeled": 3, "metrics": METRICS},
    "error": "",
    "planned_at": "2025-01-01T03:04:05",
    "finished_at": "2025-01-02T03:04:05.678901+00:00",
}
RELIABLE: dict[str, Any] = CYCLE | {
    "facts": {
        **CYCLE["facts"],
        "pseudo_for_teacher": 8,
        "strategy": "hybrid",
        "batch": 20,
        "metrics": METRICS
        | {"rescored_map_50": 0.81, "box_reliability": BOX_RELIABILITY, "mask_reliability": MASK_RELIABILITY},
    }
}
FEW = CYCLE | {
    "facts": {"strategy": "tsp", "metrics": METRICS | {"box_reliability": UNSURE, "mask_reliability": UNSURE}}
}
RUNNING = CYCLE | {
    "number": 3,
    "status": "running",
    "stage": "training on 14 annotated and 0 pseudo-labelled images",
    "done": 33,
    "total": 280,
    "facts": {"annotated": 60, "pseudo_labeled": 0},
    "finished_at": None,
}
FAILED = CYCLE | {
    "number": 2,
    "status": "failed",
    "stage": "failed",
    "facts": {
        "annotated": 40,
        "problems": ["task 7: http://label-studio.example.com/" + 60 * "x"],
        "problem_count": 23,
    },
    "error": "training stopped: loss is not finite",
}
GATE: dict[str, Any] = {"active": "tsp-1-0123abcd", "accepted": False, "reason": "refused: mask mAP@0.5 0.412 is less"}
REFUSED = CYCLE | {"number": 2, "status": "refused", "stage": "refused", "version": "tsp-2-0123abcd",
                   "facts": {"gate": GATE, "metrics": METRICS}}  # fmt: skip
KEPT: list[dict[str, Any]] = [
    {"version": version, "is_active": version == "tsp-1-0123abcd"}
    for version in ("tsp-2-0123abcd", "tsp-1-0123abcd", "tsp-1-99999999")
]
WISH = RUNNING | {"version": "tsp-2-0123abcd", "reason": "asked for on the dashboard",
                  "stage": "publishing predictions", "planned_at": "2025-01-02T03:04:05"}  # fmt: skip
FAILED_WISH = WISH | {"status": "failed", "stage": "failed", "error": "the disk is full"}
UNMEASURED = CYCLE | {"facts": {"metrics": METRICS | {"map_50": None, "map_50_95": None, "images": 0}}}
PROJECT: dict[str, Any] = {
    "key": "5-1735787045",
    "id": 5,
    "title": "CT",
    "url": "http://label-studio.example.com/projects/5/data",
    "problem": "",
    "annotated": 40,
    "new_annotated": 3,
    "batch_size": 20,
    "checked_at": "2025-01-02T03:04:05.678901+00:00",
    "active_version": "tsp-1-0123abcd",
    "first_batch": None,
    "events": {"received": 44, "waiting": 1},
    "labels": {"gone": [], "new": []},
    "activations": [],
    "pool_look": None,
    "versions": [],
    "versions_problem": "",
    "cycles": [],
}


def telling(images: int) -> dict[str, int]:
    """What newer cycles add: so many validation images have instances."""
    return {"images_with_instances": images}


@pytest.mark.parametrize(
    ("projects", "texts"),
    [
        pytest.param([], ["No project is connected yet"], id="no project"),
        pytest.param(
            [PROJECT | {"checked_at": "", "active_version": None, "title": ""}],
            ["Project 5", "3 of 20 newly annotated images", "no predictions yet", "Not looked at Label Studio yet"],
            id="no cycle",
        ),
        pytest.param(
            [PROJECT | {"cycles": [RUNNING | {"time_left": "about 12 min"}, FAILED, CYCLE]}],
            [
                "33 of 280, about 12 min left in this stage",
                "loss is not finite",
                "and 22 more",
                "cell 0.80.",
                "6 validation images that never train: too few to tell a good model from a bad one.",
                "0.400",
                "2025-01-02 03:04 UTC",
            ],
            id="a running, a failed and a finished cycle",
        ),
        pytest.param(
            [PROJECT | {"cycles": [CYCLE | {"facts": {"metrics": METRICS | {"images": FEWEST_IMAGES}}}]}],
            [f"{FEWEST_IMAGES} validation images that never train. Newest by class"],
            id="enough validation images, of an older release",
        ),
        pytest.param(
            [PROJECT | {"cycles": [CYCLE | {"facts": {"metrics": METRICS | {"images": 12} | telling(FEWEST_IMAGES)}}]}],
            [f"12 validation images that never train, {FEWEST_IMAGES} of them with annotated instances. Newest by"],
            id="enough validation images with instances",
        ),
        pytest.param(
            [
                PROJECT
                | {"cycles": [CYCLE | {"facts": {"metrics": METRICS | {"images": 12} | telling(FEWEST_IMAGES - 1)}}]}
            ],
            [f"{FEWEST_IMAGES - 1} of them with annotated instances: too few to tell a good model from a bad one."],
            id="too few of them with instances",
        ),
        pytest.param(
            [PROJECT | {"advice": "43 of the 50 images show nothing"}],
            ["43 of the 50 images show nothing"],
            id="a batch of mostly empty images",
        ),
        pytest.param([PROJECT | {"cycles": [UNMEASURED]}], ["finished"], id="nothing could be measured"),
        pytest.param(
            [PROJECT | {"cycles": [RELIABLE | {"number": 2}, CYCLE]}],
            [
                "box score Spearman 0.61, calibration error 0.08; mask score Spearman -0.20, calibration error 0.08 "
                "(46 detections)",
                "The newest has 0.810 when its detections are ranked by class times mask score.",
                "next images by hybrid, a batch of 20",
                "3 + 8 for the teacher",
                "predicted IoU",
            ],
            id="measured branches",
        ),
        pytest.param(
            [PROJECT | {"cycles": [FEW]}],
            ["box score too few to say; mask score too few to say (0 detections)", "next images by tsp"],
            id="too few detections",
        ),
        pytest.param(
            [PROJECT | {"first_batch": {"done": 7, "total": 90, "tasks": 0, "is_published": False}}],
            ["7 of 90 images looked at"],
            id="a first batch that is being prepared",
        ),
        pytest.param(
            [PROJECT | {"first_batch": {"done": 90, "total": 90, "tasks": 20, "is_published": True}}],
            ["20 images that differ from each other are served first"],
            id="a first batch",
        ),
        pytest.param(
            [
                PROJECT
                | {"pool_look": RUNNING | {"stage": "scoring the unlabelled images", "time_left": "about 12 min"}}
            ],
            ["New tasks: scoring the unlabelled images", "33 of 280, about 12 min left in this stage"],
            id="a look at imported tasks",
        ),
        pytest.param(
            [PROJECT | {"cycles": [REFUSED, CYCLE], "versions": KEPT, "activations": [WISH]}],
            [
                "refused: mask mAP@0.5 0.412 is less",
                "in use",
                "Use this version",
                "tsp-1-99999999 of an earlier",
                "tsp-2-0123abcd, asked for on the dashboard: publishing predictions",
                "33 of 280",
            ],
            id="a refused version that is asked for",
        ),
        pytest.param(
            [
                PROJECT
                | {
                    "cycles": [REFUSED],
                    "activations": [FAILED_WISH],
                    "versions_problem": "a damaged version",
                    "labels": {"gone": ["lesion"], "new": ["nodule", "vessel"]},
                }
            ],
            ["the disk is full", "a damaged version", "no longer has: lesion.", "has not learnt: nodule, vessel."],
            id="labels that have changed",
        ),
        pytest.param([PROJECT | {"problem": "no <PolygonLabels>"}], ["no <PolygonLabels>"], id="a problem"),
    ],
)
@pytest.mark.parametrize("width", [400, 1400])
def test_the_dashboard_tells_each_state_without_scrolling_sideways(
    page: Page, projects: list[dict[str, Any]], texts: list[str], width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    _show(page, projects)
    shown = page.locator("body").inner_text()
    assert [text for text in texts if text not in shown] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_dashboard_draws_the_map_of_each_measured_cycle(page: Page) -> None:
    cycles = [CYCLE | {"number": number} for number in range(30, 1, -1)]
    _show(page, [PROJECT | {"cycles": [RUNNING, FAILED, *cycles, UNMEASURED]}])
    assert page.locator("circle").count() == len(cycles)
    labels = [label.bounding_box() for label in page.locator("svg text[text-anchor=middle]").all()]
    assert all(a and b and a["x"] + a["width"] < b["x"] for a, b in pairwise(labels))


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_the_dashboard_draws_predicted_against_true_ious(
    page: Page, width: int, scheme: Literal["dark", "light"]
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    _show(page, [PROJECT | {"cycles": [RELIABLE | {"number": 2}, CYCLE]}])
    plot = page.get_by_role("img", name="reliability")
    drawn = plot.bounding_box()
    assert drawn is not None
    assert drawn["x"] + drawn["width"] <= width
    branches = plot.locator("g.branch")
    # One mark for each bin and one in the legend.
    marks = [branch.locator("path").count() for branch in branches.all()]
    assert marks == [len(BOX_RELIABILITY["bins"]) + 1, len(MASK_RELIABILITY["bins"]) + 1]
    assert plot.locator("title").first.text_content() == "box: 0.55 predicted, 0.40 true, 3 detections"
    colours = [branch.evaluate("e => getComputedStyle(e).fill") for branch in branches.all()]
    assert len({*colours, plot.locator("text").first.evaluate("e => getComputedStyle(e).fill")}) == 3


def test_without_detections_there_is_no_plot(page: Page) -> None:
    _show(page, [PROJECT | {"cycles": [FEW]}])
    assert page.locator("svg").count() == 0


def test_the_dashboard_tells_that_the_worker_is_missing(page: Page) -> None:
    _show(page, [], worker={"problem": "No worker is here."})
    assert "No worker is here." in page.locator(".problem").inner_text()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A project with a cycle that trains and a history that fills the screen, and a worker that lives."""
    service = Service.connect(settings(tmp_path))
    with service.database.session() as session:
        session.add(ProjectRow(key=KEY, label_studio_id=7, title="CT"))
        session.add(WorkerRow(name="host-1", seen_at="2999-01-02T03:04:05.000000+00:00"))
        session.flush()
        training = {"stage": "training on 14 annotated images", "done": 43, "total": 99}
        session.add(CycleRow(project_key=KEY, number=40, status="running", **training))
        session.add_all(
            CycleRow(project_key=KEY, number=number, status="done", stage="finished") for number in range(1, 40)
        )
    yield service
    service.close()


def _do_step(service: Service, done: int) -> None:
    with service.database.session() as session:
        session.get_one(CycleRow, (KEY, 40)).done = done


_PLACE_OF_THE_FOCUS = "document.activeElement.getBoundingClientRect().top"


def _open_dashboard(page: Page, url: str) -> None:
    """And wait until it says that Label Studio is not there, which the service finds out by and by."""
    page.goto(f"{url}/ui")
    expect(page).to_have_title("43 % training - CT - TSP active learning")
    expect(page.locator(".problem").filter(has_text="127.0.0.1:1")).to_be_visible(timeout=_NEXT_LOOK_MS)


def test_the_dashboard_keeps_up_and_stays_where_one_reads(page: Page, service: Service) -> None:
    with served(create_app(service.settings)) as url:
        _open_dashboard(page, url)
        page.get_by_text("Forget this project").focus()
        page.evaluate("window.scrollTo(0, 500); window.isTheSame = true")
        errors = _errors(page)
        _do_step(service, 50)
        expect(page).to_have_title("50 % training - CT - TSP active learning", timeout=_NEXT_LOOK_MS)
        expect(page.get_by_text("50 of 99")).to_be_visible()
        assert page.locator("td progress").evaluate("e => e.position") == pytest.approx(50 / 99)
        assert page.evaluate("[window.scrollY, window.isTheSame, document.activeElement.textContent]") == [
            500,
            True,
            "Forget this project",
        ]
        assert errors == []


def test_what_appears_above_or_vanishes_leaves_the_place_where_one_reads(page: Page, service: Service) -> None:
    with served(create_app(service.settings)) as url:
        _open_dashboard(page, url)
        link = page.get_by_text("Forget this project")
        link.focus()
        page.get_by_role("row").filter(has_text="43 of 99").evaluate("row => row.isTheSame = true")
        place = page.evaluate(_PLACE_OF_THE_FOCUS)
        with service.database.session() as session:
            session.add(
                WorkerRow(name="host-2", seen_at="2999-01-02T03:04:05.000000+00:00", problem="The disk is full.")
            )
            session.add(CycleRow(project_key=KEY, number=41, status="planned", stage="planned"))
            session.get_one(CycleRow, (KEY, 40)).done = 44
        expect(page.get_by_text("The disk is full.")).to_be_visible(timeout=_NEXT_LOOK_MS)
        row = page.get_by_role("row").filter(has_text="44 of 99")
        assert row.evaluate("row => [row.isTheSame, row.previousElementSibling.textContent.includes('planned')]") == [
            True,
            True,
        ]
        expect(link).to_be_focused()
        assert page.evaluate(_PLACE_OF_THE_FOCUS) == pytest.approx(place, abs=1)
        with service.database.session() as session:
            session.delete(session.get_one(CycleRow, (KEY, 41)))
            session.delete(session.get_one(WorkerRow, "host-2"))
        expect(page.get_by_text("The disk is full.")).to_have_count(0, timeout=_NEXT_LOOK_MS)
        assert row.evaluate("row => row.isTheSame")
        expect(link).to_be_focused()


def test_the_dashboard_says_when_it_is_not_up_to_date(page: Page, service: Service) -> None:
    port = free_port()
    with served(create_app(service.settings), port=port) as url:
        page.goto(f"{url}/ui")
    told = page.get_by_text("This page cannot be brought up to date")
    expect(told).to_be_visible(timeout=_NEXT_LOOK_MS)
    expect(page).to_have_title("not up to date - TSP active learning")
    _do_step(service, 50)
    with served(create_app(service.settings), port=port):
        expect(page).to_have_title("50 % training - CT - TSP active learning", timeout=_NEXT_LOOK_MS)
        expect(told).to_be_hidden()


def test_the_dashboard_keeps_up_where_the_address_has_the_password(
    page: Page, tmp_path: Path, service: Service
) -> None:
    guarded = settings(tmp_path, BASIC_AUTH_USER="ada", BASIC_AUTH_PASS="secret-word")
    with served(create_app(guarded)) as url:
        page.goto(f"{url}/ui".replace("://", "://ada:secret-word@"))
        _do_step(service, 50)
        expect(page).to_have_title("50 % training - CT - TSP active learning", timeout=_NEXT_LOOK_MS)


def test_the_dashboard_keeps_up_without_scripts(browser: Browser, service: Service) -> None:
    with served(create_app(service.settings)) as url, browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{url}/ui")
        _do_step(service, 50)
        expect(page).to_have_title("50 % training - CT - TSP active learning", timeout=_NEXT_LOOK_MS)


def test_a_button_that_becomes_another_one_while_it_is_pressed_does_nothing(page: Page, service: Service) -> None:
    for version in (VERSION, OTHER_VERSION):
        add_version(service, KEY, version)
    with served(create_app(service.settings)) as url:
        page.goto(f"{url}/ui")
        buttons = page.get_by_role("button", name="Use this version")
        buttons.first.hover()
        page.mouse.down()
        (shown,) = re.findall("Make (.+) the active", buttons.first.get_attribute("title") or "")
        shutil.rmtree(service.registry.root / KEY / shown)
        expect(buttons).to_have_count(1, timeout=_NEXT_LOOK_MS)  # where the other one was
        page.mouse.up()
        with page.expect_response(f"{url}/ui", timeout=_NEXT_LOOK_MS):  # and none of an action's
            pass
        expect(page).to_have_url(f"{url}/ui")
    assert overview(service)[0]["activations"] == []


def _show(page: Page, projects: list[dict[str, Any]], worker: dict[str, Any] | None = None) -> None:
    """Without the script that brings it up to date: there is no server to ask again."""
    content = DASHBOARD.render(
        worker=worker or {"problem": ""},
        label_studio={"problem": ""},
        events={"problem": ""},
        refused={"problem": ""},
        projects=projects,
        fewest_images=FEWEST_IMAGES,
    )
    page.set_content(content)
