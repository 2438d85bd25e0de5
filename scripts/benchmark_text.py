"""The benchmark's report as Markdown: what holds and what does not first, then the tables it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.benchmark_lines import random_alike

Report = dict[str, Any]

_SURE = 0.05


def markdown(report: Report, figures: Mapping[str, str]) -> str:
    """The report; `figures` says what each file beside it shows."""
    parts = [
        f"# Label efficiency on {report['settings']['data']}",
        _setting(report),
        "## What the data say",
        "\n".join(f"- {claim}" for claim in claims(report)),
        _pictures(figures, "figure2.png", "figure4.png", "options.png"),
        "## Lines",
        _lines_table(report),
        "## Comparisons",
        _comparisons_table(report),
        *_labels_section(report),
        "## Cost",
        _cost_table(report),
        _pictures(figures, "cost.png"),
        *_pseudo_section(report, figures),
        "## The IoU branches",
        _branches_table(report),
        _pictures(figures, "reliability.png"),
        "## AP@0.5 by class, last cycle",
        _classes_table(report),
        *_unfinished_section(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def claims(report: Report) -> list[str]:
    """Sentences about what the paper says and what these runs show, each with its numbers."""
    lines, full = report["lines"], report["full_supervision"]
    found = []
    for name, line in lines.items():
        for other in ("random", *([random_alike(name)] if line["semi_supervised"] else [])):
            comparison = _between(report, name, other)
            if comparison is not None:
                found.append(_verdict(comparison, f"**{name}**", other))
    semi_supervised = [name for name in lines if name.startswith("tsp+ssl")]
    if full is not None and report["full_supervision_unfit"] is not None:
        found.append(
            f"Full supervision ({_with_width(full['map_50'], full['map_50_half_width_95'])}) "
            f"{report['full_supervision_unfit']}: it is no reference, so how many labels reach it is left out."
        )
    elif full is not None:
        found.extend(_half_the_labels(name, lines[name], full) for name in semi_supervised)
    for name in semi_supervised:
        second = lines[name]["second_cycle_over_random"]
        if second is not None:
            found.append(
                f"At the second cycle {name} is {_signed(second)} mAP@0.5 against random (the paper: up to +0.10)."
            )
    if "tsp" in lines and lines["tsp"]["last_cycle_over_random"] is not None:
        last = lines["tsp"]["last_cycle_over_random"]
        found.append(f"At the last cycle tsp alone is {_signed(last)} against random (the paper: about +0.019 on CT).")
    for name, line in lines.items():
        if line["semi_supervised"] and not any(cycle["instances"] for cycle in line["pseudo"]):
            found.append(
                f"{name}: no prediction ever passed the thresholds, so there were no pseudo labels to learn from."
            )
    found.extend(_ranges(list(lines.values())))
    if not report["comparisons"]:
        found.append("No two finished lines can be compared yet: that takes two seeds of random and of another line.")
    few = [c for c in report["comparisons"] if c["smallest_sign_p"] > _SURE]
    if few:
        seeds = max(c["seeds"] for c in few)
        found.append(
            f"With {seeds} seeds even {seeds} differences of one sign come by chance with p = {2 ** (1 - seeds):g}; "
            "the t-test can give less only by trusting that differences are normal. Take all p values here with care."
        )
    return found


def _ranges(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is alike for all lines: from the lowest to the highest of them."""
    ratios = [line["training_time_over_supervised"] for line in lines if line["training_time_over_supervised"]]
    gains = [100 * (line["rescored_map_50_95"] - line["map_50_95"][-1]) for line in lines]
    ranks = [line["mask_spearman"] for line in lines if line["mask_spearman"] is not None]
    found = []
    if ranks:
        found.append(f"m ranks the true mask IoU with a Spearman correlation of {_range(ranks, '.2f')} (by line).")
    if gains:
        found.append(f"Ranking by c x m instead of c: {_range(gains, '+.1f')} points of mAP@[.5:.95] (by line).")
    if ratios:
        found.append(
            f"All trainings of a line with pseudo labels take {_range(ratios, '.2f')} times as long as without them, "
            "for as many steps (the paper: 5.2 h against 4.8 h)."
        )
    return found


def _range(values: Sequence[float], form: str) -> str:
    lowest, highest = format(min(values), form), format(max(values), form)
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _verdict(comparison: dict[str, Any], one: str, other: str) -> str:
    """Better, worse or not told apart: by the t-test, before and after Holm's correction."""
    difference, p = comparison["difference"], comparison["p_holm"]
    numbers = (
        f"{difference:+.3f} ± {comparison['half_width_95']:.3f} in area under the curve, {comparison['seeds']} seeds, "
        f"p {_p(comparison['p'], equals=True)}, after Holm {_p(p, equals=True)}"
    )
    direction = "better" if difference > 0 else "worse"
    if p < _SURE:
        return f"{one} is {direction} than {other} ({numbers})."
    if comparison["p"] < _SURE:
        return f"{one} looks {direction} than {other}, but not after correction for all comparisons ({numbers})."
    return f"{one} cannot be told apart from {other} ({numbers})."


def _half_the_labels(name: str, line: dict[str, Any], full: dict[str, Any]) -> str:
    reached = line["images_to_reach"]["100"]
    paper = "in the paper with half of it"
    if reached is None:
        best = max(line["map_50"])
        return (
            f"{name} does not reach full supervision ({full['map_50']:.3f} with {full['images']} images) with up to "
            f"{line['annotated_images'][-1]} images: at best {best:.3f}, {_percent(best / full['map_50'])} ({paper})."
        )
    by_seed = reached["images_by_seed"]
    own = ", ".join("not" if images is None else str(images) for images in by_seed)
    return (
        f"{name} reaches full supervision ({full['map_50']:.3f}) with {_images(reached)} of the pool, {paper}; "
        f"of the seeds' own curves {len(by_seed) - by_seed.count(None)} of {len(by_seed)} do ({own})."
    )


def _setting(report: Report) -> str:
    settings, full = report["settings"], report["full_supervision"]
    seeds = sorted({seed for line in report["lines"].values() for seed in line["seeds"]})
    supervision = (
        "Full supervision has not been run."
        if full is None
        else f"Full supervision ({full['images']} images, {_count(len(full['seeds']), 'seed')}): mAP@0.5 "
        f"{_with_width(full['map_50'], full['map_50_half_width_95'])}."
    )
    network, training = settings["network"], settings["training"]
    seeds_and_epochs = _count(len(seeds), "seed"), _count(training["epochs"], "epoch")
    return (
        f"{settings['pool_images']} images with {settings['pool_instances']} instances in the pool, "
        f"{settings['test_images']} test images. First batch {settings['first_batch']}, then {settings['batch']} a "
        f"cycle, {settings['cycles']} cycles, {seeds_and_epochs[0]}. `{settings['profile']}` at "
        f"{network['min_size']} px from {settings['weights']} weights, {seeds_and_epochs[1]} (at least "
        f"{training['min_steps']} steps of {training['batch_size']} images). Anchor sizes and the "
        f"number of detections come from the labels of the whole pool, alike for all lines. {supervision} All masks "
        "are measured at the images' own size. Intervals are 95 % of the mean over seeds (Student's t)."
    )


def _lines_table(report: Report) -> str:
    header = [
        "line",
        "seeds",
        "mAP@0.5 by cycle",
        "area",
        "mAP@[.5:.95]",
        "2nd cycle against random",
        "empty images chosen",
    ]
    rows = [
        [
            f"`{name}`",
            str(len(line["seeds"])),
            ", ".join(_with_width(h, w) for h, w in zip(line["map_50"], line["map_50_half_width_95"], strict=True)),
            _with_width(line["area_under_curve"], line["area_under_curve_half_width_95"]),
            _number(line["map_50_95"][-1]),
            _signed(line["second_cycle_over_random"]),
            _percent(line["empty_images_share"]),
        ]
        for name, line in report["lines"].items()
    ]
    return _table(header, rows) if rows else "No line is finished."


def _comparisons_table(report: Report) -> str:
    if not report["comparisons"]:
        return "None yet: a comparison takes two finished lines with at least two seeds in common."
    header = ["line", "against", "seeds", "area", "p (t)", "Holm", "p (bootstrap)", "Holm", "last cycle by test images"]
    rows = [
        [
            f"`{c['one']}`",
            f"`{c['other']}`",
            str(c["seeds"]),
            f"{c['difference']:+.3f} ± {c['half_width_95']:.3f}",
            _p(c["p"]),
            _p(c["p_holm"]),
            _p(c["bootstrap_p"]),
            _p(c["bootstrap_p_holm"]),
            _interval(c["test_images_interval_95"]),
        ]
        for c in sorted(report["comparisons"], key=lambda c: float(c["p"]))
    ]
    return "\n\n".join(
        [
            "Differences in area under the curve, paired by seed. Not all pairs: each line against random, against "
            "random+ssl and random by the same recipe, and against itself without pseudo labels; both p are corrected "
            "for that many comparisons. "
            "Read the t-test. The bootstrap is here for comparison: of so few differences it is too sure of itself. "
            "The last column is another question: the 95 % interval of the last cycle's difference in mAP@0.5 when the "
            "test images are drawn anew, with the trained networks as they are.",
            _table(header, rows),
        ]
    )


def _labels_section(report: Report) -> list[str]:
    if report["full_supervision_unfit"] is not None:
        return []
    title = "## Labels needed"
    if report["full_supervision"] is None:
        return [title, "Unknown without full supervision: run the line `full`."]
    shares = ("80", "90", "95", "100")
    rows = [
        [f"`{name}`", *(_reached(line["images_to_reach"][share]) for share in shares)]
        for name, line in report["lines"].items()
    ]
    text = (
        "Annotated images from which on the mean curve stays above a share of full supervision's mAP@0.5 (share of the "
        "pool; how many of the seeds' own curves do), between cycles on a straight line, rounded up. With as many as "
        "the first cycle has, fewer may have done. A mean of few seeds crosses a height by chance, too: look at the "
        "intervals above."
    )
    return [title, text, _table(["line", *(f"{share} %" for share in shares)], rows)]


def _cost_table(report: Report) -> str:
    header = ["line", "images", "instances", "vertices", "minutes, dollars", "the same by instance",
              "mAP per 100 instances", "mAP per 1000 vertices", "training, CPU s", "against no SSL"]  # fmt: skip
    rows = [
        [
            f"`{name}`",
            str(line["annotated_images"][-1]),
            f"{line['annotated_instances'][-1]:.0f}",
            f"{line['annotated_vertices'][-1]:.0f}",
            f"{line['annotation_minutes']:.0f}, {line['annotation_dollars']:.0f}",
            f"{line['annotation_minutes_by_instance']:.0f}, {line['annotation_dollars_by_instance']:.0f}",
            _number(line["map_50_per_100_instances"]),
            _number(line["map_50_per_1000_vertices"]),
            _number(line["seconds"]["training"], digits=0),
            "-" if line["training_time_over_supervised"] is None else f"{line['training_time_over_supervised']:.2f} x",
        ]
        for name, line in report["lines"].items()
    ]
    full = report["full_supervision"]
    if full is not None:
        rows.append(["full", str(full["images"]), str(full["instances"]), str(full["vertices"]),
                     f"{full['annotation_minutes']:.0f}, {full['annotation_dollars']:.0f}", "the same", "-", "-",
                     _number(full["training_cpu_seconds"], digits=0), "-"])  # fmt: skip
    rates = report["annotation_rates"]
    return "\n\n".join(
        [
            f"After the last cycle. Money and time are the paper's rates ({rates['minutes_an_image']:g} minutes and "
            f"{rates['dollars_an_image']:.2f} dollars a CT image), once for each image alike and once for each "
            "instance alike, so that a strategy that picks crowded images pays for them.",
            _table(header, rows),
        ]
    )


def _pseudo_section(report: Report, figures: Mapping[str, str]) -> list[str]:
    lines = {name: line for name, line in report["lines"].items() if line["semi_supervised"]}
    if not lines:
        return []
    header = ["line", "pseudo labels by cycle", "precision", "precision at 0.75", "recall"]
    rows = [
        [
            f"`{name}`",
            ", ".join(_number(cycle["instances"], digits=0) for cycle in line["pseudo"][1:]),
            *(
                ", ".join(_number(cycle[measure], digits=2) for cycle in line["pseudo"][1:])
                for measure in ("precision", "precision_75", "recall")
            ),
        ]
        for name, line in lines.items()
    ]
    text = (
        "From the second cycle on, against the hidden ground truth: a hit has the right class and a mask IoU of 0.5, "
        "or of 0.75."
    )
    return ["## Pseudo labels", text, _table(header, rows), _pictures(figures, "pseudo.png")]


def _branches_table(report: Report) -> str:
    header = [
        "line",
        "box: Spearman, ECE",
        "mask: Spearman, ECE",
        "mAP@[.5:.95] by c",
        "by c x m",
        "gain",
        "by c x calibrated m",
    ]
    rows = [
        [
            f"`{name}`",
            f"{_number(line['box_spearman'], digits=2)}, {_number(line['box_calibration_error'], digits=2)}",
            f"{_number(line['mask_spearman'], digits=2)}, {_number(line['mask_calibration_error'], digits=2)}",
            _number(line["map_50_95"][-1]),
            _number(line["rescored_map_50_95"]),
            f"{line['rescored_map_50_95'] - line['map_50_95'][-1]:+.3f}",
            _number(line["calibrated_map_50_95"]),
        ]
        for name, line in report["lines"].items()
    ]
    text = (
        "Last cycle, test images: how well the predicted IoUs rank the true ones, how far they are off on average "
        "(expected calibration error), and what it brings to rank detections by c x m instead of c."
    )
    return f"{text}\n\n{_table(header, rows)}" if rows else text


def _classes_table(report: Report) -> str:
    lines = report["lines"]
    if not lines:
        return ""
    names = list(next(iter(lines.values()))["ap_50_by_class"])
    rows = [
        [f"`{line}`", *(_number(values["ap_50_by_class"][name]) for name in names)] for line, values in lines.items()
    ]
    return _table(["line", *names], rows)


def _unfinished_section(report: Report) -> list[str]:
    if not report["unfinished"]:
        return []
    rows = [f"- `{run['run']}`: {run['cycles']} of {run['of']} cycles" for run in report["unfinished"]]
    return ["## Not finished, and left out", "\n".join(rows)]


def _between(report: Report, one: str, other: str) -> dict[str, Any] | None:
    return next((c for c in report["comparisons"] if (c["one"], c["other"]) == (one, other)), None)


def _pictures(figures: Mapping[str, str], *names: str) -> str:
    return "\n\n".join(f"![{figures[name]}]({name})" for name in names if name in figures)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: float | None, *, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_width(value: float, width: float) -> str:
    return f"{value:.3f} ± {width:.3f}" if width else f"{value:.3f}"


def _signed(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return "-"
    width = f" ± {difference['half_width_95']:.3f}" if difference["seeds"] > 1 else ""
    return f"{difference['difference']:+.3f}{width}"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _reached(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "not reached"
    by_seed = value["images_by_seed"]
    return f"{_images(value)} ({len(by_seed) - by_seed.count(None)} of {len(by_seed)})"


def _images(reached: Mapping[str, Any]) -> str:
    at_most = "at most " if reached["from_the_first_cycle"] else ""
    return f"{at_most}{reached['images']} images, {_percent(reached['share_of_pool'])}"


def _p(value: float, *, equals: bool = False) -> str:
    return "< 0.001" if value < 0.001 else f"{'= ' if equals else ''}{value:.3f}"


def _interval(values: Sequence[float] | None) -> str:
    return "-" if values is None else f"{values[0]:+.3f} to {values[1]:+.3f}"
