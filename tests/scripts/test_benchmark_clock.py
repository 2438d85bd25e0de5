"""The seconds of a training: all its steps count once, however often it was interrupted."""

import pytest

from model.train import Progress
from scripts.benchmark_clock import Stopwatch, timed


def step(watch, number, *, of=10):
    watch.on_step(Progress(step=number, steps=of, loss=0.0, losses={}))


def test_time_goes_on_after_an_interruption_and_lost_steps_count_like_the_others(tmp_path, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr("scripts.benchmark_clock.time.perf_counter", lambda: clock["now"])
    monkeypatch.setattr("scripts.benchmark_clock.time.process_time", lambda: clock["now"] / 2)
    watch = Stopwatch(tmp_path / "watch.json", 4)
    assert watch.seconds() is None
    for number in range(1, 7):  # killed after the sixth step, with a checkpoint of the fourth
        clock["now"] += 1
        step(watch, number)
    clock["now"] += 100
    watch = Stopwatch(tmp_path / "watch.json", 4)
    for number in range(5, 11):
        clock["now"] += 1
        step(watch, number)
    assert watch.seconds() == {"wall": 10.0, "cpu": 5.0}
    # Nothing was left to train: the time is still known.
    assert Stopwatch(tmp_path / "watch.json", 4).seconds() == {"wall": 10.0, "cpu": 5.0}

    late = Stopwatch(tmp_path / "late.json", 4)  # the first eight steps were never noted
    for number in (9, 10):
        clock["now"] += 3
        step(late, number)
    assert late.seconds()["wall"] == pytest.approx(30)


def test_a_part_of_a_cycle_is_timed_by_its_name():
    seconds = {}
    with timed(seconds, "scoring"):
        sum(range(100_000))
    assert set(seconds) == {"scoring"}
    assert seconds["scoring"]["wall"] > 0
    assert seconds["scoring"]["cpu"] > 0
