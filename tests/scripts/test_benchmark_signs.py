"""What a long run says of itself while it goes on."""

from scripts.benchmark_signs import SignsOfLife


def test_a_line_comes_now_and_then_and_says_how_far_a_stage_is(monkeypatch, capsys):
    clock = {"now": 100.0}
    monkeypatch.setattr("scripts.benchmark_signs.time.monotonic", lambda: clock["now"])
    signs = SignsOfLife("tsp-seed0", every_seconds=30)
    signs.begin("cycle 2 of 5")
    for step in range(1, 10):
        clock["now"] += 10
        signs.give("training, step", step, 9)
    clock["now"] += 10
    signs.give("choosing what comes next, image", 7)
    clock["now"] += 20
    signs.give("choosing what comes next, image", 8)
    assert capsys.readouterr().err.splitlines() == [
        "tsp-seed0, cycle 2 of 5: training, step 3 of 9",
        "tsp-seed0, cycle 2 of 5: training, step 6 of 9",
        "tsp-seed0, cycle 2 of 5: training, step 9 of 9",
        "tsp-seed0, cycle 2 of 5: choosing what comes next, image 8",
    ]


def test_a_cycle_that_is_over_soon_says_nothing_on_its_way(monkeypatch, capsys):
    clock = {"now": 100.0}
    monkeypatch.setattr("scripts.benchmark_signs.time.monotonic", lambda: clock["now"])
    signs = SignsOfLife("tsp-seed0", every_seconds=30)
    for number in range(1, 6):
        signs.begin(f"cycle {number} of 5")
        clock["now"] += 29
        signs.give("measuring, image", 1, 1)
    assert capsys.readouterr().err == ""
