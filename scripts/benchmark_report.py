"""The benchmark's results as a table, the paper's Figure 2, and statistics; made from the run.json files alone."""

import json
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")
from matplotlib import pyplot as plt

from scripts.benchmark_lines import FULL

Run = dict[str, Any]
_RESAMPLES = 10_000
_MINUTES_AN_IMAGE, _DOLLARS_AN_IMAGE = 4.0, 8.5  # the middle of the paper's 3-5 minutes and 7-10 dollars


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json, report.md and curves.png into the folder; returns what report.json holds."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/run.json"))]
    runs = [run for run in runs if run["cycles"]]
    if not runs:
        raise ValueError(f"{folder}: expected finished cycles (*/run.json), found none; `run` makes them")
    if others := [run for run in runs if run["settings"] != runs[0]["settings"]]:
        one, other = (f"{run['line']}-seed{run['seed']}" for run in (runs[0], others[0]))
        raise ValueError(f"{folder}: {one} and {other} were made with different settings and cannot be compared")
    complete = _complete(runs)
    full = [run["cycles"][-1]["map_50"] for run in runs if run["line"] == FULL]
    report = {
        "settings": runs[0]["settings"],
        "full_supervision_map_50": float(np.mean(full)) if full else None,
        "lines": {line: _line(of_line, full) for line, of_line in complete.items()},
        "comparisons": _comparisons(complete),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    _plot(report, folder / "curves.png")
    (folder / "report.md").write_text(_markdown(report))
    return report


def _complete(runs: list[Run]) -> dict[str, list[Run]]:
    """The finished runs of each line, by seed."""
    lines: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["line"] != FULL and len(run["cycles"]) == run["settings"]["cycles"]:
            lines[run["line"]].append(run)
    return dict(sorted(lines.items()))


def _line(runs: list[Run], full: list[float]) -> dict[str, Any]:
    curves = _curves(runs)
    half_width = _half_width(curves)
    last = [run["cycles"][-1] for run in runs]
    images = [cycle["annotated_images"] for cycle in runs[0]["cycles"]]
    return {
        "seeds": [run["seed"] for run in runs],
        "annotated_images": images,
        "map_50": curves.mean(axis=0).tolist(),
        "map_50_half_width_95": half_width.tolist(),
        "area_under_curve": float(_areas(runs).mean()),
        "images_to_reach_full": _images_to_reach(images, curves.mean(axis=0), float(np.mean(full))) if full else None,
        "annotation_minutes": images[-1] * _MINUTES_AN_IMAGE,
        "annotation_dollars": images[-1] * _DOLLARS_AN_IMAGE,
        "annotated_instances": float(np.mean([cycle["annotated_instances"] for cycle in last])),
        "training_cpu_seconds": float(
            np.mean([sum((c["seconds"]["training"] or {"cpu": 0})["cpu"] for c in r["cycles"]) for r in runs])
        ),
        "map_50_95": _mean([cycle["map_50_95"] for cycle in last]),
        "rescored_map_50_95": _mean([cycle["rescored_map_50_95"] for cycle in last]),
        "box_spearman": _mean([cycle["box_reliability"]["spearman"] for cycle in last]),
        "mask_spearman": _mean([cycle["mask_reliability"]["spearman"] for cycle in last]),
        "pseudo_precision": _mean([(cycle["pseudo_quality"] or {}).get("precision") for cycle in last]),
        "pseudo_recall": _mean([(cycle["pseudo_quality"] or {}).get("recall") for cycle in last]),
    }


def _curves(runs: list[Run]) -> NDArray[np.float64]:
    """mAP@0.5 by seed and cycle."""
    return np.array([[cycle["map_50"] for cycle in run["cycles"]] for run in runs], dtype=np.float64)


def _areas(runs: list[Run]) -> NDArray[np.float64]:
    """The mean height of each seed's curve over the annotated images, by the trapezium rule."""
    images = np.array([cycle["annotated_images"] for cycle in runs[0]["cycles"]], dtype=np.float64)
    if images[0] == images[-1]:
        means: NDArray[np.float64] = _curves(runs).mean(axis=1)
        return means
    areas: NDArray[np.float64] = np.trapezoid(_curves(runs), images, axis=1) / (images[-1] - images[0])
    return areas


def _half_width(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the width of a 95 % interval of the mean over seeds, by Student's t."""
    count = len(curves)
    if count < 2:
        return np.zeros(curves.shape[1])
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(
        count, 1.96 + 2.37 / (count - 1) + 2.82 / (count - 1) ** 2
    )
    half_width: NDArray[np.float64] = t * curves.std(axis=0, ddof=1) / np.sqrt(count)
    return half_width


def _images_to_reach(images: list[int], curve: NDArray[np.float64], target: float) -> float | None:
    """How many annotated images reach the target on the mean curve, between cycles by a straight line."""
    for i, height in enumerate(curve):
        if height >= target:
            if i == 0:
                return float(images[0])
            share = (target - curve[i - 1]) / (height - curve[i - 1])
            return float(images[i - 1] + share * (images[i] - images[i - 1]))
    return None


def _comparisons(lines: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Every pair of lines by area under the curve, paired by seed; p by bootstrap, corrected after Holm."""
    comparisons: list[dict[str, Any]] = []
    for one, other in combinations(lines, 2):
        areas = [dict(zip([r["seed"] for r in lines[x]], _areas(lines[x]), strict=True)) for x in (one, other)]
        seeds = sorted(set(areas[0]) & set(areas[1]))
        if len(seeds) >= 3:
            differences = np.array([areas[0][seed] - areas[1][seed] for seed in seeds])
            p = _bootstrap_p(differences)
            comparisons.append(
                {"one": one, "other": other, "seeds": len(seeds), "difference": float(differences.mean()), "p": p}
            )
    ordered = sorted(comparisons, key=lambda comparison: float(comparison["p"]))
    largest = 0.0
    for rank, comparison in enumerate(ordered):
        largest = max(largest, min(1.0, float(comparison["p"]) * (len(ordered) - rank)))
        comparison["p_holm"] = largest
    return ordered


def _bootstrap_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of a mean of zero: resampled means of the centred differences at least as far out."""
    rng = np.random.default_rng(0)
    centred = differences - differences.mean()
    means = rng.choice(centred, (_RESAMPLES, len(centred))).mean(axis=1)
    return float((1 + (np.abs(means) >= abs(differences.mean())).sum()) / (_RESAMPLES + 1))


def _plot(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, line in report["lines"].items():
        style = "-" if name.endswith("+ssl") else "--"
        axes.errorbar(
            line["annotated_images"], line["map_50"], yerr=line["map_50_half_width_95"], label=name, ls=style, capsize=2
        )
    if report["full_supervision_map_50"] is not None:
        axes.axhline(report["full_supervision_map_50"], color="black", lw=1, ls=":", label="full supervision")
    axes.set_xlabel("annotated images")
    axes.set_ylabel("mask mAP@0.5 on the test images")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _markdown(report: dict[str, Any]) -> str:
    settings = report["settings"]
    full = report["full_supervision_map_50"]
    rows = [
        f"{settings['pool_images']} images in the pool, {settings['test_images']} test images, "
        f"{settings['profile']}, first batch {settings['first_batch']}, then {settings['batch']} a cycle. "
        f"Full supervision: mAP@0.5 {_shown(full)}.",
        "",
        "![mAP@0.5 by annotated images](curves.png)",
        "",
        "| line | seeds | mAP@0.5 by cycle (95 % interval) | area | images to reach full "
        "| mAP@[.5:.95], ranked by c, by c x m | Spearman box, mask | pseudo precision, recall | training, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, line in report["lines"].items():
        heights = zip(line["map_50"], line["map_50_half_width_95"], strict=True)
        curve = ", ".join(f"{height:.3f} ({width:.3f})" for height, width in heights)
        reach = line["images_to_reach_full"]
        rows.append(
            f"| {name} | {len(line['seeds'])} | {curve} | {line['area_under_curve']:.3f} "
            f"| {'not reached' if reach is None else round(reach)} "
            f"| {_shown(line['map_50_95'])}, {_shown(line['rescored_map_50_95'])} "
            f"| {_shown(line['box_spearman'])}, {_shown(line['mask_spearman'])} "
            f"| {_shown(line['pseudo_precision'])}, {_shown(line['pseudo_recall'])} "
            f"| {line['training_cpu_seconds']:.0f} |"
        )
    rows += ["", "Differences in area under the curve, paired by seed:", "", "| | | difference | p | p after Holm |"]
    rows.append("|---|---|---|---|---|")
    rows += [
        f"| {c['one']} | {c['other']} | {c['difference']:+.3f} | {c['p']:.3f} | {c['p_holm']:.3f} |"
        for c in report["comparisons"]
    ]
    return "\n".join(rows) + "\n"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
