"""Two pieces of work in turn, so that a slow moment hits both."""

import time
from collections.abc import Callable

import numpy as np

Work = Callable[[], object]


def compare(
    ours: Work, theirs: Work, *, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each by a clock, CPU time unless told, and the median ratio; which goes first alternates, one
    round warms up."""
    seconds = []
    for number in range(rounds + 1):
        timed = {work: _seconds(work, clock) for work in ((ours, theirs) if number % 2 else (theirs, ours))}
        seconds.append((timed[ours], timed[theirs]))
    pairs = np.array(seconds[1:])
    return {
        "ours": float(np.median(pairs[:, 0])),
        "theirs": float(np.median(pairs[:, 1])),
        "ratio": float(np.median(pairs[:, 0] / pairs[:, 1])),
    }


def _seconds(work: Work, clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started
