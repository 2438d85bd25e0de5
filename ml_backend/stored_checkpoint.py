"""The checkpoint of a training in the object store, so that a worker on another machine goes on with it.

The newest two lie there in turn, and a small file says how far each is and which SHA-256 it has: one that was damaged,
or cut off by the end of a worker, is never trained on, and the other one is still there.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ml_backend.errors import StoreError, StoreUnavailableError
from ml_backend.service import Service
from ml_backend.store import Store, digest_of
from model.errors import DiskFullError
from model.files import NO_LINKS, naming_full_disk

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"  # of a cycle's folder here
_KEPT = ("checkpoint-1.safetensors", "checkpoint-2.safetensors")  # in the store, as is what follows
_INDEX = "checkpoint.json"
_HELD = ".checkpoint-to-share"  # of a cycle's folder here, while it is read
_EVERY_SECONDS = 300.0  # it is hundreds of megabytes


@dataclass(frozen=True)
class _Kept:
    """A checkpoint in the store, after so many steps."""

    name: str
    step: int
    sha256: str


@dataclass(frozen=True)
class _Index:
    """What the store has of a training, the furthest first."""

    kept: tuple[_Kept, ...] = ()

    @classmethod
    def of(cls, store: Store, folder: Path) -> "_Index":
        """Empty when there is none that can be read."""
        try:
            known = json.loads(store.read(folder / _INDEX) or b"{}")
            kept = [_Kept(str(one["name"]), int(one["step"]), str(one["sha256"])) for one in known.get("kept", ())]
            return cls(tuple(one for one in kept if one.name in _KEPT))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning(
                "%s of the store cannot be read, so that no checkpoint is taken from there: %s", _INDEX, error
            )
            return cls()

    def write(self, store: Store, folder: Path) -> None:
        store.write(folder / _INDEX, json.dumps(asdict(self)).encode())


def bring_checkpoint(service: Service, project_key: str, number: int) -> bool:
    """Make a cycle's checkpoint the furthest that the store has whole, unless the one here is as far. Whether it is
    that of a finished training; not when it does not say so, as those of older releases."""
    folder = service.cycle_folder(project_key, number)
    checkpoint = folder / CHECKPOINT
    if service.store is not None:
        _bring_furthest(service.store, folder, f"project {project_key}, cycle {number}")
    step, steps = _steps_of(checkpoint)
    return 0 < steps <= step


def _bring_furthest(store: Store, folder: Path, cycle: str) -> None:
    """`bring_checkpoint` from a store; `cycle` is what the log calls it."""
    checkpoint = folder / CHECKPOINT
    index = _Index.of(store, folder)
    (folder / _HELD).unlink(missing_ok=True)  # of a worker that was killed here
    useless = []
    for kept in index.kept:
        if kept.step <= _steps_of(checkpoint)[0]:
            break
        try:
            if store.download(folder / kept.name, sha256=kept.sha256, target=checkpoint):
                logger.info("%s: the training goes on after step %d", cycle, kept.step)
                break
            logger.warning("%s: the store has lost %s", cycle, kept.name)
            useless.append(kept)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s: an earlier checkpoint is taken: %s", cycle, error)
            useless.append(kept)
    if useless:
        _Index(tuple(one for one in index.kept if one not in useless)).write(store, folder)


class SharedCheckpoint:
    """Keeps the checkpoint of a training that runs, every few minutes, whether or not the store answers."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._store, self._folder = service.store, folder
        self._shared_at = time.monotonic()

    def after_step(self) -> None:
        """If it is time. The training waits neither for a store that is away nor for space."""
        if self._store is None or time.monotonic() - self._shared_at < _EVERY_SECONDS:
            return
        try:
            self._share()
        except (StoreUnavailableError, DiskFullError) as error:
            self._shared_at = time.monotonic()
            logger.warning("a checkpoint is only here until the next one: %s", error)

    def share_finished(self) -> None:
        """Keep that of a finished training, unless the store has it; StoreUnavailableError when it does not answer."""
        self._share()

    def drop(self) -> None:
        """The training begins anew."""
        if self._store is not None:
            _Index().write(self._store, self._folder)

    def _share(self) -> None:
        if self._store is None:
            return
        index = _Index.of(self._store, self._folder)
        with _held(self._folder / CHECKPOINT) as held:
            step, _ = _steps_of(held)
            if step > max((one.step for one in index.kept), default=0):
                best = index.kept[:1]
                name = next(name for name in _KEPT if name not in {one.name for one in best})
                self._store.upload(self._folder / name, source=held)
                kept = _Kept(name, step, digest_of(held))
                _Index((kept, *best)).write(self._store, self._folder)
        self._shared_at = time.monotonic()


@contextmanager
def _held(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint as it is now: the processes of a training replace it at any time. Nothing if there is none."""
    held = checkpoint.with_name(_HELD)
    held.unlink(missing_ok=True)
    try:
        if checkpoint.exists():
            with naming_full_disk(str(held), held.parent):
                try:
                    os.link(checkpoint, held)
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    shutil.copyfile(checkpoint, held)
        yield held
    finally:
        held.unlink(missing_ok=True)


def _steps_of(checkpoint: Path) -> tuple[int, int]:
    """How many steps a checkpoint holds, and how many its training has; 0 when there is none that says so."""
    try:
        with safe_open(checkpoint, framework="np") as file:
            metadata = file.metadata() or {}
            return int(metadata["step"]), int(metadata.get("steps", 0))
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0, 0
