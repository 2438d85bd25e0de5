"""How long the rest of a stage takes."""

from typing import Any

import pytest

from ml_backend.pace import Pace, duration_in_words, seconds_left

NOW = "2025-01-02T03:04:05.000000+00:00"
SOON = "2025-01-02T03:04:09.000000+00:00"


def marked(*marks: tuple[float, int]) -> dict[str, float] | None:
    """What is known after these (seconds, steps)."""
    pace, known = Pace(), None
    for at, done in marks:
        known = pace.mark(at, done)
    return known


def steady(count: int, *, every: float, begin: float = 0.0, first: int = 0) -> list[tuple[float, int]]:
    """One step at each mark."""
    return [(begin + i * every, first + i) for i in range(count)]


@pytest.mark.parametrize(
    "marks",
    [
        pytest.param([], id="nothing"),
        pytest.param([(0.0, 5)], id="a training that goes on at step 5"),
        pytest.param([(0.0, 5), (60.0, 6), (120.0, 7)], id="two steps"),
        pytest.param(steady(9, every=1.0), id="nine seconds"),
        pytest.param([(at, 5) for at in range(60)], id="no step"),
        pytest.param([*steady(60, every=1.0), (60.0, 1), (61.0, 2)], id="a stage that began anew"),
    ],
)
def test_the_pace_is_not_known_after(marks: list[tuple[float, int]]) -> None:
    assert marked(*marks) is None


def test_a_pace_is_the_time_by_the_steps_since_the_first_mark() -> None:
    assert marked((100.0, 40), (104.0, 42), (112.0, 43), (120.0, 50)) == {"seconds_per_step": 2.0, "pause_seconds": 8.0}


def test_what_is_long_ago_no_longer_counts() -> None:
    quick = steady(1000, every=1.0)
    slow = steady(40, every=10.0, begin=1000.0, first=1000)
    known = marked(*quick, *slow)
    assert known is not None
    assert known["seconds_per_step"] == pytest.approx(10.0)


def test_slow_steps_are_not_forgotten_before_they_say_something() -> None:
    assert marked(*steady(4, every=900.0)) == {"seconds_per_step": 900.0, "pause_seconds": 900.0}


QUICK = {"seconds_per_step": 2.0, "pause_seconds": 2.0, "at": NOW}
IN_BURSTS = QUICK | {"pause_seconds": 20.0}


@pytest.mark.parametrize(
    ("pace", "steps", "now", "left"),
    [
        pytest.param(None, 100, NOW, None, id="not known"),
        pytest.param(QUICK, 100, NOW, 200.0, id="100 steps of 2 s"),
        pytest.param(QUICK, 100, SOON, 196.0, id="4 s later"),
        pytest.param(QUICK, 1, SOON, 0.0, id="later than expected"),
        pytest.param(QUICK, 0, NOW, None, id="no step left"),
        pytest.param(QUICK, 100, "2025-01-02T03:04:16+00:00", None, id="progress stands still"),
        pytest.param(IN_BURSTS, 100, "2025-01-02T03:05:00+00:00", 145.0, id="between two bursts"),
        pytest.param(IN_BURSTS, 100, "2025-01-02T03:05:06+00:00", None, id="no further burst"),
        pytest.param(QUICK, 100, "2025-01-02T03:04:00+00:00", 200.0, id="a clock that was set back"),
    ],
)
def test_the_time_left_is_told_only_while_steps_come(
    pace: dict[str, Any] | None, steps: int, now: str, left: float | None
) -> None:
    assert seconds_left(pace, steps, now=now) == left


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "less than a minute"),
        (29.0, "less than a minute"),
        (50.0, "about 1 min"),
        (725.0, "about 12 min"),
        (3569.0, "about 59 min"),
        (3590.0, "about 1 h"),
        (4500.0, "about 1 h 20 min"),
        (7300.0, "about 2 h"),
        (35820.0, "about 10 h"),
        (93000.0, "about 26 h"),
    ],
)
def test_a_time_is_told_as_precisely_as_it_is_known(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words
