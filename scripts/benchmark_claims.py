"""What the benchmark's runs say, in sentences: what the paper claims and what they show, each with its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.benchmark_lines import changed_from, random_alike
from scripts.benchmark_words import p_value, percent, signed, span, with_width

Report = dict[str, Any]

_SURE = 0.05


def claims(report: Report) -> list[str]:
    """Sentences about what the paper says and what these runs show, each with its numbers."""
    lines = report["lines"]
    semi_supervised = [name for name in lines if name.startswith("tsp+ssl")]
    return [
        *_comparisons(report),
        *_reference(report),
        *(sentence for name in semi_supervised for sentence in _labels(name, lines[name], report)),
        *_gains(lines, semi_supervised),
        *_remarks(lines),
        *_ranges(list(lines.values())),
        *_doubts(report["comparisons"]),
    ]


def _comparisons(report: Report) -> list[str]:
    """Each line against random, random by the same recipe, and the line that it changes in one way."""
    pairs = [
        (name, other)
        for name, line in report["lines"].items()
        for other in dict.fromkeys(
            ("random", random_alike(name) if line["semi_supervised"] else "random", changed_from(name))
        )
        if other is not None
    ]
    compared = [(name, other, _between(report, name, other)) for name, other in pairs]
    return [_verdict(found, f"**{name}**", other) for name, other, found in compared if found is not None]


def _reference(report: Report) -> list[str]:
    full, unfit = report["full_supervision"], report["full_supervision_unfit"]
    if full is None or unfit is None:
        return []
    height = with_width(full["map_50"], full["map_50_half_width_95"])
    return [f"Full supervision ({height}) {unfit}: it is no reference, so how many labels reach it is left out."]


def _labels(name: str, line: dict[str, Any], report: Report) -> list[str]:
    """How many labels the line needs for what all of them, or random ones, bring."""
    full, found = report["full_supervision"], []
    if "100" in line["images_to_reach"]:
        target = f"full supervision ({full['map_50']:.3f} with all {full['images']} images)"
        found.append(_crossing(name, line, target, line["images_to_reach"]["100"], of="the pool"))
        if line["over_full_supervision"] is not None:
            by_cycle = ", ".join(signed(cycle) for cycle in line["over_full_supervision"])
            found[-1] += f" Minus full supervision of the same seed, by cycle: {by_cycle}."
    if line["images_to_reach_random"] is not None:
        said = _crossing(name, line, "random's last cycle", line["images_to_reach_random"], of="random")
        found.append(f"{said} (The paper: 1500 images do what 3000 do, 50 % of them, of a pool of 10,000.)")
    return found


def _crossing(name: str, line: dict[str, Any], target: str, reached: dict[str, Any], *, of: str) -> str:
    """Where the mean curve reaches the target for good, and where each seed's own curve does, if there are several."""
    first = line["annotated_images"][0]
    own = [
        "never" if images is None else f"at most {images}" if images == first else str(images)
        for images in reached["images_by_seed"]
    ]
    by_seed = f"; each seed by itself: {', '.join(own)}" if len(own) > 1 else ""
    if reached["images"] is None:
        alike = "; so does each seed's own" if len(own) > 1 and set(own) == {"never"} else by_seed
        return f"The mean curve of {name} ends below {target}{alike}."
    images, instances = percent(reached["share_of_images"]), percent(reached["share_of_instances"])
    at = "at or before" if reached["from_the_first_cycle"] else "at"
    return (
        f"The mean curve of {name} reaches {target} {at} {reached['images']} images ({images} of {of}'s images, "
        f"{instances} of its instances{by_seed})."
    )


def _gains(lines: Mapping[str, dict[str, Any]], semi_supervised: Sequence[str]) -> list[str]:
    found = [
        f"At the second cycle {name} is {signed(second)} mAP@0.5 against random (the paper: up to +0.10)."
        for name in semi_supervised
        if (second := lines[name]["second_cycle_over_random"]) is not None
    ]
    if "tsp" in lines and (last := lines["tsp"]["last_cycle_over_random"]) is not None:
        found.append(f"At the last cycle tsp alone is {signed(last)} against random (the paper: about +0.019 on CT).")
    return found


def _remarks(lines: Mapping[str, dict[str, Any]]) -> list[str]:
    """What one has to know to read a line."""
    found = []
    for name, line in lines.items():
        if line["semi_supervised"] and not any(cycle["instances"] for cycle in line["pseudo"]):
            found.append(f"{name}: no prediction was ever trusted, so there were no pseudo labels to learn from.")
        if (first := line["first_cycle_over_random"]) is not None:
            found.append(
                f"{name} is {signed(first)} against random in the first cycle already, on the same images: it trains "
                "another network, and its curve and area show that, too."
            )
    return found


def _ranges(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is alike for all lines: from the lowest to the highest of them."""
    ratios = [line["training_time_over_supervised"] for line in lines if line["training_time_over_supervised"]]
    gains = [100 * (line["rescored_map_50_95"] - line["map_50_95"][-1]) for line in lines]
    ranks = [line["mask_spearman"] for line in lines if line["mask_spearman"] is not None]
    found = []
    if ranks:
        found.append(f"m ranks the true mask IoU with a Spearman correlation of {span(ranks, '.2f')} (by line).")
    if gains:
        found.append(f"Ranking by c x m instead of c: {span(gains, '+z.1f')} points of mAP@[.5:.95] (by line).")
    if ratios:
        found.append(
            f"Trainings with pseudo labels take {span(ratios, '.2f')} times as long as those without, for as many "
            "steps (by line; the paper: 5.2 h for three cycles against 4.8 h for one training)."
        )
    return found


def _verdict(comparison: dict[str, Any], one: str, other: str) -> str:
    """The same, better, worse or not told apart: by the t-test, before and after Holm's correction."""
    if not any(comparison["differences"]) and not comparison["same_choices"]:
        return f"{one} measures the same as {other} ({comparison['seeds']} seeds), from other images."
    if not any(comparison["differences"]):
        return f"{one} is the same as {other} ({comparison['seeds']} seeds): what it does otherwise changed nothing."
    difference, p = comparison["difference"], comparison["p_holm"]
    numbers = (
        f"{difference:+.3f} ± {comparison['half_width_95']:.3f} in area under the curve, {comparison['seeds']} seeds, "
        f"p {p_value(comparison['p'], equals=True)}, after Holm {p_value(p, equals=True)}"
    )
    direction = "better" if difference > 0 else "worse"
    if p < _SURE:
        return f"{one} is {direction} than {other} ({numbers})."
    if comparison["p"] < _SURE:
        return f"{one} looks {direction} than {other}, but not after correction for all comparisons ({numbers})."
    return f"{one} cannot be told apart from {other} ({numbers})."


def _doubts(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    if not comparisons:
        return ["No two finished lines can be compared yet: that takes two seeds of random and of another line."]
    few = [c for c in comparisons if c["smallest_sign_p"] > _SURE]
    if not few:
        return []
    seeds = max(c["seeds"] for c in few)
    return [
        f"With {seeds} seeds even {seeds} differences of one sign come by chance with p = {2 ** (1 - seeds):g}; "
        "the t-test can give less only by trusting that differences are normal. Take all p values here with care."
    ]


def _between(report: Report, one: str, other: str) -> dict[str, Any] | None:
    return next((c for c in report["comparisons"] if (c["one"], c["other"]) == (one, other)), None)
