"""`train` by several processes of this machine, which are started here and end with whoever asked for them."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import errors
from model.config import NetworkConfig, PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, read_coco, write_coco
from model.distributed import Ranks
from model.errors import InvalidInputError, TrainingProcessError, TSPError
from model.files import read_tensors, write_json, write_tensors
from model.network import MaskRCNNWithScores
from model.train import Progress, load_trained, train
from model.types import FloatArray, LabeledImage

logger = logging.getLogger(__name__)

_MOST_STARTS = 3  # without a step in between


def train_in_processes(
    network: MaskRCNNWithScores,
    images: Sequence[LabeledImage],
    config: TrainingConfig,
    *,
    processes: int,
    checkpoint: Path,
    pseudo: PseudoLabelConfig | None = None,
    class_thresholds: FloatArray | None = None,
    device: str = "cpu",
    on_step: Callable[[Progress], None] | None = None,
) -> Progress | None:
    """`model.train.train` by so many processes, on "cuda" each on a GPU of its own; see there and `model.distributed`.

    A process that dies ends the others; all are started again and go on from the checkpoint. Raises what `train`
    raises, InvalidInputError for more processes than images in a step, and TrainingProcessError when processes die
    again and again.
    """
    if processes > config.batch_size:
        raise InvalidInputError(
            f"processes: expected at most batch_size ({config.batch_size}), since each needs an image in every step, "
            f"got {processes}"
        )
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix="together-") as place:
        job = Path(place)
        _hand_over(job, network, images, config, pseudo, class_thresholds, checkpoint, device, processes)
        progress = _until_done(job, processes, on_step)
    load_trained(network.to(device), checkpoint)
    return progress


def _hand_over(
    job: Path,
    network: MaskRCNNWithScores,
    images: Sequence[LabeledImage],
    config: TrainingConfig,
    pseudo: PseudoLabelConfig | None,
    class_thresholds: FloatArray | None,
    checkpoint: Path,
    device: str,
    processes: int,
) -> None:
    """Write down everything that a process needs."""
    class_names = tuple(str(label) for label in range(1, network.config.num_classes))
    write_coco(job / "images.json", LabeledSet(images=tuple(images), class_names=class_names))
    write_tensors(job / "network.safetensors", network.state_dict(), {})
    described = {
        "network": network.config.to_json(),
        "frozen": [name for name, parameter in network.named_parameters() if not parameter.requires_grad],
        "training": asdict(config),
        "pseudo": None if pseudo is None else asdict(pseudo),
        "class_thresholds": None if class_thresholds is None else class_thresholds.tolist(),
        "checkpoint": str(checkpoint.absolute()),
        "device": device,
        "threads": max(1, torch.get_num_threads() // processes),
    }
    write_json(job / "job.json", described)


def _until_done(job: Path, processes: int, on_step: Callable[[Progress], None] | None) -> Progress | None:
    """Start the processes until they have come to the end."""
    starts, newest = 0, None
    while True:
        before = newest
        code, newest = _run(job, processes, on_step, newest)
        if code == 0:
            return newest
        starts = 1 if newest != before else starts + 1
        if starts >= _MOST_STARTS:
            raise TrainingProcessError(
                f"one of {processes} training processes ended {starts} times without a step (exit code {code}); its "
                "own messages stand above. Was memory short? The checkpoint is as it was."
            )
        logger.warning("one of %d training processes ended with %d; all go on from the checkpoint", processes, code)


def _run(
    job: Path, processes: int, on_step: Callable[[Progress], None] | None, newest: Progress | None
) -> tuple[int, Progress | None]:
    """Start the processes once; the exit code, and the newest progress. Raises the error that one of them reports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    started = subprocess.Popen(
        [*command, "-m", "model.together", str(job)],
        stdin=subprocess.PIPE,  # its end tells them that we have ended
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in started.stdout or ():
            said = json.loads(line)
            if "error" in said:
                raise getattr(errors, said["error"])(said["message"])
            newest = Progress(**said)
            if on_step:
                on_step(newest)
        return started.wait(), newest
    finally:
        if started.stdin:
            started.stdin.close()
        if started.stdout:
            started.stdout.close()
        started.wait()


def main() -> None:
    """One of the processes, started by torchrun: `python -m model.together <folder>`."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    job = Path(sys.argv[1])
    described = json.loads((job / "job.json").read_text())
    torch.set_num_threads(described["threads"])
    device = Ranks.local_device(described["device"])
    ranks = Ranks.join(device=device)
    try:
        _train(job, described, ranks, device)
    except TSPError as error:
        _say({"error": type(error).__name__, "message": str(error)})
        raise SystemExit(1) from error
    ranks.leave()


def _train(job: Path, described: dict[str, Any], ranks: Ranks, device: str) -> None:
    network = MaskRCNNWithScores(NetworkConfig.from_json(described["network"]))
    network.load_state_dict(read_tensors(job / "network.safetensors")[0])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in described["frozen"])
    training, thresholds = described["training"], described["class_thresholds"]
    train(
        network,
        read_coco(job / "images.json", Path("/")).images,
        TrainingConfig(**{**training, "milestones": tuple(training["milestones"])}),
        pseudo=None if described["pseudo"] is None else PseudoLabelConfig(**described["pseudo"]),
        class_thresholds=None if thresholds is None else np.array(thresholds),
        checkpoint=Path(described["checkpoint"]),
        device=device,
        ranks=ranks,
        on_step=(lambda progress: _say(asdict(progress))) if ranks.rank == 0 else None,
    )


def _say(words: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(words) + "\n")  # in one piece: other processes write to the same pipe
    sys.stdout.flush()


def _end_with_stdin() -> None:
    """The process that started us keeps the other end of the pipe: it closes when that one ends, however it does."""
    while os.read(0, 1):  # not sys.stdin, whose lock Python wants back when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
