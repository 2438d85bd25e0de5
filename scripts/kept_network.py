"""The network that a run of `benchmark run --keep-networks` has kept, and the images that the run was made with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.network import MaskRCNNWithScores
from model.registry import ModelCard, Registry
from scripts.active_learning import KEPT
from scripts.benchmark_runs import read_run
from scripts.benchmark_sets import Data, read_data


@dataclass(frozen=True, kw_only=True)
class KeptNetwork:
    """The network of a run's last cycle, the run's pool and test images, and what its run.json says."""

    network: MaskRCNNWithScores
    card: ModelCard
    data: Data
    state: dict[str, Any]


def load_kept(run: Path, data_folder: Path) -> KeptNetwork:
    """Raises ValueError, which says how to mend it, when there is no such run, or it was made with other images."""
    path = run / "run.json"
    if not path.exists():
        raise ValueError(f"{run}: expected the folder of a run of the benchmark, there is no run.json in it")
    state = read_run(path)
    settings = state["settings"]
    data = read_data(
        data_folder,
        pool_size=settings["pool_images"],
        test_size=settings["test_images"],
        crop=settings.get("crop"),  # older runs do not say it
        shared=run.resolve().parent / "shared",  # where the benchmark keeps its crops
        random_split=settings.get("random_split", False),
    )
    if data.fingerprints != (settings["pool"], settings["test"]):
        raise ValueError(
            f"{run} was made with other images than those in {data_folder}; its --data was called {settings['data']}"
        )
    versions = Registry(run).versions(KEPT)
    if not versions:
        raise ValueError(
            f"{run}: its network was not kept; delete the folder and make the run anew with --keep-networks"
        )
    network, card = Registry(run).load(KEPT, versions[-1])
    return KeptNetwork(network=network, card=card, data=data, state=state)
