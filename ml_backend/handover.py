"""What a worker on another machine needs to go on with a cycle, through the object store. Without a store nothing of
this happens: MODEL_DIR is shared."""

from pathlib import Path

from ml_backend.service import Service
from ml_backend.stored_checkpoint import CHECKPOINT

_SNAPSHOT = ("training.json", "validation.json", "tasks.json", "recipe.json")  # in the order in which they are kept
_PSEUDO_LABELS = ("class_thresholds.json", "pseudo.json")


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


def bring_snapshot(service: Service, project_key: str, number: int) -> None:
    """Make a cycle's folder what the store has of it; a checkpoint of another training goes. Nothing happens when the
    store does not know the cycle."""
    folder = service.cycle_folder(project_key, number)
    if service.store is None or service.store.read(folder / _SNAPSHOT[-1]) is None:
        return
    changed = [name for name in (*_SNAPSHOT, *_PSEUDO_LABELS) if service.store.has_another(folder / name)]
    if changed:
        (folder / CHECKPOINT).unlink(missing_ok=True)  # first: who is cut off here finds that it is another one again
    for name in changed:
        service.store.refresh(folder / name)
