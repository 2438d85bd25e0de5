"""The versions of all machines, in the object store; the folder of `model.registry` is a cache of it."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ml_backend.errors import StoreError, StoreUnavailableError
from ml_backend.store import Store, digest_of
from model.errors import RegistryError
from model.files import remove_abandoned
from model.registry import ModelCard, Registry

if TYPE_CHECKING:
    from model.network import MaskRCNNWithScores

_WEIGHTS, _DIGEST, _CARD, _ACTIVE = "weights.safetensors", "weights.sha256", "card.json", "active.json"


class StoredRegistry(Registry):
    """A version is there when its card is, which is written last. Methods raise StoreUnavailableError, too."""

    def __init__(self, root: Path, store: Store) -> None:
        super().__init__(root)
        self._store = store

    def add(self, project: str, card: ModelCard, network: "MaskRCNNWithScores") -> None:
        """Store a version: weights first, card last. Adding one that is there already does nothing, whichever machine
        made it."""
        folder = self._folder(project, card.version)
        if self._store.read(folder / _CARD) is not None:
            return
        # Under its own name it would be seen here before it is in the store.
        unfinished = Registry(self._project_folder(project) / ".unfinished")
        made = unfinished.root / project / card.version
        shutil.rmtree(unfinished.root, ignore_errors=True)  # of a worker that was killed here
        unfinished.add(project, card, network)
        self._store.upload(folder / _WEIGHTS, source=made / _WEIGHTS)
        self._store.write(folder / _DIGEST, digest_of(made / _WEIGHTS).encode())
        self._store.upload(folder / _CARD, source=made / _CARD)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_WEIGHTS, _CARD):  # one by one: from now on, another process may bring the card into the folder
            (made / name).replace(folder / name)
        shutil.rmtree(unfinished.root, ignore_errors=True)

    def load(self, project: str, version: str) -> "tuple[MaskRCNNWithScores, ModelCard]":
        """As `Registry.load`; the weights are fetched unless those here are the store's."""
        self.card(project, version)
        weights = self._folder(project, version) / _WEIGHTS
        kept = self._store.read(weights.with_name(_DIGEST))  # none of a version that was copied there by hand
        sha256 = kept.decode(errors="replace").strip() if kept else None
        if not weights.exists() or (sha256 and digest_of(weights) != sha256):
            remove_abandoned(weights)
            try:
                found = self._store.download(weights, sha256=sha256)
            except StoreUnavailableError:
                raise
            except StoreError as error:
                raise RegistryError(f"version {version} of {project} is damaged: {error}; take another") from error
            if not found:
                raise RegistryError(f"version {version} of {project} is damaged: the store has no {_WEIGHTS} of it")
        return super().load(project, version)

    def card(self, project: str, version: str) -> ModelCard:
        """As `Registry.card`; fetched once."""
        self._has_card(project, version)
        return super().card(project, version)

    def check(self, project: str, version: str) -> None:
        """RegistryError unless the store has all files of the version."""
        self.card(project, version)
        names = self._store.names(self._folder(project, version))
        if missing := {_WEIGHTS, _CARD} - set(names):
            raise RegistryError(
                f"version {version} of {project} is damaged: the store lacks {', '.join(sorted(missing))}; take another"
            )

    def versions(self, project: str) -> list[str]:
        """All versions in the store, the oldest first."""
        paths = [Path(name) for name in self._store.names(self._project_folder(project))]
        found = [path.parent.name for path in paths if len(path.parts) == 2 and path.name == _CARD]
        # Half of a version may have been copied there by hand; what was listed may be gone.
        there = [version for version in found if not version.startswith(".") and self._has_card(project, version)]
        return sorted(there, key=lambda version: self.card(project, version).created_at)

    def active(self, project: str) -> str | None:
        """The version in use, None before the first."""
        pointer = self._store.recall(self._project_folder(project) / _ACTIVE)
        if pointer is None:
            return None
        try:
            return self._folder(project, str(json.loads(pointer)["version"])).name  # it becomes a part of paths
        except (KeyError, TypeError, ValueError) as error:
            raise RegistryError(f"{_ACTIVE} of {project} is damaged: {error}; make a version the active one") from error

    def activate(self, project: str, version: str) -> None:
        """Use this version from now on; every reader sees the old or the new one."""
        self.card(project, version)
        self._store.write(self._project_folder(project) / _ACTIVE, json.dumps({"version": version}).encode())

    def _has_card(self, project: str, version: str) -> bool:
        """Whether the card is here, from now on if the store has it."""
        path = self._folder(project, version) / _CARD
        return path.exists() or self._store.download(path)
