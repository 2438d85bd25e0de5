"""Files that several processes of a benchmark share: locks on them, and pictures."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray

from model.files import write_bytes


@contextmanager
def locked(path: Path, *, wait: bool = True, on_wait: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold the lock of a file, which is made for it; without `wait`, say at once whether it could be had. `on_wait` is
    called before another process is waited for.

    The file stays: another process may have it open, and a new one would be a second lock.
    """
    with path.open("ab") as file:
        held = _taken(file, fcntl.LOCK_NB)
        if not held and wait:
            on_wait()
            held = _taken(file, 0)
        yield held


def _taken(file: IO[bytes], options: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | options)
    except BlockingIOError:
        return False
    return True


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Replace `path` by a picture (H, W, 3) uint8 RGB, in one step."""
    write_bytes(path, cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes())
