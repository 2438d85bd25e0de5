"""The figures of a benchmark's report, small PNGs: the paper's Figures 2 and 4, and what belongs beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Line = dict[str, Any]
Report = dict[str, Any]

_COLOURS = {
    "random": "#555555",
    "tsp": "#d62728",
    "hybrid": "#ff7f0e",
    "class_entropy": "#1f77b4",
    "core_set": "#2ca02c",
    "learning_loss": "#9467bd",
    "mc_dropout": "#17becf",
    "tsp_without_box": "#8c564b",
    "tsp_without_box_and_mask": "#e377c2",
}
_MARKERS = "osD^vP*Xph"


def plot_all(report: Report, folder: Path) -> dict[str, str]:
    """Draw every figure for which there are results; by file name, what it shows."""
    figures = {
        "figure2.png": ("mAP@0.5 by annotated images, as in the paper's Figure 2", _figure_2),
        "figure4.png": (
            "With pseudo labels, by beta, and without some of the scores (the paper's Figure 4)",
            _figure_4,
        ),
        "options.png": ("Lines with options of their own", _figure_options),
        "cost.png": ("mAP@0.5 by annotated instances and vertices", _figure_cost),
        "pseudo.png": ("Pseudo labels against the hidden ground truth", _figure_pseudo),
        "reliability.png": ("Predicted and true IoU of the last cycle", _figure_reliability),
    }
    drawn = {}
    for name, (title, draw) in figures.items():
        figure = draw(report)
        path = folder / name
        if figure is None:
            path.unlink(missing_ok=True)  # of an earlier report
            continue
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        drawn[name] = title
    return drawn


def _figure_2(report: Report) -> Figure | None:
    """All strategies, and TSP with pseudo labels."""
    chosen = [
        name
        for name, line in report["lines"].items()
        if "@" not in name
        and not line["strategy"].startswith("tsp_without")
        and (not line["semi_supervised"] or line["strategy"] == "tsp")
    ]
    return _curves(report, chosen) if chosen else None


def _figure_4(report: Report) -> Figure | None:
    """Pseudo labels with other strategies, values of beta, and TSP without some of its scores."""
    whole = ("tsp", "tsp+ssl")
    chosen = [
        name
        for name, line in report["lines"].items()
        if _own_options(name) <= {"beta"}
        and (name in whole or line["semi_supervised"] or line["strategy"].startswith("tsp_without"))
    ]
    return _curves(report, chosen) if set(chosen) - set(whole) else None


def _figure_options(report: Report) -> Figure | None:
    """What goes beyond the paper, beside the lines without options."""
    special = [name for name in report["lines"] if _own_options(name) - {"beta"}]
    plain = {name.split("@")[0] for name in special} & set(report["lines"])
    return (
        _curves(report, ["random"] * ("random" in report["lines"]) + sorted(plain - {"random"}) + special)
        if special
        else None
    )


def _own_options(line: str) -> set[str]:
    """Names of the options that are written behind the strategy and its recipe."""
    return {option.partition("=")[0] for option in line.split("@")[1:]}


def _curves(report: Report, names: Sequence[str]) -> Figure:
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    for number, name in enumerate(names):
        line = report["lines"][name]
        images, heights = line["annotated_images"], line["map_50"]
        # A little beside each other, so that the intervals can be told apart.
        beside = (number - (len(names) - 1) / 2) * 0.012 * (images[-1] - images[0])
        axes.errorbar(
            [count + beside for count in images],
            heights,
            yerr=line["map_50_half_width_95"] if len(line["seeds"]) > 1 else None,
            label=name,
            elinewidth=0.8,
            capsize=3,
            **_style(name, names),
        )
    _mark_full(axes, report)
    _finish(axes, "annotated images", "mask mAP@0.5 on the test images")
    axes.set_ylim(*_limits(report, names))
    _legend(axes)
    return figure


def _limits(report: Report, names: Sequence[str]) -> tuple[float, float]:
    """From below every interval to above it: a bar that is cut looks like a narrower one."""
    lines = [report["lines"][name] for name in names]
    pairs = [p for line in lines for p in zip(line["map_50"], line["map_50_half_width_95"], strict=True)]
    full = [report["full_supervision"]["map_50"]] if report["full_supervision"] else []
    lowest = min([*(height - width for height, width in pairs), *full])
    highest = max([0.01, *(height + width for height, width in pairs), *full])
    margin = max(0.05 * (highest - lowest), 0.01)
    return lowest - margin, highest + margin


def _figure_cost(report: Report) -> Figure | None:
    lines = {name: line for name, line in report["lines"].items() if "@" not in name}
    if not lines:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=True)
    for axes, unit in zip(panels, ("instances", "vertices"), strict=True):
        for name, line in lines.items():
            axes.plot(line[f"annotated_{unit}"], line["map_50"], label=name, **_style(name, list(lines)))
        _mark_full(axes, report)
        _finish(axes, f"annotated {unit}", "mask mAP@0.5" if unit == "instances" else "")
    _legend(panels[1])
    return figure


def _figure_pseudo(report: Report) -> Figure | None:
    lines = {
        name: line
        for name, line in report["lines"].items()
        if line["semi_supervised"] and any(cycle["instances"] for cycle in line["pseudo"])
    }
    if not lines:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True)
    for axes, measure in zip(panels, ("precision", "recall"), strict=True):
        for name, line in lines.items():
            known = [(n, c[measure]) for n, c in enumerate(line["pseudo"], start=1) if c[measure] is not None]
            axes.plot([n for n, _ in known], [v for _, v in known], label=name, **_style(name, list(lines)))
        _finish(axes, "cycle", f"{measure} of the pseudo labels")
        axes.set_ylim(0, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(panels[1])
    return figure


def _figure_reliability(report: Report) -> Figure | None:
    if not any(report["reliability"].values()):
        return None
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.8), sharey=True)
    for axes, (branch, bins) in zip(panels, report["reliability"].items(), strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", lw=1, ls=":")
        if bins:
            largest = max(count for _, _, count in bins)
            axes.plot([b[0] for b in bins], [b[1] for b in bins], color="#1f77b4", lw=1)
            axes.scatter(
                [b[0] for b in bins], [b[1] for b in bins], [12 + 130 * b[2] / largest for b in bins], color="#1f77b4"
            )
        _finish(axes, f"predicted {branch} IoU", "true IoU" if branch == "box" else "")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
    seeds = {seed for line in report["lines"].values() for seed in line["seeds"]}
    names = list(report["lines"])
    which = names[0] if len(names) == 1 else f"{len(names)} lines together"
    figure.suptitle(f"Last cycle of {which}, {len(seeds)} seed{'s' * (len(seeds) > 1)}", fontsize=10)
    return figure


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour by strategy, so that a line with pseudo labels (whole, filled) looks like its twin (dashed, open)."""
    same = [other for other in names if _head(other) == _head(name) and _is_ssl(other) == _is_ssl(name)]
    return {
        "color": _colour(name),
        "marker": _MARKERS[same.index(name) % len(_MARKERS)],
        "markerfacecolor": _colour(name) if _is_ssl(name) else "white",
        "ms": 5 if _is_ssl(name) else 7,  # the open one is a ring around its twin where both are equal
        "lw": 1.6,
        "ls": "-" if _is_ssl(name) else "--",
    }


def _colour(name: str) -> str:
    return _COLOURS.get(_head(name), "#bcbd22")


def _head(name: str) -> str:
    return name.split("@")[0].split("+")[0]


def _is_ssl(name: str) -> bool:
    return "+" in name.split("@")[0]


def _mark_full(axes: Axes, report: Report) -> None:
    full = report["full_supervision"]
    if full is not None:
        axes.axhline(full["map_50"], color="black", lw=1, ls=":", label=f"full supervision ({full['images']} images)")


def _legend(axes: Axes) -> None:
    """Beside the axes, with handles long enough for dashes on both sides of a marker."""
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=5.5)


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
