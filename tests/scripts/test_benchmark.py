"""The benchmark: real tiny runs, interrupted everywhere, side by side; and the report's statistics by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model.files
import scripts.active_learning
from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, read_coco
from scripts import benchmark, benchmark_report
from scripts.active_learning import cycles_done, first_batch, run
from scripts.benchmark_lines import Experiment, parse_line
from scripts.benchmark_report import write_report
from scripts.benchmark_sets import Data
from scripts.make_phantoms import make_phantoms
from tests.model.examples import TINY

SMALL = {**TINY, "trainable_stages": 0, "detections_per_image": 8}
EXPERIMENT = Experiment(
    profile="efficientnet_lite0_fpn",
    weights="imagenet",
    network=SMALL,
    training=TrainingConfig.for_cpu(epochs=1, min_steps=3, batch_size=2, checkpoint_every_steps=1),
    pseudo=PseudoLabelConfig(class_threshold=0, box_threshold=0, mask_threshold=0),
    first_batch=3,
    batch=2,
    cycles=2,
)
COMMAND = ["--size", "64", "--epochs", "1", "--min-steps", "3", "--first-batch", "3", "--batch", "2", "--cycles", "2"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, images=12, size=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def sets(data):
    everything = read_coco(data / "annotations.json")
    pool, test = everything.images[:9], everything.images[9:]
    parts = [LabeledSet(images=part, class_names=everything.class_names) for part in (pool, test)]
    return Data(name="phantoms", pool=parts[0], test=parts[1])


def carry_out(out, sets, line="tsp", *, seed=0, experiment=EXPERIMENT, **options):
    """Run to the end; what run.json holds, without the seconds."""
    name = parse_line(line, seed)
    run(name, experiment, sets, out / name.folder, out / "shared", **options)
    return without_seconds(out / name.folder / "run.json")


def without_seconds(path):
    state = json.loads(path.read_text())
    for cycle in state["cycles"]:
        for clocks in cycle.pop("seconds").values():
            # None: it was killed between its last checkpoint and the note of how long it took.
            assert clocks is None or min(clocks["cpu"], clocks["wall"]) >= 0
    return state


def watch_training(monkeypatch):
    """The steps of each training from now on."""
    trained = []
    train = scripts.active_learning.train

    def watched(network, images, config, *, on_step, **options):
        steps = []
        trained.append(steps)

        def both(progress):
            steps.append(progress)
            on_step(progress)

        return train(network, images, config, on_step=both, **options)

    monkeypatch.setattr(scripts.active_learning, "train", watched)
    return trained


def annotated(state):
    return [cycle["annotated"] for cycle in state["cycles"]]


# --- one run


def test_a_run_annotates_a_batch_a_cycle_and_leaves_only_its_result(tmp_path, sets):
    state = carry_out(tmp_path, sets)
    first, second = annotated(state)
    assert first == first_batch(sets.pool, 3, 0)
    assert len(second) == 2
    assert not set(first) & set(second)
    assert [cycle["annotated_images"] for cycle in state["cycles"]] == [3, 5]
    assert "next" not in state
    assert [path.name for path in (tmp_path / "tsp-seed0").iterdir()] == ["run.json"]


def test_a_pool_that_runs_out_ends_with_everything_annotated(tmp_path, sets):
    experiment = replace(EXPERIMENT, first_batch=6, batch=2, cycles=4, training=TrainingConfig(epochs=1, batch_size=9))
    state = carry_out(tmp_path, sets, "tsp+ssl", experiment=experiment)
    assert [len(batch) for batch in annotated(state)] == [6, 2, 1, 0]
    assert sorted(i for batch in annotated(state) for i in batch) == sorted(
        image.image_id for image in sets.pool.images
    )
    assert [cycle["pseudo_images"] for cycle in state["cycles"]][2:] == [0, 0]


def test_the_full_line_annotates_everything_in_one_cycle(tmp_path, sets):
    state = carry_out(tmp_path, sets, "full")
    assert [cycle["annotated_images"] for cycle in state["cycles"]] == [9]
    assert cycles_done(parse_line("full", 0), EXPERIMENT, sets, tmp_path / "full-seed0") == (1, 1)


def test_pseudo_labels_are_trained_on_when_every_detection_is_trusted(tmp_path, sets, monkeypatch):
    steps = watch_training(monkeypatch)
    with_ssl = carry_out(tmp_path, sets, "tsp+ssl")
    assert any(name.startswith("semi_") for name in steps[-1][-1].losses)
    first, second = with_ssl["cycles"]
    assert (first["pseudo_images"], first["pseudo_quality"]) == (0, None)
    assert second["pseudo_images"] == 4
    assert second["pseudo_quality"]["instances"] > 0
    assert 0 <= second["pseudo_quality"]["precision"] <= 1

    steps.clear()
    without = carry_out(tmp_path, sets)
    assert not any(name.startswith("semi_") for training in steps for step in training for name in step.losses)
    assert annotated(without) == annotated(with_ssl)


# --- interrupted


class StoppedHereError(Exception):
    pass


def interrupted_at_every_write(monkeypatch, carry_on, *, after):
    """Carry a run on until it ends, stopped each time just after its first file, or just before its second one."""
    real, attempts = model.files.write_bytes, 0
    while True:
        written = []

        def write(path, content, written=written):
            if len(written) == 1:
                raise StoppedHereError
            real(path, content)
            written.append(path)
            if after:
                raise StoppedHereError

        monkeypatch.setattr(model.files, "write_bytes", write)
        attempts += 1
        try:
            return carry_on(), attempts
        except StoppedHereError:
            assert attempts < 100
        finally:
            monkeypatch.setattr(model.files, "write_bytes", real)


@pytest.mark.parametrize(
    ("line", "after"),
    [
        pytest.param("tsp+ssl", True, id="tsp+ssl, after a file"),
        pytest.param("tsp+ssl@first=spread", False, id="tsp+ssl, before the next file"),
        pytest.param("mc_dropout", True, id="mc_dropout, after a file"),
    ],
)
def test_a_run_interrupted_everywhere_ends_as_if_it_had_not_been(tmp_path, sets, monkeypatch, line, after):
    expected = carry_out(tmp_path / "at once", sets, line)
    state, attempts = interrupted_at_every_write(
        monkeypatch, lambda: carry_out(tmp_path / "in pieces", sets, line), after=after
    )
    # Two cycles, each of several files.
    assert attempts >= 5
    assert state == expected


def test_a_finished_run_is_not_touched(tmp_path, sets):
    carry_out(tmp_path, sets)
    path = tmp_path / "tsp-seed0" / "run.json"
    before = path.stat()
    carry_out(tmp_path, sets)
    assert path.stat() == before


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "in the middle"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"batch": 3}, id="batch"),
        pytest.param({"training": replace(EXPERIMENT.training, epochs=2)}, id="epochs"),
        pytest.param({"network": {**SMALL, "min_size": 48}}, id="network"),
    ],
)
def test_a_run_made_with_other_settings_is_refused(tmp_path, sets, change, finished):
    folder = tmp_path / "tsp-seed0"
    if finished:
        carry_out(tmp_path, sets)
    else:
        folder.mkdir()
        settings = scripts.active_learning._load(folder, parse_line("tsp", 0), EXPERIMENT, sets)
        (folder / "run.json").write_text(json.dumps(settings))
    other = replace(EXPERIMENT, **change)
    with pytest.raises(ValueError, match="other settings or images"):
        cycles_done(parse_line("tsp", 0), other, sets, folder)
    with pytest.raises(ValueError, match="other settings or images"):
        run(parse_line("tsp", 0), other, sets, folder, tmp_path / "shared")


# --- what runs have in common


def test_all_strategies_start_with_the_same_images_at_a_seed_and_others_at_another(sets):
    pool = sets.pool
    assert first_batch(pool, 3, 0) == first_batch(pool, 5, 0)[:3]
    assert first_batch(pool, 5, 0) != first_batch(pool, 5, 1)
    assert len(set(first_batch(pool, 9, 2))) == 9


def test_the_first_cycle_is_trained_once_for_all_lines_that_share_it(tmp_path, sets, monkeypatch):
    trained = watch_training(monkeypatch)
    states = [carry_out(tmp_path, sets, strategy) for strategy in ("random", "tsp", "core_set", "learning_loss")]
    assert [len(steps) > 0 for steps in trained] == [True, True, False, True, False, True, True, True]
    assert len({tuple(state["cycles"][0]["annotated"]) for state in states}) == 1
    first = [{k: v for k, v in state["cycles"][0].items() if k != "queue"} for state in states]
    assert first[0] == first[1] == first[2]


# --- the command


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
    assert sorted(output.split("\n")) == sorted(["", *(f"{tmp_path / line}-seed0 ..." for line in lines.split(","))])
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) == 1
    seconds = [json.loads((tmp_path / f"{line}-seed0" / "run.json").read_text())["cycles"][0]["seconds"]
               for line in ("random", "tsp+ssl")]  # fmt: skip
    assert seconds[0]["training"] == seconds[1]["training"]  # of the cycle that both share

    here(monkeypatch, *arguments)  # nothing is left to do
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="other settings or images"):
        here(monkeypatch, *arguments, "--epochs", "2")

    here(monkeypatch, "report", "--out", tmp_path, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert list(report["lines"]) == ["random", "tsp+ssl"]
    assert report["full_supervision_map_50"] is not None
    here(monkeypatch, "report", "--out", tmp_path)
    assert capsys.readouterr().out.startswith((tmp_path / "report.md").read_text())
    assert "| tsp+ssl | 1 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


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
    with pytest.raises(SystemExit, match=r"expected finished cycles .* found none"):
        here(monkeypatch, "report", "--out", tmp_path)


# --- the report


def made_run(line, seed, heights, images=(10, 20, 30), **settings):
    """What a run with these values of mAP@0.5 would leave."""
    reliability = {"spearman": 0.5, "calibration_error": 0.1, "bins": [], "count": 9}
    shared = {"pool_images": 100, "test_images": 50, "profile": "p", "first_batch": 10, "batch": 10, "cycles": 3}
    return {
        "line": line,
        "seed": seed,
        "settings": {**shared, **settings},
        "cycles": [
            {"number": n, "annotated_images": count, "annotated_instances": 2 * count, "pseudo_quality": None,
             "seconds": {"training": {"cpu": 1.0, "wall": 1.0}},
             "map_50": height, "map_50_95": height / 2, "rescored_map_50_95": height / 2,
             "box_reliability": reliability, "mask_reliability": reliability}
            for n, (count, height) in enumerate(zip(images, heights, strict=False), start=1)
        ],
    }  # fmt: skip


def write_runs(folder, *runs):
    for state in runs:
        path = folder / f"{state['line']}-seed{state['seed']}" / "run.json"
        path.parent.mkdir()
        path.write_text(json.dumps(state))


def test_the_report_has_means_intervals_areas_and_the_images_to_reach_full_supervision(tmp_path):
    runs = [made_run("tsp", 0, [0.1, 0.3, 0.5]), made_run("tsp", 1, [0.3, 0.5, 0.7])]
    write_runs(tmp_path, *runs, made_run("full", 0, [0.5], images=[100]), made_run("random", 0, [0.2]))
    report = write_report(tmp_path)
    assert list(report["lines"]) == ["tsp"]  # random is not finished
    line = report["lines"]["tsp"]
    assert line["seeds"] == [0, 1]
    assert line["map_50"] == pytest.approx([0.2, 0.4, 0.6])
    # Two values 0.2 apart: standard deviation 0.1414, standard error 0.1, t(1) = 12.71.
    assert line["map_50_half_width_95"] == pytest.approx([1.271] * 3)
    assert line["area_under_curve"] == pytest.approx(0.4)
    assert line["images_to_reach_full"] == pytest.approx(25)
    assert line["annotated_instances"] == 60
    assert line["training_cpu_seconds"] == 3
    assert report["comparisons"] == []


def test_runs_of_different_settings_are_not_compared(tmp_path):
    write_runs(tmp_path, made_run("random", 0, [0.1] * 3), made_run("tsp", 0, [0.2] * 3, profile="q"))
    with pytest.raises(ValueError, match="random-seed0 and tsp-seed0 were made with different settings"):
        write_report(tmp_path)


def test_a_report_with_only_unfinished_lines_has_none(tmp_path):
    write_runs(tmp_path, made_run("random", 0, [0.2]))
    assert write_report(tmp_path)["lines"] == {}


@pytest.mark.parametrize(
    ("images", "heights", "area"),
    [
        pytest.param((10, 20, 30), [0.0, 0.4, 0.4], 0.3, id="even"),
        pytest.param((10, 20, 40), [0.0, 0.4, 0.4], (2 + 8) / 30, id="uneven"),
        pytest.param((10,), [0.3], 0.3, id="one cycle"),
        pytest.param((9, 9), [0.2, 0.4], 0.3, id="nothing left to annotate"),
    ],
)
def test_the_area_under_a_curve_by_hand(images, heights, area):
    assert benchmark_report._areas([made_run("tsp", 0, heights, images)]) == pytest.approx([area])


@pytest.mark.parametrize(
    ("target", "images"),
    [(0.05, 10), (0.1, 10), (0.2, 15), (0.3, 20), (0.35, 25), (0.4, 30), (0.41, None)],
)
def test_the_images_to_reach_a_height_lie_on_the_line_between_cycles(target, images):
    reached = benchmark_report._images_to_reach([10, 20, 30], np.array([0.1, 0.3, 0.4]), target)
    assert reached == (None if images is None else pytest.approx(images))


@pytest.mark.parametrize(("count", "t"), [(1, 0), (2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)])
def test_the_interval_is_students(count, t):
    curve = np.random.default_rng(0).normal(size=(count, 1))
    error = curve.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    assert benchmark_report._half_width(curve) == pytest.approx([t * error], rel=0.003)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        pytest.param([0.0, 0.0, 0.0], 1.0, id="no difference"),
        pytest.param([0.1, 0.11, 0.12], 0.0001, id="far from zero against the spread"),
        # Centred -1, 0, 1: |sum of three draws| >= 1.5 in 8 of 27 cases (sums 2, 3, -2, -3: 3 + 1 + 3 + 1).
        pytest.param([-0.5, 0.5, 1.5], 8 / 27, id="half a spread"),
    ],
)
def test_the_bootstrap_by_hand(differences, p):
    assert benchmark_report._bootstrap_p(np.array(differences)) == pytest.approx(p, abs=0.02 if p == 8 / 27 else 1e-4)


def test_comparisons_are_paired_by_seed_and_corrected_after_holm(monkeypatch):
    p_values = {0.1: 0.01, 0.3: 0.04, 0.2: 0.03}  # by mean difference
    monkeypatch.setattr(benchmark_report, "_bootstrap_p", lambda d: p_values[round(abs(float(d.mean())), 6)])
    lines = {
        "a": [made_run("a", seed, [0.5 + seed / 10] * 3) for seed in (0, 1, 2, 3)],
        "b": [made_run("b", seed, [0.4 + seed / 10] * 3) for seed in (1, 2, 3)],
        "c": [made_run("c", seed, [0.2 + seed / 10] * 3) for seed in (3, 2, 1)][::-1],
        "d": [made_run("d", seed, [0.9] * 3) for seed in (0, 1)],  # two seeds are too few
    }
    found = {(c["one"], c["other"]): c for c in benchmark_report._comparisons(lines)}
    assert {pair: (c["seeds"], pytest.approx(c["difference"])) for pair, c in found.items()} == {
        ("a", "b"): (3, 0.1), ("a", "c"): (3, 0.3), ("b", "c"): (3, 0.2),
    }  # fmt: skip
    # 0.01 x 3, 0.03 x 2, and 0.04 x 1 is not below the one before it.
    assert found["a", "b"]["p_holm"] == pytest.approx(0.03)
    assert found["b", "c"]["p_holm"] == pytest.approx(0.06)
    assert found["a", "c"]["p_holm"] == pytest.approx(0.06)
