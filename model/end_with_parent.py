"""Child processes that do not outlive us, however we end."""

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: little is safe between fork and exec


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """For a child, such as before its exec: Linux sends it this signal when the thread that started it ends, SIGKILL
    even when it stands still. Elsewhere nothing happens."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def end_with_stdin(*, after: float = 0.0) -> None:
    """For a child whose stdin is a pipe that its parent keeps open and writes nothing into: end it, with 1, so many
    seconds after the other end is closed, which it is when the parent ends, however it does."""

    def end() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock Python wants back when it ends
            pass
        time.sleep(after)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
