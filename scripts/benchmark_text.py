"""The benchmark's report as Markdown: what holds and what does not first, then the tables it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.benchmark_claims import claims
from scripts.benchmark_words import count, interval, number, p_value, percent, signed, with_width

Report = dict[str, Any]


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


def _setting(report: Report) -> str:
    settings, full = report["settings"], report["full_supervision"]
    seeds = sorted({seed for line in report["lines"].values() for seed in line["seeds"]})
    supervision = (
        "Full supervision has not been run."
        if full is None
        else f"Full supervision ({full['images']} images, {count(len(full['seeds']), 'seed')}): mAP@0.5 "
        f"{with_width(full['map_50'], full['map_50_half_width_95'])}."
    )
    network, training = settings["network"], settings["training"]
    seeds_and_epochs = count(len(seeds), "seed"), count(training["epochs"], "epoch")
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
            ", ".join(with_width(h, w) for h, w in zip(line["map_50"], line["map_50_half_width_95"], strict=True)),
            with_width(line["area_under_curve"], line["area_under_curve_half_width_95"]),
            number(line["map_50_95"][-1]),
            signed(line["second_cycle_over_random"]),
            percent(line["empty_images_share"]),
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
            p_value(c["p"]),
            p_value(c["p_holm"]),
            p_value(c["bootstrap_p"]),
            p_value(c["bootstrap_p_holm"]),
            interval(c["test_images_interval_95"]),
        ]
        for c in sorted(report["comparisons"], key=lambda c: float(c["p"]))
    ]
    return "\n\n".join(
        [
            "Differences in area under the curve, paired by seed. Not all pairs: each line against random, against "
            "random+ssl and random by the same recipe, against itself without pseudo labels, and against the line "
            "that it changes in one way; both p are corrected for that many comparisons, of which those of lines that "
            "are the same runs count once. "
            "Read the t-test. The bootstrap is here for comparison: of so few differences it is too sure of itself. "
            "The last column is another question: the 95 % interval of the last cycle's difference in mAP@0.5 when the "
            "test images are drawn anew, with the trained networks as they are.",
            _table(header, rows),
        ]
    )


def _labels_section(report: Report) -> list[str]:
    parts = [*_labels_for_full(report), *_labels_for_random(report["lines"])]
    return ["## Labels needed", *parts] if parts else []


def _labels_for_full(report: Report) -> list[str]:
    if report["full_supervision"] is None:
        return ["How many do what all labels do is unknown without full supervision: run the line `full`."]
    if report["full_supervision_unfit"] is not None or not report["lines"]:
        return []
    shares = ("80", "90", "95", "100")
    rows = [
        [
            f"`{name}`",
            *(_reached(line["images_to_reach"][share]) for share in shares),
            ", ".join(signed(cycle) for cycle in line["over_full_supervision"] or []) or "-",
        ]
        for name, line in report["lines"].items()
    ]
    return [
        "Annotated images from which on the mean curve stays above a share of full supervision's mAP@0.5, between "
        "cycles on a straight line, rounded up: their share of the pool, the share of its instances that they "
        "have, and how many of the seeds' own curves do. With as many as the first cycle has, fewer may have done. "
        "A mean of few seeds crosses a height by chance, too: the last column is mAP@0.5 minus full supervision's "
        "of the same seed, by cycle.",
        _table(["line", *(f"{share} %" for share in shares), "minus full supervision"], rows),
    ]


def _labels_for_random(lines: Mapping[str, Any]) -> list[str]:
    needed = {name: line["images_to_reach_random"] for name, line in lines.items() if line["images_to_reach_random"]}
    if not needed:
        return []
    return [
        "Annotated images from which on the mean curve stays above random's mAP@0.5 in its last cycle (a seed's "
        "own curve: that of its seed), as the paper (50 %) and MaskAL (39 %) count: shares of random's images and "
        "of their instances, and how many of the seeds' own curves do. A mean that falls in its last cycle reaches "
        "that height before: see random's own row.",
        _table(["line", "images"], [[f"`{name}`", _reached(reached)] for name, reached in needed.items()]),
    ]


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
            number(line["map_50_per_100_instances"]),
            number(line["map_50_per_1000_vertices"]),
            number(line["seconds"]["training"], digits=0),
            "-" if line["training_time_over_supervised"] is None else f"{line['training_time_over_supervised']:.2f} x",
        ]
        for name, line in report["lines"].items()
    ]
    full = report["full_supervision"]
    if full is not None:
        rows.append(["full", str(full["images"]), str(full["instances"]), str(full["vertices"]),
                     f"{full['annotation_minutes']:.0f}, {full['annotation_dollars']:.0f}", "the same", "-", "-",
                     number(full["training_cpu_seconds"], digits=0), "-"])  # fmt: skip
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
            ", ".join(number(cycle["instances"], digits=0) for cycle in line["pseudo"][1:]),
            *(
                ", ".join(number(cycle[measure], digits=2) for cycle in line["pseudo"][1:])
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
            f"{number(line['box_spearman'], digits=2)}, {number(line['box_calibration_error'], digits=2)}",
            f"{number(line['mask_spearman'], digits=2)}, {number(line['mask_calibration_error'], digits=2)}",
            number(line["map_50_95"][-1]),
            number(line["rescored_map_50_95"]),
            f"{line['rescored_map_50_95'] - line['map_50_95'][-1]:+.3f}",
            number(line["calibrated_map_50_95"]),
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
        [f"`{line}`", *(number(values["ap_50_by_class"][name]) for name in names)] for line, values in lines.items()
    ]
    return _table(["line", *names], rows)


def _unfinished_section(report: Report) -> list[str]:
    if not report["unfinished"]:
        return []
    rows = [f"- `{run['run']}`: {run['cycles']} of {run['of']} cycles" for run in report["unfinished"]]
    return ["## Not finished, and left out", "\n".join(rows)]


def _pictures(figures: Mapping[str, str], *names: str) -> str:
    return "\n\n".join(f"![{figures[name]}]({name})" for name in names if name in figures)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _reached(reached: Mapping[str, Any]) -> str:
    by_seed = reached["images_by_seed"]
    seeds = f"{len(by_seed) - by_seed.count(None)} of {len(by_seed)}"
    if reached["images"] is None:
        return f"not reached ({seeds})"
    at_most = "at most " if reached["from_the_first_cycle"] else ""
    shares = f"{percent(reached['share_of_images'])}, {percent(reached['share_of_instances'])} of the instances"
    return f"{at_most}{reached['images']} images: {shares} ({seeds})"
