"""The files of the benchmark's report, and the runs that it reads."""

import json

import pytest
from matplotlib import pyplot as plt

from scripts import benchmark_runs
from scripts.benchmark_plots import _figure_2, _figure_reliability
from scripts.benchmark_report import make_report, write_report, write_reports
from scripts.benchmark_text import markdown
from tests.scripts.made_runs import made_run, write_runs


def test_the_report_is_written_beside_the_runs_with_all_its_figures(tmp_path, capsys):
    lines = ("random", "tsp", "random+ssl", "tsp+ssl", "tsp+ssl@beta=0.05", "tsp@first=spread")
    runs = [made_run(line, seed, [0.1, 0.2 + seed / 50, 0.3], precision=0.9) for line in lines for seed in (0, 1)]
    write_runs(tmp_path, *runs, made_run("full", 0, [0.4], images=[100]), made_run("hybrid", 0, [0.1]))
    report = write_report(tmp_path)
    assert report == json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    pictures = {"figure2.png", "figure4.png", "options.png", "cost.png", "pseudo.png", "reliability.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    for picture in pictures:
        assert f"]({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / picture).stat().st_size < 200_000
    output = capsys.readouterr()
    assert output.out == ""
    assert all(name in output.err for name in {"report.md", "report.json", *pictures})
    assert "- `hybrid-seed0`: 1 of 3 cycles" in text
    for line in lines:
        assert f"| `{line}` |" in text


@pytest.mark.parametrize(
    ("lines", "drawn"),
    [
        pytest.param(["random", "tsp", "tsp+ssl", "tsp_expected"], False, id="only what Figure 2 shows"),
        pytest.param(["tsp", "tsp_without_box"], True, id="without a score"),
        pytest.param(["tsp", "random+ssl"], True, id="pseudo labels with another strategy"),
        pytest.param(["tsp", "tsp+ssl@beta=0.05"], True, id="another beta"),
    ],
)
def test_the_figure_of_ablations_is_drawn_only_if_there_are_any(tmp_path, lines, drawn):
    write_runs(tmp_path, *(made_run(line, 0, [0.1, 0.2, 0.3]) for line in lines))
    write_report(tmp_path)
    assert (tmp_path / "figure4.png").exists() == drawn


@pytest.mark.parametrize("twins_line", ["tsp+ssl", "tsp+ssl_by_precision"])
def test_a_line_can_be_told_from_its_twin_with_pseudo_labels_and_no_interval_is_cut(twins_line):
    heights = {0: [0.1, 0.1, 0.1], 1: [0.1, 0.2, 0.4]}  # 0.25 +- 1.9 at the end
    report = make_report([made_run(line, seed, heights[seed]) for line in ("tsp", twins_line) for seed in heights])
    figure = _figure_2(report)
    [axes] = figure.axes
    one, twin = (container.lines[0] for container in axes.containers)
    assert one.get_markerfacecolor() != twin.get_markerfacecolor() == one.get_color() == twin.get_color()
    below, above = axes.get_ylim()
    for line in report["lines"].values():
        for height, width in zip(line["map_50"], line["map_50_half_width_95"], strict=True):
            assert below < height - width <= height + width < above
    plt.close(figure)


def test_the_figure_of_reliability_says_whose_it_is():
    for lines, said in (
        (["tsp"], "Last cycle of tsp, 1 seed"),
        (["tsp", "random"], "Last cycle of 2 lines together, 1 seed"),
    ):
        figure = _figure_reliability(make_report([made_run(line, 0, [0.1, 0.2, 0.3]) for line in lines]))
        assert figure.get_suptitle() == said
        plt.close(figure)


def test_a_report_of_unfinished_runs_says_so(tmp_path):
    write_runs(tmp_path, made_run("random", 0, [0.2]))
    report = write_report(tmp_path)
    assert report["lines"] == {}
    assert "No line is finished." in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_every_table_of_a_single_finished_run_can_be_written():
    text = markdown(make_report([made_run("tsp", 0, [0.1, 0.2, 0.3])]), {})
    assert "| `tsp` | 1 |" in text
    assert "Anchor sizes and the number of detections come from the labels of the whole pool" in text


@pytest.mark.parametrize("lines", [["random"], ["random", "tsp", "full"]])
def test_runs_of_a_single_cycle_have_a_report(tmp_path, lines):
    write_runs(tmp_path, *(made_run(line, 0, [0.2], cycles=1) for line in lines))
    report = write_report(tmp_path)
    assert set(report["lines"]) == {*lines} - {"full"}
    for line in report["lines"]:
        assert report["lines"][line]["second_cycle_over_random"] is None
        assert f"| `{line}` | 1 |" in (tmp_path / "report.md").read_text()


def test_runs_of_different_settings_are_not_compared(tmp_path):
    write_runs(tmp_path, made_run("random", 0, [0.1] * 3), made_run("tsp", 0, [0.2] * 3, profile="q"))
    with pytest.raises(ValueError, match="random-seed0 and tsp-seed0 were made with different settings"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("{ not", "got what is no JSON", id="no JSON"),
        pytest.param("{}", "got other JSON", id="an empty object"),
        pytest.param("[]", "got other JSON", id="a list"),
        pytest.param(json.dumps({**made_run("random", 0, [0.1]), "settings": {}}), "got other", id="no settings"),
        pytest.param(json.dumps({**made_run("random", 0, [0.1]), "cycles": [{}]}), "got other", id="an empty cycle"),
    ],
)
def test_a_damaged_run_is_named_with_what_to_do(tmp_path, text, said):
    folder = tmp_path / "random-seed0"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        write_report(tmp_path)
    assert str(refused.value).startswith(f"{folder / 'run.json'}: expected the run.json of a run")
    assert str(refused.value).endswith("delete it, and the same command makes it anew")


@pytest.mark.parametrize("name", list(made_run("random", 0, [0.1])["cycles"][0]))
def test_a_cycle_that_lacks_a_figure_is_a_damaged_run_or_has_a_report(tmp_path, name):
    run = made_run("random", 0, [0.1], cycles=1)
    del run["cycles"][0][name]
    write_runs(tmp_path, run)
    if name in benchmark_runs._CYCLE:
        with pytest.raises(ValueError, match="got other JSON"):
            write_report(tmp_path)
    else:
        assert write_report(tmp_path)["lines"]


def test_a_run_that_cannot_be_read_is_not_to_be_deleted(tmp_path):
    (tmp_path / "random-seed0" / "run.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory$"):
        write_report(tmp_path)


def test_a_folder_of_benchmarks_gets_a_report_each(tmp_path):
    for name in ("one", "two"):
        write_runs(tmp_path / name, made_run("random", 0, [0.1] * 3, data=name))
    assert [path.name for path in write_reports(tmp_path)] == ["one", "two"]
    assert (tmp_path / "two" / "report.md").read_text().startswith("# Label efficiency on two")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected results .* found none; `benchmark run` makes them"):
        write_reports(tmp_path)
