"""Versions in a store: what one machine adds, others load."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ml_backend.store import Store
from ml_backend.stored_registry import StoredRegistry
from model.errors import RegistryError
from model.registry import Registry
from scripts.tiny_version import tiny_version
from tests.ml_backend.examples import KEY, VERSION

Machine = Callable[..., Store]  # by the name of its MODEL_DIR


def test_a_version_of_one_machine_is_loaded_by_another(machine: Machine, tmp_path: Path) -> None:
    made, asked = (StoredRegistry(tmp_path / name / "versions", machine(name)) for name in ("here", "there"))
    assert (asked.active(KEY), asked.versions(KEY)) == (None, [])
    card, network = tiny_version(VERSION, ("cell", "lesion"))
    made.add(KEY, card, network)
    made.activate(KEY, VERSION)
    assert (asked.active(KEY), asked.versions(KEY)) == (VERSION, [VERSION])
    asked.check(KEY, VERSION)
    assert not (asked.root / KEY / VERSION / "weights.safetensors").exists()  # only when it is to look at images
    loaded, its_card = asked.load(KEY, VERSION)
    assert its_card == card
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert {path.name for path in (made.root / KEY).iterdir()} == {VERSION}
    assert Registry(made.root).load(KEY, VERSION)[1] == card  # the folder is what it is without a store


def test_a_version_that_is_there_is_not_made_again(machine: Machine, tmp_path: Path) -> None:
    first, second = (StoredRegistry(tmp_path / name / "versions", machine(name)) for name in ("here", "there"))
    card, network = tiny_version(VERSION, ("cell", "lesion"))
    first.add(KEY, card, network)
    second.add(KEY, *tiny_version(VERSION, ("cell",)))
    assert second.load(KEY, VERSION)[1] == card


def test_weights_that_differ_from_the_stores_are_fetched_again(machine: Machine, tmp_path: Path) -> None:
    registry = StoredRegistry(tmp_path / "here" / "versions", machine("here"))
    registry.add(KEY, *tiny_version(VERSION, ("cell", "lesion")))
    weights = registry.root / KEY / VERSION / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    registry.load(KEY, VERSION)
    assert weights.read_bytes() == whole


def test_weights_that_are_damaged_in_the_store_are_told(machine: Machine, tmp_path: Path) -> None:
    store = machine("here")
    registry = StoredRegistry(tmp_path / "here" / "versions", store)
    registry.add(KEY, *tiny_version(VERSION, ("cell", "lesion")))
    weights = registry.root / KEY / VERSION / "weights.safetensors"
    store.write(weights, b"something else")
    registry.load(KEY, VERSION)  # those here are whole
    weights.unlink()
    with pytest.raises(RegistryError, match=r"is damaged: .*weights.safetensors is damaged: its SHA-256 is not"):
        registry.load(KEY, VERSION)
    store.remove(weights)
    with pytest.raises(RegistryError, match=r"the store lacks weights.safetensors"):
        registry.check(KEY, VERSION)
    with pytest.raises(RegistryError, match=r"the store has no weights.safetensors of it"):
        registry.load(KEY, VERSION)


@pytest.mark.parametrize("pointer", [b'{"version": "../../../elsewhere"}', b"[]", b"{}", b"tsp-1"])
def test_a_pointer_that_names_no_version_is_told(tmp_path: Path, pointer: bytes) -> None:
    (tmp_path / "shared").mkdir()
    store = Store(f"file://{tmp_path}/shared", tmp_path / "here")
    registry = StoredRegistry(tmp_path / "here" / "versions", store)
    store.write(registry.root / KEY / "active.json", pointer)
    with pytest.raises(RegistryError, match=r"active.json of .* is damaged|expected a name of letters"):
        registry.active(KEY)


def test_a_model_dir_that_was_copied_into_the_store_is_used(machine: Machine, tmp_path: Path) -> None:
    old = Registry(tmp_path / "here" / "versions")
    old.add(KEY, *tiny_version(VERSION, ("cell", "lesion")))
    old.activate(KEY, VERSION)
    store = machine("here")
    files = list(old.root.rglob("*.*"))
    for path in files:
        store.upload(path)
    card = old.root / KEY / VERSION / "card.json"
    store.upload(card.parent.with_name(f".{VERSION}.0.unfinished") / card.name, source=card)  # of a killed worker
    registry = StoredRegistry(tmp_path / "there" / "versions", machine("there"))
    assert (registry.active(KEY), registry.versions(KEY)) == (VERSION, [VERSION])
    registry.load(KEY, VERSION)


def test_versions_that_are_removed_while_they_are_listed_are_left_out(machine: Machine, tmp_path: Path) -> None:
    registry = StoredRegistry(tmp_path / "here" / "versions", machine("here"))
    registry.add(KEY, *tiny_version(VERSION, ("cell", "lesion")))
    web = machine("there", remembers_seconds=3600.0)
    asked = StoredRegistry(tmp_path / "there" / "versions", web)
    assert web.names(asked.root / KEY)  # are remembered
    machine("here").remove(registry.root / KEY)
    assert asked.versions(KEY) == []
    with pytest.raises(RegistryError, match=rf"{KEY} has no version '{VERSION}'; it has none"):
        asked.load(KEY, VERSION)


def test_a_version_is_added_while_a_web_process_of_the_same_folder_asks_for_it(
    machine: Machine, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks after each step, as soon as it could: also right after something was removed."""
    web = StoredRegistry(tmp_path / "here" / "versions", machine("here"))
    found: list[str] = []

    class Watched(Store):
        def upload(self, path: Path, *, source: Path | None = None) -> None:
            super().upload(path, source=source)
            found.extend(web.versions(KEY))

    def remove(path: Path, *, ignore_errors: bool) -> None:
        rmtree(path, ignore_errors=ignore_errors)
        found.extend(web.versions(KEY))

    rmtree = shutil.rmtree
    monkeypatch.setattr("ml_backend.stored_registry.shutil.rmtree", remove)
    card, network = tiny_version(VERSION, ("cell", "lesion"))
    of_forgotten = web.root / KEY / VERSION / "weights.safetensors"
    of_forgotten.parent.mkdir(parents=True)
    of_forgotten.write_bytes(b"older")
    StoredRegistry(web.root, Watched(store_url, tmp_path / "here")).add(KEY, card, network)
    assert VERSION in found
    assert Registry(web.root).load(KEY, VERSION)[1] == card
    assert {path.name for path in (web.root / KEY / VERSION).iterdir()} == {"card.json", "weights.safetensors"}
    assert {path.name for path in (web.root / KEY).iterdir()} == {VERSION}


_KILLED = """
import os, signal, sys
from pathlib import Path
from ml_backend.store import Store
from ml_backend.stored_registry import StoredRegistry
from scripts.tiny_version import tiny_version

class DyingStore(Store):
    def upload(self, path, **options):
        if path.name == "card.json":
            os.kill(os.getpid(), signal.SIGKILL)
        super().upload(path, **options)

url, folder, key, version = sys.argv[1:]
registry = StoredRegistry(Path(folder) / "versions", DyingStore(url, Path(folder)))
registry.add(key, *tiny_version(version, ("cell", "lesion")))
"""


def test_a_version_whose_worker_was_killed_before_its_card_is_not_there_and_is_made_again(
    machine: Machine, store_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    command = [sys.executable, "-c", _KILLED, store_url, str(folder), KEY, VERSION]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    here, there = (StoredRegistry(tmp_path / name / "versions", machine(name)) for name in ("here", "there"))
    assert machine("here").names(here.root / KEY) == [f"{VERSION}/weights.safetensors", f"{VERSION}/weights.sha256"]
    for registry in (here, there):
        assert registry.versions(KEY) == []
        with pytest.raises(RegistryError, match=rf"{KEY} has no version '{VERSION}'; it has none"):
            registry.load(KEY, VERSION)
    card, network = tiny_version(VERSION, ("cell", "lesion"))
    here.add(KEY, card, network)
    assert there.load(KEY, VERSION)[1] == card
    assert {path.name for path in (here.root / KEY).iterdir()} == {VERSION}  # nothing of the killed worker's
