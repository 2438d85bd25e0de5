"""The speed ratios: each benchmark runs, says what it measured, and compares like with like."""

import asyncio
import json
import os
import sys
from argparse import Namespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from ml_backend.pool import append_line, feature_of, read_scores
from ml_backend.pseudo_labels import seen_image
from model.network import MaskRCNNWithScores
from model.train import train
from scripts import (
    bench,
    bench_ingest,
    bench_label_studio,
    bench_look,
    bench_network,
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


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("train-step", {}),
        ("branches", {"detections": 20}),
        ("ssl-step", {"annotated": 2, "pseudo_labelled": 1, "as_many_images": ANY}),
    ],
)
def test_the_last_line_is_what_was_measured(name, others, monkeypatch, capsys):
    arguments = ["--profile", PROFILE, "--size", "64", "--detections", "20", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", name, *arguments])
    bench.main()
    words, line = capsys.readouterr().out.splitlines()
    measured = json.loads(line)
    setting = {"name": name, "profile": PROFILE, "size": 64, "rounds": 1, "threads": 1, **others}
    assert {key: measured[key] for key in setting} == setting
    assert set(measured) == {*setting, "ours", "theirs", "ratio", "machine"}
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"])
    assert words.startswith(bench.BENCHMARKS[name][0])
    monkeypatch.setattr(sys, "argv", ["bench", name, *arguments, "--json"])
    bench.main()
    assert set(json.loads(capsys.readouterr().out)) == set(measured)


def test_branches_that_lack_detections_to_work_for_are_not_measured(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"branches: expected 3000 detections, got \d+: lower --detections"):
        run(monkeypatch, capsys, "branches", "--profile", PROFILE, "--size", "64", "--detections", "3000")


def test_without_branches_only_the_proposals_of_each_image_are_pooled():
    pooled = []

    class Pool(torch.nn.Module):
        def forward(self, features, boxes, image_sizes):
            pooled.append(len(boxes[0]))
            return torch.zeros(len(boxes[0]), 1)

    rpn = torch.nn.Identity()
    pool = bench_network._ForProposalsOnly(Pool(), rpn)
    for proposals, final in ((8, 3), (7, None), (6, 2)):  # the second image was given up after its proposals
        rpn(torch.zeros(1))
        pool({}, [torch.zeros(proposals, 4)], [(64, 64)])
        if final is not None:
            assert len(pool({}, [torch.zeros(final, 4)], [(64, 64)])) == final
    assert pooled == [8, 7, 6]


def test_a_step_with_pseudo_labels_has_the_losses_of_both(monkeypatch):
    batches = []
    monkeypatch.setattr(bench_network, "_step", lambda network, images, targets: batches.append((network, targets)))
    bench_network.ssl_step(Namespace(profile=PROFILE, size=64, rounds=1, threads=1))
    ours = [targets for network, targets in batches if isinstance(network, MaskRCNNWithScores)]
    theirs = [targets for network, targets in batches if not isinstance(network, MaskRCNNWithScores)]
    assert [[target["pseudo"] for target in targets] for targets in ours] == [[False, False, True]] * 4
    assert [len(targets) for targets in theirs] == [2, 2, 3, 3]
    network, targets = next(one for one in batches if isinstance(one[0], MaskRCNNWithScores))
    losses = network([torch.rand(3, 64, 64)] * 3, targets)
    assert {"loss_mask", "semi_loss_mask", "semi_loss_classifier"} <= set(losses)


def test_torchvisions_network_has_our_weights_but_for_the_iou_branches():
    ours = tiny_network(num_classes=len(CLASS_NAMES) + 1)
    theirs = bench_network.torchvision_network(ours)
    shared = {id(parameter) for parameter in theirs.parameters()}
    left_out = {name for name, parameter in ours.named_parameters() if id(parameter) not in shared}
    assert left_out
    assert all(name.startswith(("roi_heads.box_iou_branch", "roi_heads.mask_iou_branch")) for name in left_out)
    assert len(shared) + len(left_out) == len(list(ours.parameters()))


def test_torchvisions_network_trains_on_the_same_batch():
    theirs = bench_network.torchvision_network(tiny_network(num_classes=len(CLASS_NAMES) + 1).train()).train()
    losses = theirs([torch.rand(3, 64, 64)], [target((1, rectangle(10, 12, 40, 44)))])
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def run(monkeypatch, capsys, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--json"])
    bench.main()
    return json.loads(capsys.readouterr().out)


def test_a_result_is_kept_with_the_machine_that_it_is_of(monkeypatch, capsys, tmp_path):
    arguments = ("branches", "--profile", PROFILE, "--size", "64", "--rounds", "1")
    arguments += ("--detections", "20", "--out", str(tmp_path / "new"))
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
    by_cpu = (measured, measured["as_it_comes"])
    for one in (*by_cpu, *(side["wall"] for side in by_cpu)):
        assert one["ratio"] == pytest.approx(one["ours"] / one["theirs"], abs=0.1)
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
    for one in (side for both in measured["rounds"] for side in both.values()):
        assert 100 < one["label_studio_memory_before_mb"] <= one["label_studio_peak_memory_mb"]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_the_peak_of_memory_is_that_of_the_work_and_not_of_what_came_before():
    process = os.getpid()
    large = bytearray(300_000_000)
    large[::4096] = bytes(len(large[::4096]))
    before = bench_label_studio.peak_memory_mb(process)
    del large
    bench_label_studio.reset_peak_memory(process)
    assert bench_label_studio.peak_memory_mb(process) < before - 200


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--sizes", "1000,499"], "--sizes: expected at least 625 tasks, of which 500 can be chosen, got 499"),
        (["plan", "--strategies", "tsp,best"], "--strategies: expected random, "),
        (["health", "--requests", "1"], "--requests: health asks two things in turn, expected at least 2, got 1"),
        (["webhook", "--rate", "0"], "--rate: expected a number above 0, got '0'"),
        (["webhook", "--rate", "nan"], "--rate: expected a number above 0, got 'nan'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
    assert said in capsys.readouterr().err


def test_choosing_is_measured_by_both_commands(monkeypatch, capsys):
    options = ["--sizes", "700", "--strategies", "tsp", "--json"]
    measured = run(monkeypatch, capsys, "plan", *options)
    monkeypatch.setattr(sys, "argv", ["bench_plan", *options])
    bench_plan.main()
    assert set(json.loads(capsys.readouterr().out)) == set(measured)
    (cost,) = measured["costs"]["tsp"]
    assert cost["tasks"] == 700
    assert cost["line_bytes"] > 12_000


def test_a_pool_to_choose_from_has_lines_like_the_workers(tmp_path):
    bench_plan._write_scores(tmp_path / "scores", 60, features=True)
    lines = list(read_scores(tmp_path / "scores"))
    assert [line["task"] for line in lines] == list(range(60))
    assert {len(feature_of(line["feature"])) for line in lines} == {bench_plan.FEATURES}
    assert all(len(line["result"]) == bench_plan.POLYGONS for line in lines)
    seen = seen_image(lines[0], CLASS_NAMES, only_masks=False)
    assert (len(seen.rles), sum(rle is not None for rle in seen.rles)) == (30, 5)
    with (tmp_path / "again").open("w") as again:
        for line in lines:
            append_line(again, line)
    assert (tmp_path / "again").read_text() == (tmp_path / "scores").read_text()


@pytest.mark.label_studio
def test_one_worker_and_two_score_the_same_pool(label_studio, postgres):
    options = Namespace(database_url=postgres.new_database(), profile=PROFILE, size=64, rounds=1)
    measured = bench_workers.score_workers(options, server=label_studio, images=12, chunk=4, most=2)
    rows = ("1 without chunks", "1", "2")
    assert {row: len(seconds) for row, seconds in measured["seconds"].items()} == dict.fromkeys(rows, 1)
    assert measured["ratios"] == {"1 without chunks": ANY, "1": 1.0, "2": measured["ratio"]}
    assert measured["ratio_without_chunks"] == pytest.approx(
        measured["ours"] / measured["seconds"]["1 without chunks"][0], abs=1e-2
    )
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


def test_a_request_that_is_never_answered_is_given_up(monkeypatch):
    monkeypatch.setattr(bench_web, "_LONGEST_SECONDS", 0.2)

    async def silent(reader, writer) -> None:
        try:
            await reader.read()
        finally:
            writer.close()

    async def asked() -> int:
        server = await asyncio.start_server(silent, bench_web.HOST, 0)
        async with server:
            return await bench_web._status(server.sockets[0].getsockname()[1], ("GET", "/health", b""))

    assert asyncio.run(asked()) == 0
