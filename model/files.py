"""Files that are either whole or not there: nobody ever reads half of one, whenever the power goes."""

import errno
import glob
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

from model.errors import DiskFullError

_UNFINISHED = ".unfinished"
_ABANDONED_SECONDS = 86_400.0
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, SMB, and what else has no hard links


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step that survives a crash. Raises DiskFullError."""
    with naming_full_disk(f"{path} ({len(content) / 1e6:.1f} MB)", path.parent), replacement(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by JSON; NaN and infinity are refused (ValueError), for they are not JSON."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """What `write_json` writes."""
    return json.dumps(value, indent=1, allow_nan=False).encode()


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """Replace `path` by a safetensors file, with the rights that other files get (safetensors' own is its owner's)."""
    from safetensors.torch import save  # brings torch, which JSON files do not need

    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors and the metadata of a safetensors file; ValueError when it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from error


@contextmanager
def naming_full_disk(what: str, folder: Path) -> Iterator[None]:
    """Running out of space, or of a quota, while `what` is written into `folder` is a DiskFullError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(what, folder) from error


def disk_full(what: str, folder: Path) -> DiskFullError:
    """The error for something that finds no space in a folder."""
    return DiskFullError(
        f"no space for {what}: {shutil.disk_usage(folder).free / 1e6:.1f} MB are free on the disk of {folder}. Remove "
        "what is not needed there, or give it more space; what was there before is as it was."
    )


def create_private(path: Path, content: bytes) -> None:
    """Make a file that only this user may read; FileExistsError when there is one already. In one step where there are
    hard links; elsewhere it is empty for a moment."""
    unfinished = _unfinished(path)
    _write_new(unfinished, content)
    try:
        os.link(unfinished, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _write_new(path, content)
    finally:
        unfinished.unlink()


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which then takes its place; after an error it is gone and `path` as it was.

    Its name is nobody else's: two threads may replace the same file at once, and the last one wins.
    """
    unfinished = _unfinished(path)
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.replace(path)
        _sync(path.parent)  # a rename is on the disk only when its folder is
    finally:
        unfinished.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed while they replaced `path` have left a day ago, or before."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is one that takes the place of another when it is whole."""
    return name.startswith(".") and name.endswith(_UNFINISHED)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}{_UNFINISHED}")


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
