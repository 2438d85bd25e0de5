"""Scoring the unlabelled images of a real Label Studio with a tiny real network."""

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml_backend.chunks import CutPool
from ml_backend.errors import LabelConfigError, LabelStudioUnavailableError
from ml_backend.label_config import parse_label_config
from ml_backend.ls_client import LabelStudioClient
from ml_backend.ls_format import Json
from ml_backend.ls_types import Project
from ml_backend.pool import (
    OpenedImage,
    PoolSeen,
    TaskImages,
    Viewer,
    append_line,
    detections_for_people,
    go_on_with,
    is_validation,
    load_to_look,
    look_at,
    read_heads,
    read_scores,
    score_pool,
    score_pool_in_steps,
)
from ml_backend.pseudo_labels import seen_image
from ml_backend.service import Service
from ml_backend.unseen import KnownPool
from model.types import Detections
from scripts.fault_proxy import Call, Fault, FaultProxy
from scripts.label_studio_server import HOST, LabelStudioServer, free_port
from tests.label_studio import POLYGON_CONFIG, polygon_result
from tests.ml_backend.examples import (
    KEY,
    UNREADABLE,
    VERSION,
    add_version,
    begin_cycle,
    cycle_row,
    grey_images,
    import_images,
    key_of,
    settings,
    sha256,
)
from tests.model.examples import tiny_network


def detections(labels: list[int], class_scores: list[float]) -> Detections:
    count = len(labels)
    return Detections(
        image_hw=(48, 64),
        boxes_xyxy=np.tile(np.array([4.0, 4.0, 30.0, 30.0], np.float32), (count, 1)),
        labels=np.array(labels, np.int64),
        class_scores=np.array(class_scores, np.float32),
        box_scores=np.full(count, 0.5, np.float32),
        mask_scores=np.full(count, 0.5, np.float32),
        roi_masks=np.ones((count, 28, 28), np.float32),
    )


@pytest.fixture
def key(service: Service, project: Project) -> str:
    """The project with a version in the registry."""
    key = key_of(service, project)
    add_version(service, key)
    return key


def scores(service: Service, key: str) -> dict[int, dict[str, object]]:
    return {line["task"]: line for line in read_scores(service.scores_file(key, VERSION))}


@pytest.mark.label_studio
def test_each_task_without_annotation_gets_one_line(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    images = grey_images(4)
    tasks = import_images(client, project, images)
    client.submit_annotation(tasks[0], result=[polygon_result()], lead_time_seconds=1)
    client.skip(tasks[1])
    log = begin_cycle(service, key)
    assert score_pool(service, key, VERSION, log) == 3
    lines = list(read_scores(service.scores_file(key, VERSION)))
    assert [line["task"] for line in lines] == tasks[1:]
    assert [line["image"] for line in lines] == [sha256(image) for image in images[1:]]
    for line in lines:
        assert line["image_hw"] == [48, 64]
        assert Path(line["path"]).exists()
        assert line["instances"] > 0
        assert 0 <= line["score"] <= 1
        assert {region["type"] for region in line["result"]} <= {"polygonlabels"}
        kept = seen_image(line, ("cell", "lesion"), only_masks=False)
        assert len(kept.detections) == len(kept.rles) == len(line["detections"]["labels"]) > 0
        assert set(kept.rles) == {None}  # nobody has trained this network
    row = cycle_row(service, key)
    assert (row.stage, row.done, row.total) == ("scoring the unlabelled images", 3, 3)
    assert row.facts == {"pool": 3, "pool_without_detections": 0, "pool_problems": [], "pool_problem_count": 0}


@pytest.mark.label_studio
def test_scoring_goes_on_after_an_interruption_in_the_middle_of_a_line(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    import_images(client, project, grey_images(4))
    score_pool(service, key, VERSION)
    path = service.scores_file(key, VERSION)
    whole = path.read_bytes()
    first_two = b"".join(whole.splitlines(keepends=True)[:2])
    path.write_bytes(whole[: len(first_two) + 40])
    assert len(scores(service, key)) == 2
    assert score_pool(service, key, VERSION) == 2
    assert path.read_bytes() == whole


@pytest.mark.label_studio
def test_what_was_scored_is_not_scored_again_and_new_tasks_are(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    images = grey_images(3)
    first = import_images(client, project, images[:2])
    assert score_pool(service, key, VERSION) == 2
    before = service.scores_file(key, VERSION).read_bytes()
    assert score_pool(service, key, VERSION) == 0
    assert service.scores_file(key, VERSION).read_bytes() == before
    second = import_images(client, project, images[2:])
    assert score_pool(service, key, VERSION) == 1
    assert list(scores(service, key)) == [*first, *second]


@pytest.mark.label_studio
def test_what_another_worker_has_seen_since_the_last_look_counts(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    def look(known: KnownPool | None) -> PoolSeen:
        steps = score_pool_in_steps(service, key, VERSION, known=known)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    images = grey_images(3)
    import_images(client, project, images[:2])
    first = look(None)
    assert (first.count, first.added) == (2, 2)
    (new,) = import_images(client, project, images[2:])
    assert look(None).added == 1  # the other worker
    client.submit_annotation(new, result=[polygon_result()], lead_time_seconds=1)
    second = look(first.known)
    assert (second.count, second.added) == (3, 0)
    assert look(second.known) == second


class Alone:
    """A team of one, which stops after so many lines."""

    def __init__(self, service: Service, key: str, *, lines: int | None = None) -> None:
        self.viewer, self.lines = Viewer.of_project(service, key, VERSION), lines
        self.sizes: list[int] = []

    def see(self, pool: CutPool) -> Iterator[Json]:
        for number in range(pool.chunks):
            if not pool.is_seen(number):
                self.sizes.append(len(pool.tasks(number)))
                pool.keep(number, self.viewer.lines(pool.tasks(number)))
            for line in pool.lines(number):
                if self.lines == 0:
                    raise LabelStudioUnavailableError("no answer")
                self.lines = None if self.lines is None else self.lines - 1
                yield line

    def forget(self, pool: CutPool) -> None:
        pool.remove()


@pytest.mark.label_studio
@pytest.mark.parametrize(
    ("chunk", "stops_after", "sizes", "sizes_then"),
    [(1, None, [], [1] * 5), (2, None, [], [2, 2, 1]), (5, None, [], []), (2, 3, [2, 2], [1]), (2, 0, [2], [2, 1])],
    ids=["one by one", "twos", "no more than a chunk", "stopped inside of a chunk", "stopped before the first line"],
)
def test_chunks_make_the_file_that_one_worker_makes(
    label_studio: LabelStudioServer,
    client: LabelStudioClient,
    project: Project,
    tmp_path: Path,
    chunk: int,
    stops_after: int | None,
    sizes: list[int],
    sizes_then: list[int],
) -> None:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(settings(tmp_path, TSP_SCORING_CHUNK=chunk, TSP_ALLOWED_IMAGE_HOSTS=HOST, **place))
    key = key_of(service, project)
    add_version(service, key, strategy="hybrid")  # which keeps features
    away = f"http://{HOST}:{free_port()}/0.png"
    import_images(client, project, [*grey_images(2), UNREADABLE, away, *grey_images(3)[2:]])
    log = begin_cycle(service, key)
    assert score_pool(service, key, VERSION, log) == 4
    path, alone, facts = service.scores_file(key, VERSION), scores(service, key), cycle_row(service, key).facts
    content = path.read_bytes()
    path.unlink()

    if stops_after is not None:
        team = Alone(service, key, lines=stops_after)
        with pytest.raises(LabelStudioUnavailableError):
            score_pool(service, key, VERSION, log, team=team)
        assert team.sizes == sizes
        assert list(scores(service, key)) == list(alone)[:stops_after]
    team = Alone(service, key)
    assert score_pool(service, key, VERSION, log, team=team) == 4
    assert team.sizes == sizes_then
    assert path.read_bytes() == content
    assert cycle_row(service, key).facts == facts
    assert not service.chunks_folder(key, VERSION).exists()
    service.close()


@pytest.mark.label_studio
def test_an_image_that_cannot_be_read_is_reported_and_the_others_go_on(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    (good,) = grey_images(1)
    broken, gone, fine = import_images(client, project, [UNREADABLE, "/data/upload/0/gone.png", good])
    log = begin_cycle(service, key)
    assert score_pool(service, key, VERSION, log) == 3
    lines = scores(service, key)
    assert set(lines[broken]) == set(lines[gone]) == {"task", "problem"}
    assert "score" in lines[fine]
    facts = cycle_row(service, key).facts
    assert facts["pool_problem_count"] == 2
    assert f"image of task {broken} (data:image/png" in facts["pool_problems"][0]
    assert f"image of task {gone} (/data/upload/0/gone.png)" in facts["pool_problems"][1]


@pytest.mark.label_studio
def test_a_configuration_that_lost_its_polygons_is_an_error(
    service: Service, client: LabelStudioClient, project: Project, key: str
) -> None:
    client.update_project(project.id, label_config='<View><Image name="image" value="$image"/></View>')
    with pytest.raises(LabelConfigError, match="expected a PolygonLabels tag"):
        score_pool(service, key, VERSION)


def test_a_scores_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(read_scores(tmp_path / "none.jsonl")) == []


def test_a_line_without_its_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(json.dumps({"task": 1}) + "\n" + json.dumps({"task": 2}))
    assert list(read_scores(path)) == [{"task": 1}]


@pytest.mark.parametrize(
    ("content", "known"),
    [(None, set()), ("", set()), ('{"task": 1}\n{"task": 5}\n', {1, 5}), ('{"task": 1}\n{"task": 5', {1})],
    ids=["no folder", "empty", "whole", "cut off"],
)
def test_a_file_of_lines_can_be_gone_on_with(tmp_path: Path, content: str | None, known: set[int]) -> None:
    path = tmp_path / "scores" / "lines.jsonl"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    assert go_on_with(path, "task") == known
    with path.open("a") as file:
        append_line(file, {"task": 9})
    assert [line["task"] for line in read_scores(path)] == [*sorted(known), 9]


@pytest.mark.parametrize(
    ("labels", "class_scores", "shown"),
    [
        pytest.param([1, 3], [0.9, 0.8], [2, 1], id="classes are renumbered"),
        pytest.param([1, 2, 3], [0.9, 0.8, 0.7], [2, 1], id="a class that is gone"),
        pytest.param([1, 3], [0.9, 0.29], [2], id="one too unsure"),
        pytest.param([3], [0.3], [1], id="just sure enough"),
        pytest.param([2], [0.9], [], id="nothing is left"),
        pytest.param([], [], [], id="nothing was found"),
    ],
)
def test_people_see_what_is_sure_enough_and_of_a_class_that_they_know(
    labels: list[int], class_scores: list[float], shown: list[int]
) -> None:
    config = parse_label_config(POLYGON_CONFIG)  # cell is 1, lesion 2
    seen = detections_for_people(
        detections(labels, class_scores),
        config,
        class_names=("lesion", "gone", "cell"),
        shown_threshold=float(np.float32(0.3)),
        mask_threshold=0.3,
    )
    assert seen.labels.tolist() == shown
    assert len(seen.roi_masks) == len(shown)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5])
def test_the_split_takes_its_share_of_the_images(fraction: float) -> None:
    images = [sha256(str(number).encode()) for number in range(2000)]
    assert np.mean([is_validation(image, fraction) for image in images]) == pytest.approx(fraction, abs=0.03)


def test_a_larger_share_keeps_the_images_of_a_smaller_one() -> None:
    images = [sha256(str(number).encode()) for number in range(200)]
    small, large = ({image for image in images if is_validation(image, fraction)} for fraction in (0.2, 0.4))
    assert small < large


@pytest.mark.label_studio
def test_an_image_whose_host_is_away_is_scored_when_it_is_back(
    label_studio: LabelStudioServer, client: LabelStudioClient, project: Project, tmp_path: Path
) -> None:
    place = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
    service = Service.connect(settings(tmp_path, TSP_ALLOWED_IMAGE_HOSTS="127.0.0.0/8", **place))
    key = key_of(service, project)
    add_version(service, key)
    log = begin_cycle(service, key)
    port = free_port()
    (tmp_path / "files").mkdir()
    images = grey_images(3)
    for number, image in enumerate(images[:2]):
        (tmp_path / "files" / f"{number}.png").write_bytes(image)
    foreign = import_images(client, project, [f"http://{HOST}:{port}/{number}.png" for number in (0, 1, 2, 3, 4)])
    own = import_images(client, project, [images[2]])

    assert score_pool(service, key, VERSION, log) == 1  # nothing listens there
    assert set(scores(service, key)) == set(own)
    facts = cycle_row(service, key).facts
    assert facts["pool_problem_count"] == 5
    assert sum("is away" in problem for problem in facts["pool_problems"]) == 2  # the host was asked three times

    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "files"))
    with ThreadingHTTPServer((HOST, port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert score_pool(service, key, VERSION) == 5
        server.shutdown()
    found = scores(service, key)
    assert set(found) == {*own, *foreign}
    assert [task for task, line in found.items() if "problem" in line] == foreign[2:]  # 404 stays an answer
    service.close()


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "turned"])
def test_what_is_found_in_a_large_photo_is_in_its_own_pixels(lonely_service: Service, orientation: int) -> None:
    """It is decoded reduced and shrunk before the network has it."""
    service = lonely_service
    add_version(service, KEY)
    photo, exif, file = Image.effect_noise((768, 512), 60), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    photo.save(file, "JPEG", exif=exif)
    task = {"id": 1, "data": {"image": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"}}
    (line,) = Viewer(service, KEY, VERSION, parse_label_config(POLYGON_CONFIG)).lines([task])
    hw = (512, 768) if orientation == 1 else (768, 512)
    assert line["image_hw"] == list(hw)
    network, card = load_to_look(service, KEY, VERSION)
    _, expected = look_at(service, network, card, Path(line["path"]), hw)
    found = seen_image(line, card.class_names, only_masks=False).detections
    assert found.image_hw == expected.image_hw == hw
    away = np.abs(found.boxes_xyxy[:, None] - expected.boxes_xyxy).max(axis=2)
    assert (away.min(axis=1) < 0.1).all()  # each is one of those, rounded
    assert found.boxes_xyxy[:, 2].max() > hw[1] / 2
    assert found.boxes_xyxy[:, 3].max() > hw[0] / 2
    assert found.boxes_xyxy.max() <= max(hw)


HOST_OF_IMAGES = {"away": Fault(kind="refuse"), "cut off": Fault(kind="cut"), "busy": Fault(kind="status", status=503)}


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        pytest.param(["cut off"], range(9), id="one is cut off"),
        pytest.param(["cut off", "away"], range(9), id="two in a row"),
        pytest.param(["away", "", "away", "", "away"], range(9), id="three between others"),
        pytest.param(["away", "busy", "away", "busy", "away"], range(9), id="an error is an answer"),
        pytest.param(["cut off", "away", "away"], range(3), id="three in a row"),
        pytest.param(["away", "cached", "away", "cached", "away"], (0, 2, 4), id="a cached one is no answer"),
    ],
)
def test_a_host_is_left_alone_after_three_images_in_a_row_without_an_answer(
    faults: Sequence[str], asked: Sequence[int], tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    for number, image in enumerate(grey_images(9)):
        (tmp_path / "files" / f"{number}.png").write_bytes(image)
    spoilt: dict[str, Fault] = {}
    paths: list[str] = []

    def choose(call: Call) -> Fault | None:
        paths.append(call.path)
        return spoilt.get(call.path)

    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "files"))
    with (
        ThreadingHTTPServer((HOST, 0), handler) as server,
        FaultProxy(f"http://{HOST}:{server.server_port}", choose) as proxy,
        closing(Service.connect(settings(tmp_path, TSP_ALLOWED_IMAGE_HOSTS=HOST))) as service,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        images = TaskImages(service, KEY, parse_label_config(POLYGON_CONFIG), network=tiny_network)
        tasks = [{"id": number, "data": {"image": f"{proxy.url}/{number}.png"}} for number in range(9)]
        for number, fault in enumerate(faults):
            if fault == "cached":
                images.opened(tasks[number])
            elif fault:
                spoilt[f"/{number}.png"] = HOST_OF_IMAGES[fault]
        paths.clear()
        found = [images.opened(task) for task in tasks]
        server.shutdown()
    assert paths == [f"/{number}.png" for number in asked]
    there = [number for number in range(9) if number in asked and f"/{number}.png" not in spoilt]
    cached = [number for number, fault in enumerate(faults) if fault == "cached"]
    assert [number for number, one in enumerate(found) if isinstance(one, OpenedImage)] == sorted([*there, *cached])


def test_the_heads_of_lines_are_all_that_stands_before_what_was_seen(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    tricky = ', "result": '
    heads = [{"task": 1, "path": tricky, "score": 0.5}, {"task": 2, "score": None}]
    whole = {"task": 3, "problem": f"gone{tricky}"}
    with path.open("w") as lines:
        for head in heads:
            append_line(lines, {**head, "result": [{"value": tricky}], "detections": {"result": 1}})
        append_line(lines, whole)
        lines.write('{"task": 4, "result": [')
    assert list(read_heads(path)) == [*heads, whole]
    assert list(read_heads(tmp_path / "none.jsonl")) == []
