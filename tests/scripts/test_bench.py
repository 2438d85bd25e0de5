"""The speed ratios: each benchmark runs, says what it measured, and compares like with like."""

import asyncio
import json
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from model.train import train
from scripts import (
    bench,
    bench_ingest,
    bench_look,
    bench_plan,
    bench_publish,
    bench_ssl,
    bench_start,
    bench_web,
    bench_workers,
)
from scripts.label_studio_server import free_port
from scripts.make_phantoms import CLASS_NAMES
from tests.model.examples import rectangle, target, tiny_network
from tests.postgres import postgres

__all__ = ["postgres"]

PROFILE = "efficientnet_lite0_fpn"


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_the_last_line_is_what_was_measured(name, monkeypatch, capsys):
    arguments = ["--profile", PROFILE, "--size", "64", "--detections", "20", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", name, *arguments])
    bench.main()
    words, line = capsys.readouterr().out.splitlines()
    measured = json.loads(line)
    setting = {"name": name, "profile": PROFILE, "size": 64, "detections": 20, "rounds": 1, "threads": 1}
    assert {key: measured[key] for key in setting} == setting
    assert set(measured) == {*setting, "ours", "theirs", "ratio", "machine"}
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"])
    assert words.startswith(bench.BENCHMARKS[name][0])
    monkeypatch.setattr(sys, "argv", ["bench", name, *arguments, "--json"])
    bench.main()
    assert set(json.loads(capsys.readouterr().out)) == set(measured)


def test_torchvisions_network_has_our_weights_but_for_the_iou_branches():
    ours = tiny_network(num_classes=len(CLASS_NAMES) + 1)
    theirs = bench.torchvision_network(ours)
    shared = {id(parameter) for parameter in theirs.parameters()}
    left_out = {name for name, parameter in ours.named_parameters() if id(parameter) not in shared}
    assert left_out
    assert all(name.startswith(("roi_heads.box_iou_branch", "roi_heads.mask_iou_branch")) for name in left_out)
    assert len(shared) + len(left_out) == len(list(ours.parameters()))


def test_torchvisions_network_trains_on_the_same_batch():
    theirs = bench.torchvision_network(tiny_network(num_classes=len(CLASS_NAMES) + 1).train()).train()
    losses = theirs([torch.rand(3, 64, 64)], [target((1, rectangle(10, 12, 40, 44)))])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def run(monkeypatch, capsys, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--json"])
    bench.main()
    return json.loads(capsys.readouterr().out)


def test_a_result_is_kept_with_the_machine_that_it_is_of(monkeypatch, capsys, tmp_path):
    arguments = ("branches", "--profile", PROFILE, "--size", "64", "--rounds", "1", "--out", str(tmp_path / "new"))
    measured = run(monkeypatch, capsys, *arguments)
    assert json.loads((tmp_path / "new" / "branches.json").read_text()) == measured
    assert measured["machine"]["cpus"] >= 1
    assert len(measured["machine"]["load_average_before"]) == 3


def test_the_web_process_is_started_and_asked(monkeypatch, capsys):
    monkeypatch.setattr(bench_start, "_THEIRS", ("-c", f"import numpy; {bench_start._MAIN}"))  # torch takes long
    measured = run(monkeypatch, capsys, "start", "--profile", PROFILE, "--rounds", "1")
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"], abs=0.01)
    assert measured["slowest"] >= measured["ours"]
    assert all(memory > 10 for memory in measured["memory_mb"])
    assert all(measured[name] > 0 for name in ("first_setup", "first_webhook", "first_predict", "second_predict"))


def test_the_figures_of_faster_coco_eval_are_ours(monkeypatch, capsys):
    measured = run(monkeypatch, capsys, "evaluate", "--images", "40", "--rounds", "1")
    assert measured["difference"] < 1e-12
    assert 0.2 < measured["map_50_95"] < measured["map_50"] < 1
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"], abs=0.05)
    assert 0 < measured["share"] < 1


@pytest.mark.parametrize("line", ["tsp+ssl@pseudo_every_steps=1", "learning_loss+ssl@ema_decay=0.9"])
def test_a_training_with_pseudo_labels_is_measured_next_to_one_without(line, monkeypatch, capsys):
    trained = []

    def watched(network, images, training, **options):
        trained.append((network.config.learning_loss, sum(image.pseudo for image in images), training.beta))
        return train(network, images, training, **options)

    monkeypatch.setattr(bench_ssl, "train", watched)
    monkeypatch.setattr(bench_ssl, "TURNS", 1)
    arguments = ("ssl-training", "--profile", PROFILE, "--size", "64", "--rounds", "1", "--line", line)
    measured = run(monkeypatch, capsys, *arguments)
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"])
    assert (measured["line"], measured["pseudo_every_steps"]) == (line, 1 if "every" in line else 8)
    assert measured["steps"] >= measured["pseudo_every_steps"]
    watches = line.startswith("learning_loss")
    assert sorted(trained) == [(watches, 0, 0.01)] * 2 + [(watches, bench_ssl.IMAGES, 0.01)] * 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tsp", "--line: expected one with pseudo labels, such as tsp\\+ssl, got 'tsp'"),
        ("nonsense", "--line: expected random, .* got 'nonsense'"),
    ],
)
def test_a_line_whose_pseudo_labels_cost_nothing_is_refused(line, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "ssl-training", "--line", line])
    with pytest.raises(SystemExit, match=f"^ssl-training: {said}"):
        bench.main()


@pytest.mark.label_studio
def test_publishing_is_measured_next_to_the_import_alone(label_studio):
    measured = bench_publish.publish(Namespace(tasks=12, regions=2, rounds=10, label_studio=[]), label_studio)
    assert len(measured["rounds"]) == bench_publish.MOST_ROUNDS
    assert all(one["theirs"]["requests"] == 1 for one in measured["rounds"])
    assert measured["ratio"] > 0
    assert measured["label_studio_peak_memory_mb"] > 100


@pytest.mark.label_studio
def test_reading_annotations_again_is_measured_next_to_reading_all(label_studio):
    measured = bench_ingest.ingest(Namespace(tasks=20, regions=1), label_studio)
    assert (measured["edited"], measured["deleted"]) == (1, 1)
    assert measured["ratio"] > 0
    sent = {name: measured[name]["megabytes"] for name in ("first", "unchanged", "changed", "everything")}
    assert 0 <= sent["unchanged"] < sent["changed"] < sent["everything"] <= sent["first"]


@pytest.mark.label_studio
def test_a_look_lists_nothing_again(label_studio):
    measured = bench_look.look(Namespace(tasks=30, regions=1), label_studio)
    assert measured["annotated_meanwhile"] == 10
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"], abs=1e-3)
    first, unchanged, changed = (measured[name]["megabytes"] for name in ("first", "unchanged", "changed"))
    assert unchanged < changed < first


def test_workers_on_one_pool_need_a_postgresql(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "score-workers"])
    with pytest.raises(SystemExit, match="score-workers: --database-url: expected the address of an empty PostgreSQL"):
        bench.main()


def test_a_pool_smaller_than_a_batch_is_refused_by_plan(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_plan", "--sizes", "1000,499"])
    with pytest.raises(SystemExit):
        bench_plan.main()
    assert "--sizes: expected pools of at least a batch, 500 tasks, got 499" in capsys.readouterr().err


@pytest.mark.label_studio
def test_one_worker_and_two_score_the_same_pool(label_studio, postgres):
    options = Namespace(database_url=postgres.new_database(), profile=PROFILE, size=64, rounds=1)
    measured = bench_workers.score_workers(options, server=label_studio, images=12, most=2)
    assert {workers: len(seconds) for workers, seconds in measured["seconds"].items()} == {"1": 1, "2": 1}
    assert measured["ratios"] == {"1": 1.0, "2": measured["ratio"]}
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"], abs=1e-2)


@pytest.mark.label_studio
@pytest.mark.parametrize("name", bench.SOAKS)
def test_the_web_process_answers_while_a_cycle_trains(name, label_studio):
    measured = bench_web.soak(name, bench_web.Load(requests=30, rate=20), server=label_studio)
    assert measured["lost"] == measured["refused"] == 0
    assert 0 < measured["p50_ms"] <= measured["p99_ms"] <= measured["max_ms"]
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"], abs=1e-3)
    assert measured["ours"] == pytest.approx(measured["p99_ms"] / 1000, abs=1e-3)


def test_a_request_that_nobody_answers_is_counted_as_refused():
    answers = asyncio.run(bench_web._ask_at_their_times(free_port(), [("GET", "/health", b"")] * 3, 100.0))
    assert [status for status, _ in answers] == [0, 0, 0]
    assert bench_web._measured(answers, waits_seconds=1.0)["refused"] == 3
