"""Trains by two processes, for long, and says so after the first step: `starts_others.py <COCO file> <checkpoint>`."""

import sys
from pathlib import Path

from model.config import TrainingConfig
from model.dataset import read_coco
from model.together import train_in_processes
from tests.model.examples import tiny_network

if __name__ == "__main__":
    train_in_processes(
        tiny_network(),
        read_coco(Path(sys.argv[1]), Path("/")).images,
        TrainingConfig(epochs=10_000),
        processes=2,
        checkpoint=Path(sys.argv[2]),
        on_step=lambda progress: print(f"step {progress.step}", flush=True),
    )
