"""The plan for a large installation: the page says what the command says, and the sums are right."""

from pathlib import Path

import pytest

from scripts.scale import BENCH, Installation, Measured, demands, table

PAGE = BENCH.parent / "scale.md"


def test_the_page_has_the_table_that_the_command_prints():
    assert f"<!-- table -->\n{table(Installation(), Measured.read())}<!-- /table -->" in PAGE.read_text()


def test_a_small_installation_by_hand():
    # 4 people, 8 hours, 80 s: 1440 images a day, 14.4 cycles of 100; after 10 days 85,600 of 100,000 are left.
    there = Installation(
        images=100_000, annotators=4, projects=2, seconds=80.0, hours=8.0, batch=100, days=10
    )  # fmt: skip
    assert (there.annotated_a_day, there.cycles_a_day, there.pool) == (1440, 14.4, 42_800)
    costs = Measured(look_small=0.5, look_resnet50=2.0, publish=0.01, choose=0.001, webhook=0.25)
    by_name = {name.split(",")[0]: (amount, busy) for name, amount, _, busy in demands(there, costs)}
    looks = 14.4 * 42_800
    assert by_name["publishing"] == pytest.approx((looks, looks * 0.01 / 86_400))
    assert by_name["webhooks"] == pytest.approx((1440, 1440 * 0.25 / 86_400))
    # 7200 annotated images of a project, 50 times, 2 a step.
    assert by_name["training"][0] == pytest.approx(50 * 7200 / 2 * 14.4)


def test_a_cost_that_was_not_measured_is_not_invented(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"score-workers\.json"):
        Measured.read(tmp_path)
