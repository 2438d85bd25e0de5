"""Immutable model versions on disk, and for each project one pointer to the version in use.

<root>/<project>/<version>/weights.safetensors, card.json
<root>/<project>/active.json
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from model.config import NetworkConfig
from model.errors import RegistryError
from model.files import read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    from model.network import MaskRCNNWithScores

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of a version: enough to rebuild its network and to tell where it came from."""

    version: str
    network: dict[str, Any]  # NetworkConfig.to_json()
    class_names: tuple[str, ...]
    created_at: str  # ISO 8601, UTC
    parent: str | None = None  # the version that scored and pseudo-labelled for this one
    data_fingerprint: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    strategy: str = "tsp"  # of `model.strategies`: how its queue is ordered


class Registry:
    """The versions under one folder. Every method takes the project's key, such as "12-1700000000"."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, project: str, card: ModelCard, network: "MaskRCNNWithScores") -> None:
        """Store a version. Adding a version that is there already does nothing: versions never change."""
        folder = self._folder(project, card.version)
        if folder.exists():
            return
        unfinished = folder.with_name(f".{card.version}.{uuid4().hex}.unfinished")
        unfinished.mkdir(parents=True)
        try:
            write_tensors(unfinished / "weights.safetensors", network.state_dict(), {"version": card.version})
            write_json(unfinished / "card.json", asdict(card))
            unfinished.replace(folder)
        except OSError:
            if not folder.exists():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def load(self, project: str, version: str) -> "tuple[MaskRCNNWithScores, ModelCard]":
        """The network of a version, in evaluation mode on the CPU, and its card."""
        from model.network import MaskRCNNWithScores  # torch takes seconds; cards and pointers do not need it

        card = self.card(project, version)
        try:
            network = MaskRCNNWithScores(NetworkConfig.from_json(card.network))
            tensors, _ = read_tensors(self._folder(project, version) / "weights.safetensors")
            network.load_state_dict(tensors)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise RegistryError(f"version {version} of {project} is damaged: {error}") from error
        return network.eval(), card

    def card(self, project: str, version: str) -> ModelCard:
        """The card of a version."""
        path = self._folder(project, version) / "card.json"
        if not path.exists():
            known = ", ".join(self.versions(project)) or "none"
            raise RegistryError(f"{project} has no version {version!r}; it has {known}")
        try:
            card = json.loads(path.read_text())
            return ModelCard(**{**card, "class_names": tuple(card["class_names"])})
        except (KeyError, TypeError, ValueError) as error:
            raise RegistryError(f"version {version} of {project} is damaged: {path}: {error}") from error

    def check(self, project: str, version: str) -> None:
        """RegistryError unless all files of the version are there."""
        self.card(project, version)
        path = self._folder(project, version) / "weights.safetensors"
        if not path.exists():
            raise RegistryError(f"version {version} of {project} is damaged: {path} is missing; take another version")

    def versions(self, project: str) -> list[str]:
        """All versions, the oldest first."""
        folder = self._project_folder(project)
        if not folder.exists():
            return []
        cards = [path.parent.name for path in folder.glob("*/card.json") if not path.parent.name.startswith(".")]
        return sorted(cards, key=lambda version: self.card(project, version).created_at)

    def active(self, project: str) -> str | None:
        """The version in use, None before the first."""
        pointer = self._project_folder(project) / "active.json"
        return str(json.loads(pointer.read_text())["version"]) if pointer.exists() else None

    def activate(self, project: str, version: str) -> None:
        """Use this version from now on; readers see the old or the new one, nothing between."""
        self.card(project, version)
        write_json(self.root / project / "active.json", {"version": version})

    def _folder(self, project: str, version: str) -> Path:
        return self._project_folder(project) / _checked(version)

    def _project_folder(self, project: str) -> Path:
        return self.root / _checked(project)


def _checked(name: str) -> str:
    """A name that is safe as the name of a folder."""
    if not _NAME.fullmatch(name):
        raise RegistryError(f"expected a name of letters, digits, '.', '_' and '-', got {name!r}")
    return name
