"""How a version's predictions stand in Label Studio: under which name, and in which of the project's labels.

What is published under a name never changes its order or its labels. When the labelling configuration or the batch
changes, the version is published anew under its next name: complete before the queue switches, as a new version is.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ml_backend.label_config import LabelConfig
from ml_backend.service import Service

POOL = ".pool"  # a version's predictions outside of its batch stand under its name with this at the end
OUR_NAME = re.compile(rf"tsp-\d+-[0-9a-f]{{8}}(\.\d+)?({re.escape(POOL)})?")  # those of others are left alone


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One edition of a version's predictions. `config` was the project's when they were published; `class_names` are
    the model's."""

    version: str
    edition: int
    config: LabelConfig
    class_names: tuple[str, ...]
    batch_digest: str = ""

    @property
    def name(self) -> str:
        """The model version that Label Studio knows."""
        return self.version if self.edition == 0 else f"{self.version}.{self.edition}"

    @property
    def gone(self) -> list[str]:
        """The classes of the model that the configuration no longer has: their regions are not published."""
        return [name for name in self.class_names if self.config.class_of(name) is None]

    @property
    def unlearnt(self) -> list[str]:
        """The labels that the model does not know."""
        known = {self.config.class_of(name) for name in self.class_names}
        return [label for number, label in enumerate(self.config.labels, start=1) if number not in known]

    def draws_like(self, config: LabelConfig) -> bool:
        """Whether the same regions would be published with `config`."""
        return _drawn(self.config, self.class_names) == _drawn(config, self.class_names)

    def change_to(self, config: LabelConfig) -> str:
        """What is different with `config`, for people."""
        then = replace(self, config=config)
        changes = [f"the label {name!r} is gone" for name in then.gone if name not in self.gone]
        changes += [f"the label {name!r} is back" for name in self.gone if name not in then.gone]
        if self.config.from_name != config.from_name:
            changes.append(f"the control {self.config.from_name!r} is called {config.from_name!r}")
        if self.config.to_name != config.to_name:
            changes.append(f"the image {self.config.to_name!r} is called {config.to_name!r}")
        return "the labelling configuration has changed: " + (", ".join(changes) or "labels have other names")


def cycle_of(version: str) -> int:
    """The cycle that made a version, 0 when its name does not tell."""
    match = re.match(r"tsp-(\d+)-", version)
    return int(match[1]) if match else 0


def publication_of(service: Service, project_key: str, version: str) -> Publication | None:
    """The newest edition of a version; None before the first (or when an older release published it)."""
    path = service.publication_file(project_key, version)
    service.bring(path)
    if not path.exists():
        return None
    known = json.loads(path.read_text())
    return Publication(**{**known, "config": _config(known["config"]), "class_names": tuple(known["class_names"])})


def settle(
    service: Service, project_key: str, version: str, config: LabelConfig, batch: Sequence[int] = ()
) -> Publication:
    """The edition in which the version is to be published with this configuration and this batch: the newest one if it
    draws the same, else the next."""
    digest = hashlib.sha256(json.dumps(list(batch)).encode()).hexdigest() if batch else ""
    newest = publication_of(service, project_key, version)
    class_names = service.registry.card(project_key, version).class_names
    is_same = newest is not None and newest.draws_like(config) and newest.batch_digest == digest
    edition = 0 if newest is None else newest.edition + (not is_same)
    settled = Publication(version=version, edition=edition, config=config, class_names=class_names, batch_digest=digest)
    if settled != newest:
        service.keep_json(service.publication_file(project_key, version), asdict(settled))
    return settled


def _drawn(config: LabelConfig, class_names: Sequence[str]) -> tuple[Any, ...]:
    """The names that a region of each class has in Label Studio."""
    numbers = [config.class_of(name) for name in class_names]
    return config.from_name, config.to_name, [None if n is None else config.labels[n - 1] for n in numbers]


def _config(known: dict[str, Any]) -> LabelConfig:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
    return LabelConfig(**values)
