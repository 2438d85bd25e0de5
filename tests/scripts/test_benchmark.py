"""The command of the benchmark: its processes, and what it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from model.config import NetworkConfig
from model.dataset import input_hw
from model.strategies import STRATEGIES
from scripts import benchmark
from scripts.shared_files import locked
from tests.scripts.examples import without_seconds

COMMAND = ["--size", "64", "--epochs", "1", "--min-steps", "3", "--first-batch", "3", "--batch", "2", "--cycles", "2"]


def command(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.benchmark", *map(str, arguments)], env=environment, **options
    )


def here(monkeypatch, *arguments):
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    benchmark.main()


def test_two_processes_do_each_run_once_and_the_report_comes_out(tmp_path, data, monkeypatch, capsys):
    lines = "random,tsp+ssl,full"
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", lines, "--seeds", "0", *COMMAND]
    process = command(*arguments, "--jobs", "2", stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    finished = f"All runs are finished. The report: {tmp_path / 'report.md'}"
    *said, last = output.splitlines()
    assert last == finished
    assert "| `tsp+ssl` | 1 |" in (tmp_path / "report.md").read_text()
    cycles = [("random", 1, 2, 3), ("random", 2, 2, 5), ("tsp+ssl", 1, 2, 3), ("tsp+ssl", 2, 2, 5), ("full", 1, 1, 9)]
    expected = [
        *(rf"{re.escape(f'{tmp_path / line}-seed0 ...')}" for line in lines.split(",")),
        *(rf"{re.escape(line)}-seed0, cycle {n} of {of}: {images} images, mAP@0\.5 [01]\.\d\d\d"
          for line, n, of, images in cycles),
    ]  # fmt: skip
    assert len(said) == len(expected)
    for pattern in expected:
        assert sum(re.fullmatch(pattern, line) is not None for line in said) == 1
    # The first cycle of both lines, the second of each, in which no pseudo label passes, and full supervision.
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) == 4
    seconds = [json.loads((tmp_path / f"{line}-seed0" / "run.json").read_text())["cycles"][0]["seconds"]
               for line in ("random", "tsp+ssl")]  # fmt: skip
    assert seconds[0]["training"] == seconds[1]["training"]  # of the cycle that both share

    here(monkeypatch, *arguments)  # nothing is left to do
    assert capsys.readouterr().out == f"{finished}\n"
    with pytest.raises(SystemExit, match=r"other settings or images \(training\.epochs\): choose another --out"):
        here(monkeypatch, *arguments, "--epochs", "2")

    here(monkeypatch, "report", "--out", tmp_path, "--json")
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert reports == {tmp_path.name: json.loads((tmp_path / "report.json").read_text())}
    report = reports[tmp_path.name]
    assert list(report["lines"]) == ["random", "tsp+ssl"]
    assert report["full_supervision"]["images"] == 9
    here(monkeypatch, "report", "--out", tmp_path)
    output = capsys.readouterr()
    assert output.out.startswith((tmp_path / "report.md").read_text())
    assert output.err.startswith(f"{tmp_path}: wrote report.md, report.json, figure2.png, ")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_process_is_carried_on_by_the_next(tmp_path, data, monkeypatch):
    arguments = ["--data", data, "--lines", "tsp", "--seeds", "0", *COMMAND]
    here(monkeypatch, "run", "--out", tmp_path / "at once", *arguments)
    process = command("run", "--out", tmp_path / "killed", *arguments, stdout=subprocess.DEVNULL)
    result = tmp_path / "killed" / "tsp-seed0" / "run.json"
    while not result.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    here(monkeypatch, "run", "--out", tmp_path / "killed", *arguments)
    assert without_seconds(result) == without_seconds(tmp_path / "at once" / "tsp-seed0" / "run.json")


@pytest.mark.parametrize("line", ["best", "tsp+", "tsp+sll", "full+ssl", ""])
def test_a_line_that_does_not_exist_is_refused_with_those_that_do(tmp_path, data, monkeypatch, line):
    with pytest.raises(SystemExit, match=r"expected random, mc_dropout, .* or full"):
        here(monkeypatch, "run", "--data", data, "--out", tmp_path, "--lines", line, *COMMAND)


def test_a_report_of_no_runs_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"expected results .* found none"):
        here(monkeypatch, "report", "--out", tmp_path)


def test_the_command_runs_as_a_file_from_any_folder(tmp_path):
    path = Path(benchmark.__file__)
    done = subprocess.run(
        [sys.executable, path, "report", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "docs/benchmark: expected results" in done.stderr


def test_no_cycle_starts_after_the_deadline_and_what_is_left_is_said(tmp_path, data, monkeypatch, capsys):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "random,tsp", "--seeds", "0", *COMMAND]
    here(monkeypatch, *arguments, "--max-minutes", "0")
    assert capsys.readouterr().out.split("\n") == [
        "2 of 2 runs are not finished; the same command goes on with those that no other process is at:",
        "  random-seed0: 0 of 2 cycles",
        "  tsp-seed0: 0 of 2 cycles",
        "",
    ]
    here(monkeypatch, *arguments)
    assert "not finished" not in capsys.readouterr().out


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_set_that_is_smaller_than_asked_for_is_mentioned_once(tmp_path, data, monkeypatch, capsys, jobs):
    sizes = ["--pool", "30", "--test", "3", "--max-minutes", "0", "--jobs", jobs]
    here(monkeypatch, "run", "--data", data, "--out", tmp_path, "--lines", "random", "--seeds", "0", *COMMAND, *sizes)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "--pool 30: there are only 9 images for it, and all are used"
    assert second.startswith("1 of 1 runs are not finished")


def test_the_help_names_the_lines_that_there_are(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        here(monkeypatch, "run", "--help")
    output = capsys.readouterr().out
    assert all(name in output for name in [*STRATEGIES, "+ssl", "full"])


def test_the_help_says_what_a_setting_is_in_each_profile(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        here(monkeypatch, "run", "--help")
    output = capsys.readouterr().out
    for setting in ("pool has; paper: all, cpu: 300", "starts with; paper: 500, cpu: 50", "steps; paper: 0, cpu: 1000"):
        assert setting in output


def test_saying_what_is_left_takes_no_run_from_another_process(tmp_path, data, monkeypatch):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "random", "--seeds", "0", *COMMAND]
    (tmp_path / "random-seed0" / "lock").mkdir(parents=True)  # who tried to lock it would fail
    here(monkeypatch, *arguments, "--max-minutes", "0")
    with pytest.raises(IsADirectoryError):
        here(monkeypatch, *arguments)


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path, data, monkeypatch, capsys):
    (tmp_path / "random-seed0").mkdir()
    with locked(tmp_path / "random-seed0" / "lock"):
        here(monkeypatch, "run", "--data", data, "--out", tmp_path, "--lines", "random", "--seeds", "0", *COMMAND)
    assert "  random-seed0: 0 of 2 cycles" in capsys.readouterr().out
    assert not (tmp_path / "random-seed0" / "run.json").exists()


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_processes_of_a_benchmark_end_with_it(tmp_path, data, which):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "random,tsp", *COMMAND]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    in_background = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_IGN)}  # as shells start jobs there
    with command(*arguments, "--jobs", "2", "--min-steps", "5000", **pipes, **in_background) as process:
        for _ in range(2):  # both workers have begun
            assert process.stdout.readline().endswith("...\n")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(which)
        assert process.wait(timeout=30) == 128 + which
        assert not [child for child in children if Path(f"/proc/{child}").exists()]
        said = process.stderr.read()
    assert said.count("Stopped. The same command goes on from the last checkpoint.") == (which == signal.SIGINT)


def test_a_finished_run_whose_network_was_not_kept_is_named(tmp_path, data, monkeypatch, capsys):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "full", "--seeds", "0", *COMMAND]
    here(monkeypatch, *arguments)
    folder = tmp_path / "full-seed0"
    told = f"{folder} is finished, and its network was not kept: delete it to make the run anew\n"
    capsys.readouterr()
    here(monkeypatch, *arguments, "--keep-networks")
    assert capsys.readouterr().out.startswith(told)
    shutil.rmtree(folder)
    here(monkeypatch, *arguments, "--keep-networks")
    assert (folder / "network").exists()
    here(monkeypatch, *arguments, "--keep-networks")
    assert "was not kept" not in capsys.readouterr().out


def test_the_rank_of_torchrun_that_ends_last_writes_the_report(tmp_path, data, monkeypatch, capsys):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "full", "--seeds", "0", *COMMAND]
    (tmp_path / "full-seed0").mkdir()
    with locked(tmp_path / "full-seed0" / "lock"):  # another rank is at it
        monkeypatch.setenv("RANK", "0")
        here(monkeypatch, *arguments)
        assert "1 of 1 runs are not finished" in capsys.readouterr().out
        monkeypatch.setenv("RANK", "1")
        here(monkeypatch, *arguments)
        assert capsys.readouterr().out == ""
    here(monkeypatch, *arguments)
    assert (tmp_path / "report.md").exists()


def test_each_rank_of_torchrun_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert benchmark._device(None) == "cuda:3"
    assert benchmark._device("cpu") == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert benchmark._device(None) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark._device(None) == "cpu"


def test_a_device_that_is_not_there_is_told_at_the_start():
    with pytest.raises(ValueError, match="--device: expected a device that torch can use on this machine, got 'gpu'"):
        benchmark._device("gpu")


def test_the_papers_profile_is_that_of_the_paper():
    paper = benchmark.EFFORTS["paper"]
    assert (paper.pool, paper.test) == (None, None)
    experiment = paper.experiment
    assert (experiment.profile, experiment.weights) == ("resnet50_fpn", "coco")
    network = NetworkConfig.for_profile(experiment.profile, 2, **experiment.network)
    for hw in ((512, 512), (512, 1024)):  # its CT and OCT images
        assert input_hw(hw, network) == hw
    assert (experiment.first_batch, experiment.batch, experiment.cycles) == (500, 500, 6)
    training = experiment.training
    assert (training.epochs, training.schedule, training.learning_rate) == (50, "step", 0.001)
    assert (training.milestones, training.momentum, training.weight_decay, training.beta) == ((45, 49), 0.9, 1e-4, 0.01)
    pseudo = experiment.pseudo
    assert (pseudo.class_threshold, pseudo.box_threshold, pseudo.mask_threshold) == (0.9, 0.9, 0.8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--first-batch", "8"], r"a first batch of 8 and 1 of 2 are 10 images, the pool has 9: choose smaller ones"),
        (["--seeds", "a"], r"--seeds: expected whole numbers, by commas, got 'a'"),
        (["--thresholds", "0.9,0.8"], r"--thresholds: expected three numbers, by commas, got '0\.9,0\.8'"),
        (["--data", "nowhere"], r"--data: expected a COCO folder, with annotations\.json and images/, got nowhere"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_made(tmp_path, data, monkeypatch, options, told):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=told):
        here(monkeypatch, "run", "--data", data, "--out", out, "--lines", "random", *COMMAND, *options)
    assert not list(out.glob("*-seed*"))


def test_all_images_at_once_need_no_batches(tmp_path, data, monkeypatch, capsys):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "full", "--seeds", "0", *COMMAND]
    here(monkeypatch, *arguments, "--first-batch", "50")
    assert "full-seed0, cycle 1 of 1: 9 images" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--first-batch", "--batch", "--cycles", "--pool", "--epochs"])
@pytest.mark.parametrize("value", ["0", "-4", "many"])
def test_a_size_that_is_none_is_refused(data, monkeypatch, capsys, option, value):
    with pytest.raises(SystemExit):
        here(monkeypatch, "run", "--data", data, f"{option}={value}")
    assert f"argument {option}: expected a whole number of at least 1, got '{value}'" in capsys.readouterr().err
