"""The benchmark's results: tables and comparisons, made from the run.json files alone.

`write_report` puts report.json, report.md and the figures beside the runs.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.comparison import resampled_map_50
from model.strategies import STRATEGIES
from model.types import FloatArray
from scripts.benchmark_labels import NEXT_TO_NOTHING, Run, curves_of, labels_for_full, labels_for_random
from scripts.benchmark_lines import FULL, RunName, changed_from, random_alike, supervised_twin
from scripts.benchmark_measures import unpacked
from scripts.benchmark_plots import plot_all
from scripts.benchmark_runs import read_run
from scripts.benchmark_statistics import (
    area_under,
    bootstrap_p,
    half_width,
    holm,
    paired_t_p,
    smallest_sign_p,
)
from scripts.benchmark_text import markdown

Lines = dict[str, list[Run]]

# The middle of the paper's 3-5 minutes and 7-10 dollars.
_RATES = {"minutes_an_image": 4.0, "dollars_an_image": 8.5}
_TEST_RESAMPLES = 400
_BINS = 10
_NO_BETTER_THAN_0 = "cannot be told apart from 0"


def write_reports(folder: Path) -> dict[Path, dict[str, Any]]:
    """Write a report into the folder, if it has runs, and into each of its folders that have; by folder."""
    candidates = [folder, *sorted(path for path in folder.glob("*/") if path.name != "shared")]
    folders = [path for path in candidates if any(path.glob("*/run.json"))]
    if not folders:
        raise ValueError(
            f"{folder}: expected results (run.json in the folder of each run), found none; `benchmark run` makes them"
        )
    return {path: write_report(path) for path in folders}


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json, report.md and the figures of one --out folder; returns what report.json holds.

    What was written is said on stderr.
    """
    runs = [read_run(path) for path in sorted(folder.glob("*/run.json"))]
    runs = [run for run in runs if run["cycles"]]
    if not runs:
        raise ValueError(f"{folder}: expected finished cycles (*/run.json), found none; `benchmark run` makes them")
    if others := [run for run in runs if run["settings"] != runs[0]["settings"]]:
        one, other = (f"{run['line']}-seed{run['seed']}" for run in (runs[0], others[0]))
        raise ValueError(f"{folder}: {one} and {other} were made with different settings and cannot be compared")
    report = make_report(runs)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    figures = plot_all(report, folder)
    (folder / "report.md").write_text(markdown(report, figures))
    print(f"{folder}: wrote {', '.join(['report.md', 'report.json', *figures])}", file=sys.stderr)
    return report


def make_report(runs: Sequence[Run]) -> dict[str, Any]:
    """All tables and comparisons of runs that share their settings; unfinished ones are only listed."""
    lines = _finished(runs)
    full = _full_supervision(lines.pop(FULL, []))
    variants = {line: lines.pop(line) for line in list(lines) if lines[line][0]["strategy"] == FULL}
    unfit = _unfit(full, lines.get("random", []))
    reference = full if unfit is None else None
    random = lines.get("random", []) if unfit != _NO_BETTER_THAN_0 else []  # fewer labels have then taught nothing, too
    return {
        "settings": runs[0]["settings"],
        "annotation_rates": _RATES,
        "full_supervision": full,
        "full_supervision_unfit": unfit,
        "full_supervision_variants": {line: _full_supervision(of_line) for line, of_line in variants.items()},
        "lines": {line: _line(of_line, lines, reference, random) for line, of_line in lines.items()},
        "comparisons": _comparisons(lines),
        "reliability": {branch: _reliability(lines, f"{branch}_reliability") for branch in ("box", "mask")},
        "unfinished": [
            {"run": f"{run['line']}-seed{run['seed']}", "cycles": len(run["cycles"]), "of": _total(run)}
            for run in runs
            if len(run["cycles"]) < _total(run)
        ],
    }


def _total(run: Run) -> int:
    return 1 if run["strategy"] == FULL else int(run["settings"]["cycles"])


def _finished(runs: Sequence[Run]) -> Lines:
    """The finished runs of each line, by seed; the lines in alphabetical order, but random first."""
    lines: Lines = defaultdict(list)
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        if len(run["cycles"]) == _total(run):
            lines[run["line"]].append(run)
    return dict(sorted(lines.items(), key=lambda item: (item[1][0]["strategy"] != "random", item[0])))


def _full_supervision(runs: Sequence[Run]) -> dict[str, Any] | None:
    if not runs:
        return None
    last = [run["cycles"][-1] for run in runs]
    heights = _column(last, "map_50")
    return {
        "seeds": [run["seed"] for run in runs],
        "images": last[0]["annotated_images"],
        "instances": last[0]["annotated_instances"],
        "vertices": last[0]["annotated_vertices"],
        **_annotation(last[0]["annotated_images"]),
        "map_50": float(heights.mean()),
        "map_50_half_width_95": float(half_width(heights)),
        "map_50_by_seed": heights.tolist(),
        "map_50_95": float(_column(last, "map_50_95").mean()),
        "training_cpu_seconds": _mean([_training_seconds(run) for run in runs]),
    }


def _unfit(full: dict[str, Any] | None, random: Sequence[Run]) -> str | None:
    """Why full supervision cannot be what lines are measured against, if it cannot."""
    if full is None:
        return None
    if full["map_50"] <= max(full["map_50_half_width_95"], NEXT_TO_NOTHING):
        return _NO_BETTER_THAN_0
    if random and full["map_50"] < (height := curves_of(random)[:, -1].mean()):
        return f"is below random's last cycle ({height:.3f} with {random[0]['cycles'][-1]['annotated_images']} images)"
    return None


def _line(runs: Sequence[Run], lines: Lines, full: dict[str, Any] | None, random: Sequence[Run]) -> dict[str, Any]:
    """A line's tables; `full` and `random` are what its labels are measured against, if they are fit for it."""
    cycles = [list(cycle) for cycle in zip(*(run["cycles"] for run in runs), strict=True)]
    curves = curves_of(runs)
    images = [cycle[0]["annotated_images"] for cycle in cycles]
    areas = area_under(images, curves)
    return {
        "strategy": runs[0]["strategy"],
        "semi_supervised": runs[0]["semi_supervised"],
        "options": runs[0]["options"],
        "seeds": [run["seed"] for run in runs],
        "annotated_images": images,
        "annotated_instances": [float(_column(cycle, "annotated_instances").mean()) for cycle in cycles],
        "annotated_vertices": [float(_column(cycle, "annotated_vertices").mean()) for cycle in cycles],
        "empty_images_share": _empty_share(runs),
        "map_50": curves.mean(axis=0).tolist(),
        "map_50_half_width_95": half_width(curves).tolist(),
        "map_50_by_seed": curves.tolist(),
        "map_50_95": [float(_column(cycle, "map_50_95").mean()) for cycle in cycles],
        "ap_50_by_class": {name: _mean([c["ap_50_by_class"][name] for c in cycles[-1]]) for name in _classes(runs)},
        "area_under_curve": float(areas.mean()),
        "area_under_curve_half_width_95": float(half_width(areas)),
        "first_cycle_over_random": _first_cycle_over_random(runs, lines),
        "second_cycle_over_random": _over_random(runs, lines, 1),
        "last_cycle_over_random": _over_random(runs, lines, -1),
        "over_full_supervision": _over_full(runs, full),
        "images_to_reach": labels_for_full(runs, full),
        "images_to_reach_random": labels_for_random(runs, random),
        **_costs(cycles[-1], runs[0]["settings"]),
        "seconds": {
            part: _mean([_seconds(run, part) for run in runs]) for part in ("training", "evaluation", "scoring")
        },
        "training_time_over_supervised": _time_ratio(runs, lines),
        "pseudo": [_pseudo(cycle) for cycle in cycles],
        "rescored_map_50": float(_column(cycles[-1], "rescored_map_50").mean()),
        "rescored_map_50_95": float(_column(cycles[-1], "rescored_map_50_95").mean()),
        "calibrated_map_50": _mean([cycle.get("calibrated_map_50") for cycle in cycles[-1]]),
        "calibrated_map_50_95": _mean([cycle.get("calibrated_map_50_95") for cycle in cycles[-1]]),
        **{
            f"{branch}_{value}": _mean([cycle[f"{branch}_reliability"][value] for cycle in cycles[-1]])
            for branch in ("box", "mask")
            for value in ("spearman", "calibration_error")
        },
    }


def _column(cycles: Sequence[dict[str, Any]], name: str) -> FloatArray:
    return np.array([cycle[name] for cycle in cycles], dtype=np.float64)


def _classes(runs: Sequence[Run]) -> list[str]:
    return list(runs[0]["cycles"][-1]["ap_50_by_class"])


def _empty_share(runs: Sequence[Run]) -> float | None:
    """Of the images that the strategy itself chose, those without any instance: all batches but the first."""
    later = [cycle for run in runs for cycle in run["cycles"][1:]]
    chosen = sum(cycle["new_images"] for cycle in later)
    return sum(cycle["new_empty_images"] for cycle in later) / chosen if chosen else None


def _over_full(runs: Sequence[Run], full: dict[str, Any] | None) -> list[dict[str, float]] | None:
    """By cycle, mAP@0.5 minus that of full supervision, paired by seed: mean and half of the 95 % interval."""
    heights = dict(zip(full["seeds"], full["map_50_by_seed"], strict=True)) if full else {}
    alike = [run for run in runs if run["seed"] in heights]
    if not alike:
        return None
    differences = curves_of(alike) - np.array([[heights[run["seed"]]] for run in alike])
    return [
        {"difference": float(mean), "half_width_95": float(width), "seeds": len(alike)}
        for mean, width in zip(differences.mean(axis=0), half_width(differences), strict=True)
    ]


def _over_random(runs: Sequence[Run], lines: Lines, cycle: int) -> dict[str, float] | None:
    """mAP@0.5 minus that of random at a cycle, paired by seed: mean and half of the 95 % interval."""
    if len(runs[0]["cycles"]) < 2 or runs[0]["line"] == "random":
        return None
    differences = _differences(runs, lines.get("random", []), lambda run: run["cycles"][cycle]["map_50"])
    if not len(differences):
        return None
    return {
        "difference": float(differences.mean()),
        "half_width_95": float(half_width(differences)),
        "seeds": len(differences),
    }


def _first_cycle_over_random(runs: Sequence[Run], lines: Lines) -> dict[str, float] | None:
    """Of a strategy with a network of its own, which learns otherwise from the same images as random's."""
    if "dropout" not in STRATEGIES[runs[0]["strategy"]].network_options:
        return None
    annotated = {run["seed"]: run["cycles"][0]["annotated"] for run in lines.get("random", [])}
    alike = [run for run in runs if annotated.get(run["seed"]) == run["cycles"][0]["annotated"]]
    return _over_random(alike, lines, 0) if alike else None


def _differences(one: Sequence[Run], other: Sequence[Run], value: Any) -> FloatArray:
    """Of the seeds that both lines have."""
    by_seed = {run["seed"]: value(run) for run in other}
    return np.array([value(run) - by_seed[run["seed"]] for run in one if run["seed"] in by_seed], dtype=np.float64)


def _costs(last: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, float | None]:
    """What all annotated images cost by the paper's rates: each image alike, or each instance alike.

    By instance, the pool as a whole costs the same as by image.
    """
    images = last[0]["annotated_images"]
    instances, vertices = (float(_column(last, f"annotated_{unit}").mean()) for unit in ("instances", "vertices"))
    height = float(_column(last, "map_50").mean())
    images_an_instance = settings["pool_images"] / max(settings["pool_instances"], 1)
    by_instance = _annotation(instances * images_an_instance)
    return {
        **_annotation(images),
        **{f"{name}_by_instance": value for name, value in by_instance.items()},
        "map_50_per_100_instances": 100 * height / instances if instances else None,
        "map_50_per_1000_vertices": 1000 * height / vertices if vertices else None,
    }


def _annotation(images: float) -> dict[str, float]:
    """What so many images cost by the paper's rates."""
    return {
        "annotation_minutes": images * _RATES["minutes_an_image"],
        "annotation_dollars": images * _RATES["dollars_an_image"],
    }


def _seconds(run: Run, part: str) -> float:
    """CPU seconds of all cycles; a cycle whose seconds were lost counts like the mean of the others."""
    known = [(cycle["seconds"].get(part) or {}).get("cpu") for cycle in run["cycles"]]
    due = len(known) if part != "scoring" else len(known) - 1
    return (_mean(known) or 0.0) * due


def _training_seconds(run: Run) -> float:
    return _seconds(run, "training")


def _time_ratio(runs: Sequence[Run], lines: Lines) -> float | None:
    """CPU seconds of the trainings that have pseudo labels, by those of the same cycles of the same line without."""
    twins = {run["seed"]: run for run in lines.get(_twin(runs[0]), [])}
    pairs = [
        (own["seconds"].get("training"), other["seconds"].get("training"))
        for run in runs
        if run["semi_supervised"] and run["seed"] in twins
        for own, other in zip(run["cycles"], twins[run["seed"]]["cycles"], strict=True)
        if own["pseudo_images"]
    ]
    known = [(own["cpu"], other["cpu"]) for own, other in pairs if own and other]
    return sum(own for own, _ in known) / sum(other for _, other in known) if known else None


def _twin(run: Run) -> str:
    name = RunName(
        strategy=run["strategy"],
        semi_supervised=run["semi_supervised"],
        options=tuple(sorted(run["options"].items())),
        seed=run["seed"],
    )
    return supervised_twin(name).line


def _pseudo(cycle: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    qualities = [run["pseudo_quality"] or {} for run in cycle]
    return {
        "images": _mean([run["pseudo_images"] for run in cycle]),
        **{
            name: _mean([q.get(name) for q in qualities])
            for name in ("instances", "precision", "precision_75", "recall")
        },
    }


def _comparisons(lines: Lines) -> list[dict[str, Any]]:
    """By area under the curve, paired by seed: each line with random, with random+ssl (plain, and with the same
    options), with itself without SSL, and with the line that it changes in one way."""
    pairs = dict.fromkeys(
        (line, other)
        for line, runs in lines.items()
        if line != "random"  # which the others are held against, so it is never the one
        for other in ("random", "random+ssl", random_alike(line), _twin(runs[0]), changed_from(line))
        if other in lines and other != line
    )
    resampled = _resampled(lines)
    found = [_comparison(one, other, lines, resampled) for one, other in pairs]
    comparisons = [comparison for comparison in found if comparison is not None]
    for name in ("p", "bootstrap_p"):
        # Lines that are the same runs are one comparison; what is the same as the line it is held against is none.
        distinct = {tuple(c["differences"]): c[name] for c in comparisons if any(c["differences"])}
        corrected = dict(zip(distinct, holm(list(distinct.values())), strict=True))
        for comparison in comparisons:
            comparison[f"{name}_holm"] = corrected.get(tuple(comparison["differences"]), 1.0)
    return comparisons


def _comparison(
    one: str, other: str, lines: Lines, resampled: dict[tuple[str, int], FloatArray]
) -> dict[str, Any] | None:
    images = [cycle["annotated_images"] for cycle in lines[one][0]["cycles"]]
    differences = _differences(lines[one], lines[other], lambda run: area_under(images, curves_of([run]))[0])
    if len(differences) < 2:
        return None
    comparison = {
        "one": one,
        "other": other,
        "seeds": len(differences),
        "differences": differences.tolist(),
        "same_choices": _choices(lines[one], lines[other]) == _choices(lines[other], lines[one]),
        "difference": float(differences.mean()),
        "half_width_95": float(half_width(differences)),
        "p": paired_t_p(differences),
        "bootstrap_p": bootstrap_p(differences),
        "smallest_sign_p": smallest_sign_p(len(differences)),
        "test_images_interval_95": None,
    }
    seeds = {run["seed"] for run in lines[one]} & {run["seed"] for run in lines[other]}
    pairs = [(resampled.get((one, seed)), resampled.get((other, seed))) for seed in sorted(seeds)]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    if len(known) == len(seeds):
        interval = np.quantile(np.mean(known, axis=0), [0.025, 0.975])
        comparison["test_images_interval_95"] = [float(value) for value in interval]
    return comparison


def _choices(runs: Sequence[Run], others: Sequence[Run]) -> list[list[list[str]]]:
    """What was annotated in each cycle, by the seeds that the others have, too."""
    seeds = {run["seed"] for run in others}
    return [[cycle["annotated"] for cycle in run["cycles"]] for run in runs if run["seed"] in seeds]


def _resampled(lines: Lines) -> dict[tuple[str, int], FloatArray]:
    """By line and seed, the last cycle's mAP@0.5 on resampled test sets, which are the same ones for all."""
    return {
        (line, run["seed"]): resampled_map_50(
            {name: unpacked(text) for name, text in run["cycles"][-1]["matches"].items()},
            run["test_instances"],
            _TEST_RESAMPLES,
        )
        for line, runs in lines.items()
        for run in runs
        if run["cycles"][-1]["matches"]
    }


def _reliability(lines: Lines, branch: str) -> list[list[float]]:
    """The bins of all runs' last cycles together: mean predicted, mean true, count; each bin a tenth wide."""
    bins = [b for runs in lines.values() for run in runs for b in run["cycles"][-1][branch]["bins"]]
    result = []
    for number in range(_BINS):
        rows = np.array([b for b in bins if min(int(b[0] * _BINS), _BINS - 1) == number], dtype=np.float64)
        if len(rows):
            count = rows[:, 2].sum()
            result.append([float((rows[:, 0] * rows[:, 2]).sum() / count),
                           float((rows[:, 1] * rows[:, 2]).sum() / count), int(count)])  # fmt: skip
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
