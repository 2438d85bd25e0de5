"""One of several processes that train together, started by torchrun: `one_of_several.py <folder> <what dies>`.

Each step's loss goes into losses.jsonl, the weights of each process into weights-<rank>.safetensors. `<what dies>` is
"<rank>:<step>", a process that kills itself after that step, or "nobody".
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import read_coco
from model.distributed import Ranks
from model.files import write_tensors
from model.train import Progress, train
from tests.model.examples import tiny_network

folder, dies = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
ranks = Ranks.join()


def on_step(progress: Progress) -> None:
    if ranks.rank == 0:
        with (folder / "losses.jsonl").open("a") as lines:
            lines.write(json.dumps([progress.step, progress.loss, progress.losses]) + "\n")
    if dies == f"{ranks.rank}:{progress.step}":
        os.kill(os.getpid(), signal.SIGKILL)


config = TrainingConfig(**json.loads((folder.parent / "training.json").read_text()), milestones=(2, 4))
network = tiny_network(seed=ranks.rank, frozen_batch_norm=True)  # all begin with those of the first one
train(
    network,
    read_coco(folder.parent / "coco.json", Path("/")).images,
    config,
    pseudo=PseudoLabelConfig(class_threshold=0.0, box_threshold=0.0, mask_threshold=0.0) if config.ema_decay else None,
    checkpoint=folder / "checkpoint.safetensors",
    ranks=ranks,
    on_step=on_step,
)
write_tensors(folder / f"weights-{ranks.rank}.safetensors", network.state_dict(), {})
ranks.leave()
