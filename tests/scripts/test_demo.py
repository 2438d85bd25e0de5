"""What the demo hands to its processes, and which images it takes."""

import argparse
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.errors import TSPError
from model.files import write_json
from scripts import demo
from scripts.backend_processes import _ended
from scripts.demo import _images, _positive_from_environment, _settings, _Status
from tests.scripted_server import says, scripted_server

OPTIONS = argparse.Namespace(backend_port=9090, batch_size=20, image_size=None, data=None, epochs=10, min_steps=300)


def test_the_environments_settings_count_where_the_demo_has_no_option_of_its_own(monkeypatch):
    monkeypatch.setenv("TSP_STRATEGY", "hybrid")
    monkeypatch.setenv("TSP_BATCH_SIZE", "7")
    monkeypatch.setenv("TSP_IMAGE_SIZE", "128")
    monkeypatch.setenv("TSP_VALIDATION_FRACTION", "0.5")
    settings = _settings(OPTIONS, Path("demo"), SimpleNamespace(url="http://127.0.0.1:1", token="t"))
    assert settings["TSP_STRATEGY"] == "hybrid"
    assert settings["TSP_BATCH_SIZE"] == "20"
    assert (settings["TSP_IMAGE_SIZE"], settings["TSP_VALIDATION_FRACTION"]) == ("128", "0.5")
    assert settings["TSP_RECONCILE_SECONDS"] == "15"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, ("192", "10", "300")), ({"TSP_EPOCHS": "", "TSP_MIN_STEPS": "7"}, ("192", "10", "7"))],
    ids=["nothing said", "one empty, one said"],
)
def test_an_option_that_is_not_given_leaves_it_to_the_environment_and_then_to_the_demo(monkeypatch, given, expected):
    for name in ("TSP_IMAGE_SIZE", "TSP_EPOCHS", "TSP_MIN_STEPS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    none = argparse.Namespace(**{**vars(OPTIONS), "epochs": None, "min_steps": None})
    settings = _settings(none, Path("demo"), SimpleNamespace(url="http://127.0.0.1:1", token="t"))
    assert tuple(settings[name] for name in ("TSP_IMAGE_SIZE", "TSP_EPOCHS", "TSP_MIN_STEPS")) == expected


@pytest.mark.parametrize(("given", "size"), [(None, 20), ("7", 7), ("", 20)])
def test_the_size_of_a_batch_may_come_from_the_environment(monkeypatch, given, size):
    monkeypatch.delenv("TSP_BATCH_SIZE", raising=False)
    if given is not None:
        monkeypatch.setenv("TSP_BATCH_SIZE", given)
    assert _positive_from_environment("TSP_BATCH_SIZE", 20) == size


def test_a_size_of_the_environment_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("TSP_BATCH_SIZE", "x")
    with pytest.raises(TSPError, match="TSP_BATCH_SIZE: expected a whole number of at least 1, got 'x'"):
        _positive_from_environment("TSP_BATCH_SIZE", 20)


def demo_of(folder):
    return _images(argparse.Namespace(data=str(folder), labels="a,b"), folder)


def test_files_that_label_studio_takes_no_uploads_of_are_left_out_by_name(tmp_path, capsys):
    for name in ("b.PNG", "a ü.jpg", "deep/c.webp", "scan.tif", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images = demo_of(tmp_path)
    assert sorted(path.name for path in images.paths) == ["a ü.jpg", "b.PNG", "c.webp"]
    assert images.labels == ("a", "b")
    told = capsys.readouterr().out
    assert "2 files are left out" in told
    assert told.endswith("notes.txt, scan.tif\n")


def test_a_coco_set_of_such_files_is_refused_before_anything_starts(tmp_path):
    images = [{"id": 1, "file_name": "scan.tif", "height": 8, "width": 8}]
    categories = [{"id": 1, "name": "cell"}]
    write_json(tmp_path / "annotations.json", {"images": images, "annotations": [], "categories": categories})
    with pytest.raises(TSPError, match=r"takes \.png, .* only, got scan\.tif"):
        demo_of(tmp_path)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (1, "ended with status 1"),
        (-signal.SIGTERM, "was ended by signal 15 (SIGTERM)"),
        (-signal.SIGKILL, "was ended by signal 9 (SIGKILL), as it is for lack of memory"),
    ],
)
def test_how_a_process_ended_is_told_in_words(status, told):
    assert _ended(status) == told


@pytest.mark.parametrize("option", ["--cycles", "--batch-size", "--image-size", "--epochs"])
def test_a_size_that_is_none_is_refused_before_anything_starts(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["demo", option, "0"])
    with pytest.raises(SystemExit):
        demo.main()
    assert f"argument {option}: expected a whole number of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "told"), [("running", ["cycle 3: training, 50 %"]), ("done", [])])
def test_a_cycle_that_ended_before_the_waiting_began_is_no_news(capsys, status, told):
    cycle = {"number": 3, "status": status, "stage": "training", "done": 5, "total": 10}
    answers = {"/status": [says(200, {"projects": [{"id": 1, "cycles": [cycle]}]})]}
    with scripted_server(answers) as (url, _):
        _Status(SimpleNamespace(url=url, check=lambda: None), 1)._wait(iter([False, False, True]).__next__)
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == told
