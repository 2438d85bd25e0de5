"""Numbers of the benchmark's report, as people read them."""

from collections.abc import Mapping, Sequence


def number(value: float | None, *, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def with_width(value: float, width: float) -> str:
    return f"{value:.3f} ± {width:.3f}" if width else f"{value:.3f}"


def signed(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return "-"
    width = f" ± {difference['half_width_95']:.3f}" if difference["seeds"] > 1 else ""
    return f"{difference['difference']:+.3f}{width}"


def count(how_many: int, unit: str) -> str:
    return f"{how_many} {unit}" if how_many == 1 else f"{how_many} {unit}s"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def p_value(value: float, *, equals: bool = False) -> str:
    return "< 0.001" if value < 0.001 else f"{'= ' if equals else ''}{value:.3f}"


def interval(values: Sequence[float] | None) -> str:
    return "-" if values is None else f"{values[0]:+.3f} to {values[1]:+.3f}"


def span(values: Sequence[float], form: str) -> str:
    lowest, highest = format(min(values), form), format(max(values), form)
    return lowest if lowest == highest else f"{lowest} to {highest}"
