"""`train` by several processes, of this machine and perhaps of others, which end with whoever asked for them."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from model import errors
from model.config import NetworkConfig, PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, read_coco, write_coco
from model.distributed import Ranks
from model.errors import InvalidInputError, TrainingProcessError, TSPError
from model.files import read_tensors, write_json, write_tensors
from model.machines import Connection, Meeting, command, end, environment, gathered, messages, orders
from model.network import MaskRCNNWithScores
from model.train import Progress, load_trained, train
from model.types import FloatArray, LabeledImage

logger = logging.getLogger(__name__)

_MOST_STARTS = 3  # without a step in between
_LAST_WORDS_SECONDS = 3.0  # of other machines


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
    meeting: Meeting | None = None,
    on_wait: Callable[[str], None] = logger.info,
) -> Progress | None:
    """`model.train.train` by so many processes, on "cuda" each on a GPU of its own; see there and `model.distributed`.

    With a `meeting`, on each of several machines (`model.machines`); `on_wait` is told once a second which are missing.
    A process, or a machine, that dies ends the others; all are started again and go on from the checkpoint. Raises what
    `train` raises, InvalidInputError for more processes than images in a step, and TrainingProcessError when processes
    die again and again.
    """
    in_all = processes * (meeting.machines if meeting else 1)
    if in_all > config.batch_size:
        raise InvalidInputError(
            f"processes: expected at most batch_size ({config.batch_size}) on all machines, since each needs an image "
            f"in every step, got {in_all}"
        )
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix="together-") as place:
        job = Path(place)
        _hand_over(job, network, images, config, pseudo, class_thresholds, checkpoint, device, processes)
        progress = _until_done(partial(_run, job, processes, on_step, meeting, on_wait), in_all)
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


def _until_done(
    run: Callable[[Progress | None], tuple[int | None, Progress | None]], processes: int
) -> Progress | None:
    """Start the processes until they have come to the end, however often a machine is lost."""
    starts, newest = 0, None
    while True:
        before = newest
        code, newest = run(newest)
        if code == 0:
            return newest
        if code is None:
            logger.warning("a machine that trained with this one is gone; the training goes on when there is another")
            continue
        starts = 1 if newest != before else starts + 1
        if starts >= _MOST_STARTS:
            raise TrainingProcessError(
                f"one of {processes} training processes ended {starts} times without a step (exit code {code}); its "
                "own messages stand above, or where its machine logs. Was memory short? The checkpoint is as it was."
            )
        logger.warning("one of %d training processes ended with %d; all go on from the checkpoint", processes, code)


def _run(
    job: Path,
    processes: int,
    on_step: Callable[[Progress], None] | None,
    meeting: Meeting | None,
    on_wait: Callable[[str], None],
    newest: Progress | None,
) -> tuple[int | None, Progress | None]:
    """Start the processes once; the exit code, None when a machine was lost, and the newest progress. Raises the error
    that one of them reports."""
    with ExitStack() as ends:
        others = ends.enter_context(gathered(meeting, on_wait)) if meeting else []
        ours, *theirs = orders(meeting, job=job, processes=processes)
        try:
            for other, order in zip(others, theirs, strict=True):
                other.say(order)
        except OSError:
            return None, newest
        started = ends.enter_context(_started(command(ours), environment(meeting.host) if meeting else None))
        lost: list[Connection] = []
        for said in _said(started, others, lost):
            if "error" in said:
                raise getattr(errors, said["error"])(said["message"])
            newest = Progress(**said)
            if on_step:
                on_step(newest)
        code = started.wait()
        return (None if lost and code else code), newest


@contextmanager
def _started(command: list[str], environment: dict[str, str] | None) -> Iterator["subprocess.Popen[str]"]:
    """Our processes, which end with the block."""
    pipe = subprocess.PIPE  # the end of stdin tells them that we have ended
    started = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        yield started
    finally:
        end(started)


def _said(
    started: "subprocess.Popen[str]", others: Sequence[Connection], lost: list[Connection]
) -> Iterator[dict[str, Any]]:
    """What processes say, ours and those of other machines, until ours end: they do when those of another machine have
    ended, or it is `lost`, which it is added to."""
    words: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def hear_ours() -> None:
        try:
            for said in messages(started):
                words.put(said)
        finally:
            words.put(None)

    def hear(other: Connection) -> None:
        try:
            while "ended" not in (said := other.hear()):
                words.put(said)
        except OSError:  # also when it is closed here, at the end
            if started.poll() is None:
                lost.append(other)
        end(started)

    threading.Thread(target=hear_ours, daemon=True).start()
    listening = [threading.Thread(target=hear, args=(other,), daemon=True) for other in others]
    for thread in listening:
        thread.start()
    while (said := words.get()) is not None:
        yield said
    if started.wait():  # perhaps because of an error that another machine is about to tell
        for thread in listening:
            thread.join(_LAST_WORDS_SECONDS)
        while not words.empty():
            if said := words.get():
                yield said


def main() -> None:
    """One of the processes, started by torchrun: `python -m model.together <folder>`."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    job = Path(sys.argv[1])
    described = json.loads((job / "job.json").read_text())
    torch.set_num_threads(described["threads"])
    list(Path(described["checkpoint"]).parent.iterdir())  # so that a network file system looks again what is there
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
