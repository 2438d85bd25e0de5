"""The comparison of a look at a pool with torchvision's loop: both see every image, and memory is told of two pools."""

import json
from argparse import Namespace

import pytest

from model.bfloat16 import has_bfloat16
from scripts import bench_pool


def test_a_pool_is_measured_from_files_to_lines(monkeypatch):
    monkeypatch.setattr(bench_pool, "IMAGE_PX", 96)
    monkeypatch.setattr(bench_pool, "MIN_SIZE", 96)
    monkeypatch.setattr(bench_pool, "PHOTO_HW", (384, 512))
    monkeypatch.setattr(bench_pool, "PHOTO_MIN_SIZE", 48)
    monkeypatch.setattr(bench_pool, "PHOTOS", 3)
    monkeypatch.setattr(bench_pool, "peak_memory_mb", lambda count: count)  # its own test is below
    measured = bench_pool.score_pool(Namespace(threads=1, rounds=1))
    precisions = {"float32", "bfloat16"} if has_bfloat16() else {"float32"}
    assert set(measured["ways"]) == {"theirs", *precisions}
    assert measured["ways"]["theirs"]["times_as_fast"] == 1
    assert measured["ratio"] == pytest.approx(measured["ours"] / measured["theirs"], abs=0.01)
    assert set(measured["stages"]) == precisions
    for shares in measured["stages"].values():
        assert sum(shares.values()) == pytest.approx(1, abs=0.02)
    photos = measured["photos"]
    assert (photos["image_hw"], photos["input_hw"], photos["images"]) == ([384, 512], [48, 64], 3)
    assert set(photos["cpu_seconds_of_one"]) == {"look", "network", "read", "read_whole"}
    assert all(seconds > 0 for seconds in photos["cpu_seconds_of_one"].values())
    assert photos["wall_ratio"] > 0
    assert 0 < photos["read_share"] < 1
    assert json.loads(json.dumps(measured)) == measured


def test_the_peak_memory_is_that_of_a_process_that_saw_the_whole_pool(monkeypatch):
    assert 100 < bench_pool.peak_memory_mb(1) < 5000
