"""Kinds of numbers and files that commands take."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def positive_number(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def file_called(suffix: str) -> Callable[[str], Path]:
    """The path of a file to write whose name ends so, in small or capital letters."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise ArgumentTypeError(f"expected a file whose name ends in {suffix}, got the folder {text!r}")
        if path.suffix.lower() != suffix:
            raise ArgumentTypeError(f"expected a file whose name ends in {suffix}, got {text!r}")
        return path

    return read


def folder_to_write(text: str) -> Path:
    """The path of a folder, which need not be there yet."""
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ArgumentTypeError(f"expected a folder, got {text!r}, where {part} is a file")
    return path


def from_0_to_1(text: str) -> float:
    """A number in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or number < least:
        raise ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number
