import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from model.errors import RegistryError
from model.files import read_tensors, write_tensors
from model.registry import ModelCard, Registry
from tests.model.examples import image, tiny_network

PROJECT = "localhost-8080-12"


def card(network, version="v1", **changes):
    fields = {"created_at": "2024-05-01T10:00:00Z", "class_names": ("cell", "dot"), **changes}
    return ModelCard(version=version, network=network.config.to_json(), **fields)


@pytest.fixture(scope="module")
def network():
    return tiny_network().eval()


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "models")


def folder(registry, version="v1"):
    return registry.root / PROJECT / version


def detections(network):
    with torch.inference_mode():
        return network([image()])[0]


@pytest.mark.parametrize("options", [{}, {"weights": "imagenet"}], ids=["trained body", "frozen body"])
def test_a_version_comes_back_with_identical_outputs_and_its_card(options, registry):
    network = tiny_network(**options).eval()
    stored = card(network, parent="v0", data_fingerprint="ab12", metrics={"map_50": 0.4, "by_class": {"dot": None}},
                  training={"epochs": 3})  # fmt: skip
    registry.add(PROJECT, stored, network)
    registry.activate(PROJECT, "v1")
    loaded, its_card = Registry(registry.root).load(PROJECT, registry.active(PROJECT))
    assert its_card == stored
    assert loaded.config == network.config
    assert not loaded.training
    before, after = detections(network), detections(loaded)
    assert len(before["boxes"]) > 0
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_there_is_no_active_version_before_the_first_is_activated(registry, network):
    assert registry.active(PROJECT) is None
    registry.add(PROJECT, card(network), network)
    assert registry.active(PROJECT) is None
    registry.activate(PROJECT, "v1")
    assert registry.active(PROJECT) == "v1"


def test_the_active_version_can_go_forward_and_back(registry, network):
    for version in ("v1", "v2"):
        registry.add(PROJECT, card(network, version), network)
        registry.activate(PROJECT, version)
        assert registry.active(PROJECT) == version
    registry.activate(PROJECT, "v1")
    assert registry.active(PROJECT) == "v1"


def test_versions_are_listed_from_the_oldest_whatever_their_names(registry, network):
    assert registry.versions(PROJECT) == []
    for version, day in (("b", "02"), ("c", "01"), ("a", "03")):
        registry.add(PROJECT, card(network, version, created_at=f"2024-05-{day}T10:00:00Z"), network)
    assert registry.versions(PROJECT) == ["c", "b", "a"]


def test_projects_do_not_see_each_others_versions(registry, network):
    registry.add(PROJECT, card(network), network)
    registry.activate(PROJECT, "v1")
    assert registry.versions("other") == []
    assert registry.active("other") is None
    with pytest.raises(RegistryError, match="other has no version 'v1'; it has none"):
        registry.load("other", "v1")


def test_a_version_that_is_there_is_never_changed(registry, network):
    registry.add(PROJECT, card(network), network)
    files = {path.name: path.read_bytes() for path in folder(registry).iterdir()}
    other = tiny_network(seed=1)
    registry.add(PROJECT, card(other, metrics={"map_50": 1.0}), other)
    assert {path.name: path.read_bytes() for path in folder(registry).iterdir()} == files
    assert registry.card(PROJECT, "v1").metrics == {}


@pytest.mark.parametrize("ask", ["load", "card", "activate"])
def test_an_unknown_version_is_refused_and_the_known_ones_are_named(ask, registry, network):
    registry.add(PROJECT, card(network), network)
    registry.activate(PROJECT, "v1")
    with pytest.raises(RegistryError, match=r"has no version 'v9'; it has v1$"):
        getattr(registry, ask)(PROJECT, "v9")
    assert registry.active(PROJECT) == "v1"


@pytest.mark.parametrize("name", ["../v1", "..", ".", "", "a/b", "/etc", ".hidden", "v1\n", "a\0b", "v" * 101, "ä"])
def test_names_that_could_leave_the_folder_are_refused(name, registry, network, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for project, version in ((name, "v1"), (PROJECT, name)):
        with pytest.raises(RegistryError, match="expected a name of letters, digits"):
            registry.add(project, card(network, version), network)
        with pytest.raises(RegistryError, match="expected a name of letters, digits"):
            registry.load(project, version)
        with pytest.raises(RegistryError, match="expected a name of letters, digits"):
            registry.activate(project, version)
    with pytest.raises(RegistryError, match="expected a name of letters, digits"):
        registry.versions(name)
    with pytest.raises(RegistryError, match="expected a name of letters, digits"):
        registry.active(name)
    assert sorted(tmp_path.rglob("*")) == before


def weights_cut_off(path):
    weights = path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def weights_missing(path):
    (path / "weights.safetensors").unlink()


def weights_of_another_network(path):
    write_tensors(path / "weights.safetensors", {"x": torch.ones(1)}, {})


def one_tensor_missing(path):
    tensors, metadata = read_tensors(path / "weights.safetensors")
    tensors.pop("rpn.head.cls_logits.bias")
    write_tensors(path / "weights.safetensors", tensors, metadata)


def card_cut_off(path):
    (path / "card.json").write_text((path / "card.json").read_text()[:-5])


def card_of_another_form(path):
    (path / "card.json").write_text(json.dumps({"version": "v1"}))


def card_with_an_unknown_network_option(path):
    content = json.loads((path / "card.json").read_text())
    content["network"]["wings"] = 2
    (path / "card.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        weights_cut_off,
        weights_missing,
        weights_of_another_network,
        one_tensor_missing,
        card_cut_off,
        card_of_another_form,
        card_with_an_unknown_network_option,
    ],
)
def test_a_damaged_version_is_refused_by_name(damage, registry, network):
    registry.add(PROJECT, card(network), network)
    damage(folder(registry))
    with pytest.raises(RegistryError, match=f"version v1 of {PROJECT} is damaged"):
        registry.load(PROJECT, "v1")


def test_a_half_written_version_is_invisible_and_does_not_stand_in_the_way(registry, network):
    registry.add(PROJECT, card(network), network)
    half = registry.root / PROJECT / ".v2.0123.unfinished"
    half.mkdir()
    for path in folder(registry).iterdir():
        (half / path.name).write_bytes(path.read_bytes())
    assert registry.versions(PROJECT) == ["v1"]
    registry.add(PROJECT, card(network, "v2"), network)
    assert set(registry.versions(PROJECT)) == {"v1", "v2"}


def test_a_version_that_cannot_be_written_leaves_nothing_behind(registry, network):
    with pytest.raises(ValueError, match="JSON"):
        registry.add(PROJECT, card(network, metrics={"map_50": float("nan")}), network)
    assert registry.versions(PROJECT) == []
    assert list((registry.root / PROJECT).iterdir()) == []


def test_threads_that_add_the_same_version_at_once_store_one_of_them_whole(registry):
    networks = [tiny_network(seed=seed) for seed in range(4)]
    start, errors = threading.Barrier(len(networks)), []

    def add(network, number):
        start.wait()
        try:
            registry.add(PROJECT, card(network, metrics={"number": number}), network)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(network, number)) for number, network in enumerate(networks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    loaded, its_card = registry.load(PROJECT, "v1")
    expected = networks[its_card.metrics["number"]].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert [path.name for path in (registry.root / PROJECT).iterdir()] == ["v1"]


ADD = """
    import sys
    from pathlib import Path
    from tests.model.examples import tiny_network
    from model.registry import ModelCard, Registry

    network, registry = tiny_network(seed=1), Registry(Path(sys.argv[1]))
    card = ModelCard(version="v1", network=network.config.to_json(), class_names=(), created_at="", metrics={"seed": 1})
    print("ready", flush=True)
    sys.stdin.readline()
    registry.add("localhost-8080-12", card, network)
"""


def test_processes_that_add_the_same_version_at_once_store_one_of_them_whole(registry):
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ADD), str(registry.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    with other:
        network = tiny_network(seed=2)
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        registry.add(PROJECT, card(network, metrics={"seed": 2}), network)
    assert other.returncode == 0
    loaded, its_card = registry.load(PROJECT, "v1")
    expected = tiny_network(seed=its_card.metrics["seed"]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert [path.name for path in (registry.root / PROJECT).iterdir()] == ["v1"]
