"""The benchmark: real tiny runs, interrupted everywhere, side by side."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model.files
import scripts.active_learning
from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, read_coco
from model.strategies.tsp import TSP
from scripts import benchmark
from scripts.active_learning import cycles_done, first_batch, run
from scripts.benchmark_lines import Experiment, parse_line
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


@pytest.mark.parametrize(
    ("line", "looks"),
    [
        pytest.param("random", 0, id="random chooses blindly"),
        pytest.param("random+ssl", 6, id="pseudo labels take a look at every image that is left"),
        pytest.param("tsp", 6, id="scores too"),
        pytest.param("core_set", 9, id="what compares images looks at the annotated ones as well"),
    ],
)
def test_a_cycle_looks_once_at_what_it_chooses_from_and_again_at_what_it_chose(
    tmp_path, sets, monkeypatch, line, looks
):
    seen = []
    look = scripts.active_learning._Cycles._look

    def watched(self, network, image):
        seen.append(image.image_id)
        return look(self, network, image)

    monkeypatch.setattr(scripts.active_learning._Cycles, "_look", watched)
    _, chosen = annotated(carry_out(tmp_path, sets, line))
    pool = [image_id for image_id in seen if image_id in {image.image_id for image in sets.pool.images}]
    assert len(set(pool[:looks])) == looks
    assert pool[looks:] == chosen


def test_a_cycle_of_algorithm_1_annotates_the_lowest_scores_and_labels_the_rest_itself(tmp_path, sets, monkeypatch):
    observed, trained = {}, []
    observe, train = TSP.observe, scripts.active_learning.train

    def watched_observe(self, sight):
        observation = observe(self, sight)
        observed[len(observed)] = observation.score
        return observation

    def watched_train(network, images, config, **options):
        trained.append((sorted(i.image_id for i in images if not i.pseudo), [i.image_id for i in images if i.pseudo]))
        return train(network, images, config, **options)

    monkeypatch.setattr(TSP, "observe", watched_observe)
    monkeypatch.setattr(scripts.active_learning, "train", watched_train)
    state = carry_out(tmp_path, sets, "tsp+ssl@queue_threshold=0")
    first = first_batch(sets.pool, 3, 0)
    unlabelled = [image.image_id for image in sets.pool.images if image.image_id not in first]
    assert len(observed) == len(unlabelled)
    scores = {image_id: observed[n] for n, image_id in enumerate(unlabelled)}
    assert None not in scores.values()
    lowest = sorted(unlabelled, key=scores.get)[:2]
    rest = [image_id for image_id in unlabelled if image_id not in lowest]
    assert trained == [(sorted(first), []), (sorted([*first, *lowest]), rest)]
    queue = state["cycles"][0]["queue"]
    assert queue["chosen"]["mean"] == pytest.approx(sum(scores[i] for i in lowest) / 2)
    assert queue["rest"]["quartiles"][0] == min(scores[i] for i in rest)
    assert queue["rest"]["images"] == 4


def test_a_spread_first_batch_starts_at_random_and_differs_from_a_random_one(tmp_path, sets):
    batches = [annotated(carry_out(tmp_path, sets, "random@first=spread", seed=seed))[0] for seed in (0, 1)]
    for seed, batch in enumerate(batches):
        assert batch[0] == first_batch(sets.pool, 3, seed)[0]
        assert len(set(batch)) == 3
    assert [set(batch) for batch in batches] != [set(first_batch(sets.pool, 3, seed)) for seed in (0, 1)]


def test_only_detections_of_some_confidence_count_in_the_queue(tmp_path, sets):
    every = carry_out(tmp_path, sets, "tsp@queue_threshold=0")["cycles"][0]["queue"]
    none = carry_out(tmp_path, sets, "tsp@queue_threshold=1")["cycles"][0]["queue"]
    assert [part["without_score"] for part in every.values()] == [0, 0]
    assert [part["without_score"] for part in none.values()] == [2, 4]


def test_a_cycle_says_what_its_annotations_cost_and_how_good_the_network_is(tmp_path, sets):
    state = carry_out(tmp_path, sets)
    by_id = {image.image_id: image for image in sets.pool.images}
    known = []
    for cycle in state["cycles"]:
        new = [by_id[image_id] for image_id in cycle["annotated"]]
        known += new
        assert cycle["new_empty_images"] == sum(not len(image.labels) for image in new)
        assert cycle["annotated_instances"] == sum(len(image.labels) for image in known)
        assert sum(cycle["annotated_by_class"].values()) == cycle["annotated_instances"]
        assert cycle["annotated_vertices"] >= 3 * cycle["annotated_instances"]
        assert set(cycle["ap_50_by_class"]) == set(sets.test.class_names)
        assert len(json.dumps(cycle)) < 30_000
    assert sum(map(sum, state["test_instances"].values())) == sum(len(image.labels) for image in sets.test.images)


@pytest.mark.parametrize("line", ["random", "tsp+ssl"])
def test_masks_are_calibrated_on_what_people_annotated_after_the_network_before_had_seen_it(tmp_path, sets, line):
    experiment = replace(EXPERIMENT, training=replace(EXPERIMENT.training, min_steps=60, batch_size=3), cycles=3)
    cycles = carry_out(tmp_path, sets, line, experiment=experiment)["cycles"]
    assert cycles[0]["calibrated_map_50"] is None
    assert all(cycle["calibrated_map_50"] is not None for cycle in cycles[1:])


def test_a_teacher_gets_the_images_without_labels_too(tmp_path, sets, monkeypatch):
    trained, train = [], scripts.active_learning.train

    def watched(network, images, config, **options):
        trained.append([image for image in images if image.pseudo])
        return train(network, images, config, **options)

    monkeypatch.setattr(scripts.active_learning, "train", watched)
    for line in ("tsp+ssl@class_threshold=1", "tsp+ssl@class_threshold=1@ema_decay=0.9"):
        carry_out(tmp_path, sets, line)
    assert [len(pseudo) for pseudo in trained] == [0, 0, 0, 4]
    assert [len(image.labels) for image in trained[-1]] == [0] * 4


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
        pytest.param(
            "tsp+ssl@class_wise_thresholds=true@class_threshold_floor=0@ema_decay=0.9@pseudo_negatives=outside_ignored"
            "@soft_weights=true",
            True,
            id="all options of pseudo labels, after a file",
        ),
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
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert reports == {tmp_path.name: json.loads((tmp_path / "report.json").read_text())}
    report = reports[tmp_path.name]
    assert list(report["lines"]) == ["random", "tsp+ssl"]
    assert report["full_supervision"]["images"] == 9
    here(monkeypatch, "report", "--out", tmp_path)
    assert capsys.readouterr().out.startswith((tmp_path / "report.md").read_text())
    assert "| `tsp+ssl` | 1 |" in (tmp_path / "report.md").read_text()
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


def test_saying_what_is_left_takes_no_run_from_another_process(tmp_path, data, monkeypatch):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "random", "--seeds", "0", *COMMAND]
    (tmp_path / "random-seed0").mkdir()
    (tmp_path / "random-seed0" / "lock").touch()
    taken, flock = [], benchmark.fcntl.flock

    def watched(file, operation):
        taken.append(file.name)
        flock(file, operation)

    monkeypatch.setattr(benchmark.fcntl, "flock", watched)
    here(monkeypatch, *arguments, "--max-minutes", "0")
    assert taken == []


def test_a_run_stops_between_cycles_and_goes_on_as_if_it_had_not(tmp_path, sets, monkeypatch):
    expected = carry_out(tmp_path / "at once", sets, "tsp+ssl")
    name = parse_line("tsp+ssl", 0)
    folder = tmp_path / "stopped" / name.folder
    with monkeypatch.context() as patched:
        # The deadline passes while the first cycle is going on.
        patched.setattr(scripts.active_learning, "time", SimpleNamespace(monotonic=iter([0, 2]).__next__))
        run(name, EXPERIMENT, sets, folder, tmp_path / "stopped" / "shared", deadline=1)
    assert cycles_done(name, EXPERIMENT, sets, folder) == (1, 2)
    assert carry_out(tmp_path / "stopped", sets, "tsp+ssl") == expected


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_the_processes_of_a_benchmark_end_with_it(tmp_path, data, which):
    arguments = ["run", "--data", data, "--out", tmp_path, "--lines", "random,tsp", *COMMAND]
    with command(*arguments, "--jobs", "2", "--min-steps", "5000", stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2):  # both workers have begun
            assert process.stdout.readline().endswith("...\n")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        process.send_signal(which)
        assert process.wait(timeout=30) == 128 + which
        assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_each_rank_of_torchrun_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert benchmark._device(None) == "cuda:3"
    assert benchmark._device("cpu") == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert benchmark._device(None) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark._device(None) == "cpu"


def test_the_papers_profile_is_that_of_the_paper():
    paper = benchmark.EFFORTS["paper"]
    assert (paper.pool, paper.test) == (None, None)
    experiment = paper.experiment
    assert (experiment.profile, experiment.weights, experiment.network["min_size"]) == ("resnet50_fpn", "coco", 512)
    assert (experiment.first_batch, experiment.batch, experiment.cycles) == (500, 500, 6)
    training = experiment.training
    assert (training.epochs, training.schedule, training.learning_rate) == (50, "step", 0.001)
    assert (training.milestones, training.momentum, training.weight_decay, training.beta) == ((45, 49), 0.9, 1e-4, 0.01)
    pseudo = experiment.pseudo
    assert (pseudo.class_threshold, pseudo.box_threshold, pseudo.mask_threshold) == (0.9, 0.9, 0.8)
