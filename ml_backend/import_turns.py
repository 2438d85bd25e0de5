"""Large imports into Label Studio take turns, in all workers of a database: each costs it some 20 times its size of
memory, which is granted for one (docs/decisions/081)."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ml_backend.claims import Claims
from ml_backend.cycle_log import CycleLog

logger = logging.getLogger(__name__)

_TURN = "large-import"  # among the claims; no project, chunk or worker has such a name
_SMALL_BYTES = 8_000_000  # 750 predictions of 15 polygons; Label Studio has room for some such beside the largest
_LOOK_EVERY_SECONDS = 0.5
_TELL_EVERY_SECONDS = 10.0


class ImportTurns:
    """Safe to share between threads. Without claims, only this process takes turns."""

    def __init__(self, claims: Claims | None = None) -> None:
        self._claims = claims
        self._here = threading.Lock()  # a claim is the whole process's, whose threads import as well

    @contextmanager
    def turn(self, size: int, *, log: CycleLog | None = None) -> Iterator[None]:
        """The block sends a request of `size` bytes: a large one when no other is under way, a small one at once.

        A long wait is told in `log`, which may end it by a TSPError: the project was forgotten. Whoever has the turn
        waits for no claim, and that of a dead process is free.
        """
        if size <= _SMALL_BYTES:
            yield
            return
        self._wait(log)
        try:
            yield
        finally:
            self._leave()

    def _wait(self, log: CycleLog | None) -> None:
        tell_at, is_told = time.monotonic() + _TELL_EVERY_SECONDS, False
        while not self._take():
            time.sleep(_LOOK_EVERY_SECONDS)
            if time.monotonic() < tell_at:
                continue
            tell_at = time.monotonic() + _TELL_EVERY_SECONDS
            if not is_told:
                logger.info("a large import into Label Studio waits for another one to end")
            is_told = True
            if log:
                log.check_wanted()
                log.wait("another large import into Label Studio is under way, which has no memory for two at once.")
        if is_told and log:
            log.go_on()

    def _take(self) -> bool:
        if not self._here.acquire(blocking=False):
            return False
        is_ours = False
        try:
            is_ours = self._claims is None or self._claims.take(_TURN)
        finally:
            if not is_ours:
                self._here.release()
        return is_ours

    def _leave(self) -> None:
        try:
            if self._claims:
                self._claims.release(_TURN)
        finally:
            self._here.release()
