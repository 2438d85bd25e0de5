"""What a run of the benchmark is at, while its cycles take minutes."""

import sys
import time


class SignsOfLife:
    """Prints a line to stderr now and then, once in `every_seconds` at most; `run` is in front of it."""

    def __init__(self, run: str, *, every_seconds: float = 30.0) -> None:
        self._run, self._every_seconds = run, every_seconds
        self._cycle = ""
        self._last = time.monotonic()

    def begin(self, cycle: str) -> None:
        """From now on the lines are about this cycle."""
        self._cycle, self._last = cycle, time.monotonic()

    def give(self, stage: str, done: int, total: int | None = None) -> None:
        """So many steps or images of a stage are done."""
        if time.monotonic() - self._last < self._every_seconds:
            return
        self._last = time.monotonic()
        share = done if total is None else f"{done} of {total}"
        self._say(f"{stage} {share}")

    def wait(self) -> None:
        """Another process is at what this run needs; told at once, for nothing more is said until it is there."""
        self._say("waits for a run that trains on the same images")

    def _say(self, what: str) -> None:
        # In one piece: other processes print as well.
        print(f"{self._run}, {self._cycle}: {what}\n", end="", file=sys.stderr, flush=True)
