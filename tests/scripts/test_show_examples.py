"""The picture of hardest and easiest images, from a run of the benchmark and from a registry's version."""

import sys

import cv2
import numpy as np
import pytest

from model.dataset import read_coco
from model.registry import ModelCard, Registry
from model.tsp import image_score, instance_scores
from scripts import show_examples
from scripts.active_learning import run
from scripts.benchmark_lines import parse_line
from scripts.benchmark_sets import read_data
from scripts.make_phantoms import make_phantoms
from scripts.show_examples import score
from tests.model.examples import detections, tiny_network
from tests.scripts.examples import EXPERIMENT


@pytest.fixture(scope="module")
def kept(data, tmp_path_factory):
    """A run of two cycles whose network is kept; five of its nine images are annotated at its end."""
    out, name = tmp_path_factory.mktemp("runs"), parse_line("tsp", 0)
    sets = read_data(data, pool_size=None, test_size=None)
    run(name, EXPERIMENT, sets, out / name.folder, out / "shared", keep_network=True)
    return out / name.folder


def here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["show_examples", *map(str, arguments)])
    show_examples.main()


def test_the_picture_of_a_run_shows_images_that_nobody_annotated(tmp_path, data, kept, monkeypatch, capsys):
    here(monkeypatch, "--data", data, "--run", kept, "--out", tmp_path / "new" / "examples.png", "--threshold", "0")
    assert capsys.readouterr().out.endswith(": of 4 images\n")  # and nothing of images that are left out
    picture = cv2.imread(str(tmp_path / "new" / "examples.png"))
    assert picture.shape[0] > 500
    assert picture.std() > 10


def test_the_picture_of_a_run_on_crops_shows_the_crops(tmp_path, data, monkeypatch, capsys):
    name = parse_line("random", 0)
    sets = read_data(data, pool_size=None, test_size=None, crop=48, shared=tmp_path / "shared")
    run(name, EXPERIMENT, sets, tmp_path / name.folder, tmp_path / "shared", keep_network=True)
    arguments = ("--data", data, "--run", tmp_path / name.folder, "--out", tmp_path / "examples.png")
    here(monkeypatch, *arguments, "--threshold", "0")
    assert "of 4 images" in capsys.readouterr().out


def test_the_picture_of_a_version_is_of_all_images(tmp_path, data, monkeypatch, capsys):
    network = tiny_network(num_classes=4)
    card = ModelCard(
        version="v1", network=network.config.to_json(), class_names=("a", "b", "c"), created_at="2026-01-01T00:00:00Z"
    )
    Registry(tmp_path).add("project", card, network)
    version = tmp_path / "project" / "v1"
    here(monkeypatch, "--data", data, "--weights", version, "--out", tmp_path / "a.png", "--columns", "2")
    assert "of 12 images" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_examples_are_in_the_order_of_s_over_the_instances_that_count(data, kept):
    network, _ = Registry(kept).load("network", "cycle-2")
    images = read_coco(data / "annotations.json").images
    every, without = score(network, images, threshold=0.0)
    assert len(every) + without == len(images)
    assert [e.score for e in every] == sorted(e.score for e in every)
    threshold = float(np.median([e.detections.class_scores.max() for e in every]))
    some, without = score(network, images, threshold=threshold)
    assert 0 < len(some) < len(every)
    assert len(some) + without == len(images)
    for example in some:
        found = example.detections
        assert found.class_scores.min() >= threshold
        scores = instance_scores(found.class_scores, found.box_scores, found.mask_scores)
        assert example.score == pytest.approx(image_score(scores))


def test_labels_do_not_cover_each_other_and_stay_inside():
    found = detections([[10, 10 + i, 30, 30 + i] for i in range(10)])
    places = list(show_examples._places(found, 5, [16] * 10))
    heights = sorted(y for _, y in places)
    assert np.diff(heights).min() >= 4.9
    assert min(heights) >= 2.5
    assert max(heights) <= 64 - 2.5


def test_a_label_that_finds_no_room_is_left_out():
    found = detections([[10, 10, 30, 30]] * 5)  # in an image of 64 pixels
    places = list(show_examples._places(found, 20, [16] * 5))
    assert sum(place is not None for place in places) == 3
    assert places[3:] == [None, None]


def test_short_labels_stand_beside_each_other_where_long_ones_do_not():
    found = detections([[0, 30, 20, 50], [40, 30, 60, 50]])
    beside, below = (list(show_examples._places(found, 5, [half] * 2)) for half in (10, 30))
    assert beside[0][1] == beside[1][1]
    assert abs(below[0][1] - below[1][1]) >= 4.9


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (0, ""),
        (1, "; 1 without any detection has no S and is left out"),
        (2, "; 2 without any detection have no S and are left out"),
    ],
)
def test_images_without_a_detection_are_mentioned_if_there_are_any(without, said):
    assert show_examples._left_out(without) == said


def test_a_run_of_other_images_is_refused(tmp_path, kept, monkeypatch):
    make_phantoms(tmp_path / "other", images=12, size=64, seed=1)
    with pytest.raises(SystemExit, match="was made with other images"):
        here(monkeypatch, "--data", tmp_path / "other", "--run", kept, "--out", tmp_path / "a.png")


def test_a_folder_that_is_no_run_is_refused(tmp_path, data, monkeypatch):
    with pytest.raises(SystemExit, match=r"there is no run\.json"):
        here(monkeypatch, "--data", data, "--run", tmp_path, "--out", tmp_path / "a.png")


def test_a_folder_that_is_no_version_is_refused(tmp_path, data, monkeypatch):
    with pytest.raises(SystemExit, match=rf"--weights: expected the folder of a version, .* got {tmp_path}$"):
        here(monkeypatch, "--data", data, "--weights", tmp_path, "--out", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--out", "a.gif"], "--out: expected a file whose name ends in .png, got 'a.gif'", id="suffix"),
        pytest.param(["--out", "{folder}"], "name ends in .png, got the folder '{folder}'", id="a folder"),
        pytest.param(["--out", "a.png", "--columns", "0"], "--columns: expected a whole number of at", id="no column"),
        pytest.param(
            ["--out", "a.png", "--threshold", "1.5"], "expected a number from 0 to 1, got '1.5'", id="threshold"
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_network_looks_at_anything(
    tmp_path, data, kept, monkeypatch, capsys, arguments, said
):
    folder = tmp_path / "a.png"
    folder.mkdir()
    monkeypatch.setattr(show_examples, "_from_run", None)
    with pytest.raises(SystemExit):
        here(monkeypatch, "--data", data, "--run", kept, *(part.format(folder=folder) for part in arguments))
    assert said.format(folder=folder) in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_named_first(tmp_path, data, kept, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(show_examples, "_from_run", None)
    with pytest.raises(SystemExit, match=r"^No picture: .*File exists: '.*file'"):
        here(monkeypatch, "--data", data, "--run", kept, "--out", tmp_path / "file" / "a.png")


def test_a_name_in_capital_letters_is_as_good(tmp_path, data, kept, monkeypatch):
    here(monkeypatch, "--data", data, "--run", kept, "--out", tmp_path / "A.PNG", "--threshold", "0")
    assert (tmp_path / "A.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_run_is_refused(tmp_path, data, monkeypatch):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SystemExit, match="got what is no JSON"):
        here(monkeypatch, "--data", data, "--run", tmp_path, "--out", tmp_path / "a.png")


def test_a_run_whose_network_was_not_kept_is_refused_with_the_option_that_keeps_it(tmp_path, data, kept, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text((kept / "run.json").read_text())
    with pytest.raises(SystemExit, match="make the run anew with --keep-networks"):
        here(monkeypatch, "--data", data, "--run", tmp_path / "run", "--out", tmp_path / "a.png")


def test_a_network_that_finds_nothing_has_no_picture(tmp_path, data, kept, monkeypatch):
    with pytest.raises(SystemExit, match=r"finds nothing with a class score of 1\.0"):
        here(monkeypatch, "--data", data, "--run", kept, "--out", tmp_path / "a.png", "--threshold", "1")
