"""How long the rest of a stage takes, by the pace at which its steps have gone lately."""

from collections import deque
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

_WINDOW_SECONDS = 300.0  # what was longer ago no longer counts: other processes come and go
_LEAST_SECONDS = 10.0  # that must have been measured before anything is said
_LEAST_MARKS = 4
_STILL_SECONDS = 10.0
_STILL_PAUSES = 3.0  # of the longest one between two signs of progress: the next sign is overdue


class Pace:
    """The pace of one stage, of which `mark` is told now and then."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def mark(self, at_seconds: float, done: int) -> dict[str, float] | None:
        """So many steps are done at this time of a clock that never goes back. Returns "seconds_per_step" and
        "pause_seconds" (the longest between two marks), None while too little was seen."""
        marks = self._marks
        if marks and done < marks[-1][1]:  # the stage began anew
            marks.clear()
        marks.append((at_seconds, done))
        while len(marks) > _LEAST_MARKS and marks[1][0] <= at_seconds - _WINDOW_SECONDS:
            marks.popleft()
        (began_at, before), (now, after) = marks[0], marks[-1]
        if len(marks) < _LEAST_MARKS or now - began_at < _LEAST_SECONDS or after == before:
            return None
        longest = max(later - earlier for (earlier, _), (later, _) in pairwise(marks))
        return {"seconds_per_step": (now - began_at) / (after - before), "pause_seconds": longest}


def seconds_left(pace: Mapping[str, Any] | None, steps: int, *, now: str) -> float | None:
    """For so many steps by a pace, which also says when it was measured ("at", like `now` by `Database.now`).

    None while the pace is not known, when progress stands still, and when no step is left.
    """
    if not pace or steps <= 0:
        return None
    silent = max(0.0, (datetime.fromisoformat(now) - datetime.fromisoformat(pace["at"])).total_seconds())
    if silent > max(_STILL_SECONDS, _STILL_PAUSES * pace["pause_seconds"]):
        return None
    return float(max(0.0, steps * pace["seconds_per_step"] - silent))


def duration_in_words(seconds: float) -> str:
    """A time to wait, no more precise than such an estimate is."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    if minutes < 60:
        return f"about {minutes} min"
    hours, tens = divmod(round(minutes / 10), 6)
    return f"about {hours} h {tens}0 min" if tens and hours < 10 else f"about {round(minutes / 60)} h"
