"""Rankings of the same detections, on runs whose networks were kept."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from model.comparison import Compared
from scripts import compare_rankings
from scripts.active_learning import run
from scripts.benchmark_lines import parse_line
from scripts.benchmark_sets import read_data
from scripts.compare_rankings import RANKINGS, rankings_of
from scripts.kept_network import load_kept
from tests.scripts.examples import EXPERIMENT


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Two seeds whose networks are kept."""
    out = tmp_path_factory.mktemp("runs")
    sets = read_data(data, pool_size=None, test_size=None)
    names = [parse_line("full", seed) for seed in (0, 1)]
    for name in names:
        run(name, EXPERIMENT, sets, out / name.folder, out / "shared", keep_network=True)
    return [out / name.folder for name in names]


def test_the_rankings_of_the_benchmark_are_measured_alike(data, runs):
    for folder in runs:
        found = rankings_of(load_kept(folder, data))
        [cycle] = json.loads((folder / "run.json").read_text())["cycles"]
        assert found["c"] == {"map_50": cycle["map_50"], "map_50_95": cycle["map_50_95"]}
        assert found["c m"] == {"map_50": cycle["rescored_map_50"], "map_50_95": cycle["rescored_map_50_95"]}


def test_the_table_has_the_means_over_seeds_and_what_is_gained_over_c(tmp_path, data, runs, monkeypatch, capsys):
    out = tmp_path / "new" / "rankings.json"
    arguments = ["compare_rankings", "--data", data, "--runs", *runs, "--out", out]
    monkeypatch.setattr(sys, "argv", [str(part) for part in arguments])
    compare_rankings.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| ranked by | mAP@0.5 | gain | mAP@[.5:.95] | gain |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in RANKINGS]
    kept = json.loads(out.read_text())
    assert list(kept) == ["full-seed0", "full-seed1"]
    means = {name: np.mean([kept[folder.name][name]["map_50"] for folder in runs]) for name in RANKINGS}
    cells = dict(zip(RANKINGS, (row.strip("| ").split(" | ") for row in rows), strict=True))
    assert {name: row[1] for name, row in cells.items()} == {name: f"{mean:.3f}" for name, mean in means.items()}
    gain = 100 * (means["c x true mask IoU"] - means["c"])
    assert cells["c x true mask IoU"][2].startswith(f"{gain:+.1f} ± ")


def test_a_ranking_is_the_product_that_its_name_says():
    pair = Compared(
        image=0,
        label=1,
        instances=2,
        class_scores=np.array([0.9, 0.5]),
        box_scores=np.array([0.25, 1.0]),
        mask_scores=np.array([0.64, 0.81]),
        box_ious=np.array([[0.2, 0.5], [0.4, 0.0]]),  # the second detection is on no instance
        mask_ious=np.array([[0.1, 0.7], [0.2, 0.0]]),
    )
    expected = {
        "c": [0.9, 0.5],
        "c m": [0.576, 0.405],
        "c sqrt(m)": [0.72, 0.45],
        "c m^2": [0.36864, 0.32805],
        "c b": [0.225, 0.5],
        "c sqrt(b m)": [0.36, 0.45],
        "c b m": [0.144, 0.405],
        "c m, m right on objects": [0.63, 0.405],
        "c x true mask IoU": [0.63, 0.1],
    }
    assert {name: ranking(pair) for name, ranking in RANKINGS.items()} == {
        name: pytest.approx(scores) for name, scores in expected.items()
    }


def test_without_ground_truth_a_true_iou_is_zero():
    alone = Compared(
        image=0, label=1, instances=0, class_scores=np.array([0.9]), box_scores=np.ones(1), mask_scores=np.ones(1),
        box_ious=np.zeros((1, 0)), mask_ious=np.zeros((1, 0)),
    )  # fmt: skip
    assert RANKINGS["c x true mask IoU"](alone).tolist() == [0.0]
    assert RANKINGS["c m, m right on objects"](alone).tolist() == [0.9]


def refused(monkeypatch, data, *runs):
    """What the command says instead of comparing."""
    monkeypatch.setattr(sys, "argv", ["compare_rankings", "--data", str(data), "--runs", *map(str, runs)])
    with pytest.raises(SystemExit) as stopped:
        compare_rankings.main()
    return str(stopped.value)


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, data, runs, monkeypatch, capsys):
    monkeypatch.setattr(compare_rankings, "load_kept", None)
    arguments = ["compare_rankings", "--data", str(data), "--runs", str(runs[0]), "--out"]
    monkeypatch.setattr(sys, "argv", [*arguments, "a.csv"])
    with pytest.raises(SystemExit):
        compare_rankings.main()
    assert "--out: expected a file whose name ends in .json, got 'a.csv'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "file" / "a.json")])
    with pytest.raises(SystemExit, match=r"Nothing is compared: .*File exists"):
        compare_rankings.main()


def test_the_same_seed_twice_is_refused(tmp_path, data, runs, monkeypatch):
    shutil.copytree(runs[0], tmp_path / "again")
    for second in (runs[0], tmp_path / "again"):
        said = refused(monkeypatch, data, runs[0], second)
        assert said == (
            f"Nothing is compared: --runs: expected each seed once, got {runs[0].name}, {second.name}: leave one out"
        )


@pytest.mark.parametrize(
    ("line", "experiment", "what"),
    [("random", EXPERIMENT, "line"), ("full", replace(EXPERIMENT, batch=4), "settings")],
)
def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, data, runs, monkeypatch, line, experiment, what):
    name = parse_line(line, 1)
    sets = read_data(data, pool_size=None, test_size=None)
    run(name, experiment, sets, tmp_path / name.folder, tmp_path / "shared", keep_network=True)
    said = refused(monkeypatch, data, runs[0], tmp_path / name.folder)
    assert said.endswith(f"expected one line at several seeds, got runs of different {what}")


def test_a_folder_that_is_no_run_is_refused_before_anything_is_measured(tmp_path, data, runs, monkeypatch):
    monkeypatch.setattr(compare_rankings, "rankings_of", None)
    said = refused(monkeypatch, data, runs[0], tmp_path)
    assert said == (
        f"Nothing is compared: {tmp_path}: expected the folder of a run of the benchmark, there is no run.json in it"
    )
