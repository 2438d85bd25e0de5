"""What a worker on another machine needs to go on with a cycle, through the object store. Without a store nothing of
this happens: MODEL_DIR is shared."""

import logging
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ml_backend.errors import StoreUnavailableError
from ml_backend.service import Service

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
_SNAPSHOT = ("training.json", "validation.json", "tasks.json", "recipe.json")  # in the order in which they are kept
_PSEUDO_LABELS = ("class_thresholds.json", "pseudo.json")
_STEP = "checkpoint.step"  # how far the kept checkpoint is
_CHECKPOINT_EVERY_SECONDS = 300.0  # it is hundreds of megabytes


def share_snapshot(service: Service, project_key: str, number: int) -> None:
    """Keep a new snapshot; what belonged to one whose record was lost is removed."""
    if service.store is None:
        return
    folder = service.cycle_folder(project_key, number)
    service.store.remove(folder)
    for name in _SNAPSHOT:
        service.store.upload(folder / name)


def share_pseudo_labels(service: Service, folder: Path) -> None:
    """Keep what the training of a cycle takes for pseudo labels."""
    for name in _PSEUDO_LABELS:
        service.share(folder / name)


def bring_snapshot(service: Service, project_key: str, number: int, *, with_checkpoint: bool = False) -> None:
    """Make a cycle's folder what the store has of it. The checkpoint here stays if it is of the same training and not
    behind the store's. Nothing happens when the store does not know the cycle."""
    folder = service.cycle_folder(project_key, number)
    if service.store is None or service.store.read(folder / _SNAPSHOT[-1]) is None:
        return
    changed = [name for name in (*_SNAPSHOT, *_PSEUDO_LABELS) if service.store.refresh(folder / name)]
    checkpoint = folder / CHECKPOINT
    if changed:
        checkpoint.unlink(missing_ok=True)
    kept = service.store.read(folder / _STEP) if with_checkpoint else None
    if kept and int(kept) > _step_of(checkpoint):
        logger.info("project %s: the training of cycle %d goes on after step %d", project_key, number, int(kept))
        service.store.download(checkpoint)


class SharedCheckpoint:
    """Keeps the checkpoint of a training that runs, every few minutes, whether or not the store answers."""

    def __init__(self, service: Service, folder: Path) -> None:
        self._store, self._folder = service.store, folder
        self._shared_at = time.monotonic()

    def after_step(self) -> None:
        """If it is time; a training does not wait for a store that is away."""
        if self._store is None or time.monotonic() - self._shared_at < _CHECKPOINT_EVERY_SECONDS:
            return
        try:
            self.share()
        except StoreUnavailableError as error:
            self._shared_at = time.monotonic()
            logger.warning("a checkpoint is only here until the next one: %s", error)

    def share(self) -> None:
        """Keep the checkpoint as it is now, unless the store has it; StoreUnavailableError when it does not answer."""
        if self._store is None:
            return
        checkpoint, kept = self._folder / CHECKPOINT, self._store.read(self._folder / _STEP)
        step = _step_of(checkpoint)
        if step > (int(kept) if kept else 0):
            self._store.upload(checkpoint)
            self._store.write(self._folder / _STEP, str(step).encode())
        self._shared_at = time.monotonic()

    def remove(self) -> None:
        """The training begins anew."""
        if self._store is not None:
            for name in (_STEP, CHECKPOINT):
                self._store.remove(self._folder / name)


def _step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint holds; 0 when there is none that can be read."""
    try:
        with safe_open(checkpoint, framework="np") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0
