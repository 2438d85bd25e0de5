"""The plan for a large installation: the page says what the command says, and the sums are right."""

import json
import sys
from pathlib import Path

import pytest

from scripts.scale import BENCH, Installation, Measured, demands, main, table

PAGE = BENCH.parent / "scale.md"


def test_the_page_has_the_table_that_the_command_prints():
    printed = table(Installation(), Measured.read(Installation().pool))
    assert f"<!-- table -->\n{printed}<!-- /table -->" in PAGE.read_text()


def test_a_small_installation_by_hand():
    # 4 people, 8 hours, 80 s: 1440 images a day, 14.4 cycles of 100; after 10 days 85,600 of 100,000 are left.
    there = Installation(
        images=100_000, annotators=4, projects=2, seconds=80.0, hours=8.0, batch=100, days=10
    )  # fmt: skip
    assert (there.annotated_a_day, there.cycles_a_day, there.pool) == (1440, 14.4, 42_800)
    costs = Measured(
        look_small=0.5, look_resnet50=2.0, publish=0.01, publish_wall=0.05, choose=0.001, webhook=0.25
    )  # fmt: skip
    by_name = {name.split(",")[0]: (amount, busy) for name, amount, _, busy in demands(there, costs)}
    looks = 14.4 * 42_800
    assert by_name["publishing"] == pytest.approx((looks, looks * 0.01 / 86_400))
    assert by_name["webhooks"] == pytest.approx((1440, 1440 * 0.25 / 86_400))
    assert "| a pool's predictions, until they are published | 36 min |" in table(there, costs)  # 2140 s
    # 7200 annotated images of a project, 50 times, 2 a step.
    assert by_name["training"][0] == pytest.approx(50 * 7200 / 2 * 14.4)


def test_a_cost_that_was_not_measured_is_not_invented(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"score-pool\.json"):
        Measured.read(1000, tmp_path)


@pytest.mark.parametrize(("pool", "name"), [(20_000, "publish.json"), (149_600, "100000-tasks/publish.json")])
def test_publishing_costs_what_was_measured_with_a_pool_of_about_that_size(pool, name):
    result = json.loads((BENCH / name).read_text())
    costs, ours = Measured.read(pool), [one["ours"] for one in result["rounds"]]
    low, high = (f(one["label_studio_cpu_seconds"] for one in ours) / result["tasks"] for f in (min, max))
    assert low <= costs.publish <= high < costs.publish_wall


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "1000000"], "--images: expected more than the 2520000 of 30 --days of work, got 1000000"),
        (["--annotators", "-3"], "--annotators: expected a whole number of at least 1, got '-3'"),
        (["--seconds", "0"], "--seconds: expected a number above 0, got '0'"),
    ],
)
def test_an_installation_that_cannot_be_is_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err
