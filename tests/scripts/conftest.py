"""Phantoms that the tests of the benchmark share."""

from pathlib import Path

import pytest
import torch

from model.dataset import LabeledSet, read_coco
from scripts.benchmark_sets import Data
from scripts.make_phantoms import make_phantoms


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of twelve phantoms."""
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, images=12, size=64, seed=0)
    return folder


@pytest.fixture(scope="session")
def sets(data: Path) -> Data:
    """Nine of them as the pool, three as the test set."""
    everything = read_coco(data / "annotations.json")
    pool, test = everything.images[:9], everything.images[9:]
    parts = [LabeledSet(images=part, class_names=everything.class_names) for part in (pool, test)]
    return Data(name="phantoms", pool=parts[0], test=parts[1])
