"""`train` by several processes, of this machine and perhaps of others, which end with whoever asked for them."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch

from model import errors
from model.config import NetworkConfig, PseudoLabelConfig, TrainingConfig
from model.dataset import LabeledSet, read_coco, write_coco
from model.distributed import Ranks
from model.end_with_parent import end_with_parent, end_with_stdin
from model.errors import InvalidInputError, TrainingProcessError, TSPError
from model.files import read_tensors, write_json, write_tensors
from model.machines import Connection, Meeting, Roll, command, end, environment, gathered, messages, orders
from model.network import MaskRCNNWithScores
from model.train import Progress, is_trained, load_trained, train
from model.types import FloatArray, LabeledImage

logger = logging.getLogger(__name__)

JOB = "together-"  # what the names of folders with what processes need begin with, beside the checkpoint
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
    A process, or a machine, that dies ends the others, and so does a machine that stands still; all are started again
    and go on from the checkpoint. When that is complete, nobody is waited for and None returned. Raises what `train`
    raises, InvalidInputError for more processes than images in a step or annotated ones, and TrainingProcessError when
    processes die again and again.
    """
    in_all = processes * (meeting.machines if meeting else 1)
    if in_all > config.batch_size:
        raise InvalidInputError(
            f"processes: expected at most batch_size ({config.batch_size}) on all machines, since each needs an image "
            f"in every step, got {in_all}"
        )
    annotated = sum(not image.pseudo for image in images)
    if in_all > annotated:
        raise InvalidInputError(
            f"processes: expected at most one for each annotated image ({annotated}) on all machines, since each needs "
            f"one in every step, got {in_all}: annotate more images, or train with fewer processes"
        )
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=JOB) as place:
        job = Path(place)
        _hand_over(job, network, images, config, pseudo, class_thresholds, checkpoint, device, processes)
        is_done = partial(
            is_trained,
            network,
            read_coco(job / "images.json", Path("/")).images,  # as the processes see them
            config,
            checkpoint=checkpoint,
            pseudo=pseudo,
            class_thresholds=class_thresholds,
        )
        progress = _until_done(partial(_run, job, processes, on_step, meeting, on_wait), is_done, in_all)
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


@dataclass(frozen=True)
class _Attempt:
    """How one start of the processes ended: torchrun's exit code, the newest progress, this attempt's or an earlier
    one's, and what is said of the machines that were lost; then the code says nothing."""

    code: int = 0
    newest: Progress | None = None
    lost: tuple[str, ...] = ()


def _until_done(run: Callable[[_Attempt], _Attempt], is_done: Callable[[], bool], processes: int) -> Progress | None:
    """Start the processes until they have come to the end, however often a machine is lost."""
    starts, last = 0, _Attempt()
    while not is_done():
        before, last = last, run(last)
        if last.lost:
            logger.warning("%s; the training goes on from the checkpoint when all are there", "; ".join(last.lost))
            continue
        if last.code == 0:
            break
        starts = 1 if last.newest != before.newest else starts + 1
        if starts >= _MOST_STARTS:
            raise TrainingProcessError(
                f"one of {processes} training processes ended {starts} times without a step (exit code {last.code}); "
                "its own messages stand above, or where its machine logs. Was memory short? The checkpoint is as it "
                "was."
            )
        logger.warning(
            "one of %d training processes ended with %d; all go on from the checkpoint", processes, last.code
        )
    return last.newest


def _run(
    job: Path,
    processes: int,
    on_step: Callable[[Progress], None] | None,
    meeting: Meeting | None,
    on_wait: Callable[[str], None],
    before: _Attempt,
) -> _Attempt:
    """Start the processes once, after an attempt `before`. Raises the error that one of them reports."""
    newest = before.newest
    with ExitStack() as ends:
        wait = on_wait if not before.lost else lambda reason: on_wait("; ".join([reason, *before.lost]))
        others = ends.enter_context(gathered(meeting, wait)) if meeting else []
        ours, *theirs = orders(meeting, job=job, processes=processes)
        for other, order in zip(others, theirs, strict=True):
            try:
                other.say(order)
            except OSError:
                return _Attempt(newest=newest, lost=(f"{other.name} is gone",))
        started = ends.enter_context(_started(command(ours), environment(meeting.host) if meeting else None))
        words = _Words(started, others, meeting, processes)
        for said in words:
            if "error" in said:
                raise getattr(errors, said["error"])(said["message"])
            newest = Progress(**said)
            if on_step:
                on_step(newest)
        code = started.wait()
        return _Attempt(code, newest, tuple(words.lost) if code else ())


@contextmanager
def _started(command: list[str], environment: dict[str, str] | None) -> Iterator["subprocess.Popen[str]"]:
    """Our processes, which end with the block."""
    pipe = subprocess.PIPE  # the end of stdin tells them that we have ended
    started = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        yield started
    finally:
        end(started)


class _Words:
    """What processes say, ours and those of other machines, until ours end: they do when those of another machine have
    ended, or it is `lost`, which says which and why."""

    def __init__(
        self,
        started: "subprocess.Popen[str]",
        others: Sequence[Connection],
        meeting: Meeting | None,
        processes: int,
    ) -> None:
        self.lost: list[str] = []
        self._started, self._meeting = started, meeting
        self._names = [f"this machine ({meeting.host})" if meeting else "this machine", *(o.name for o in others)]
        self._roll = Roll(machines=len(self._names), processes=processes)
        self._words: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._listening = [threading.Thread(target=self._hear, args=(other,), daemon=True) for other in others]
        for thread in [threading.Thread(target=self._hear_ours, daemon=True), *self._listening]:
            thread.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (said := self._next()) is not None:
            if "comes" in said:
                self._roll.comes(said["comes"])
            elif "goes_on" in said:
                self._roll.goes_on(said["goes_on"])
            else:
                yield said
        if self._started.wait():  # perhaps because of an error that another machine is about to tell
            for thread in self._listening:
                thread.join(_LAST_WORDS_SECONDS)
            while not self._words.empty():
                if (said := self._words.get()) and not {"comes", "goes_on"} & said.keys():
                    yield said

    def _next(self) -> dict[str, Any] | None:
        """None when our processes have ended, also because another machine stands still."""
        silent = 0  # counted, not measured: while we ourselves stand still, nobody can be heard
        while True:
            try:
                return self._words.get(timeout=1.0)
            except Empty:
                silent += 1
            if self._meeting and silent >= self._meeting.silent_seconds and (lost := self._standing_still(silent)):
                self.lost += lost
                end(self._started)
                return None

    def _standing_still(self, silent: int) -> list[str]:
        if self._roll.is_stuck():
            return [f"a machine stands still, which cannot be told: all have waited for each other for {silent} s"]
        return [
            f"{self._names[machine]} stands still: the others have waited for it for {silent} s"
            for machine in self._roll.behind()
        ]

    def _hear_ours(self) -> None:
        try:
            for said in messages(self._started):
                self._words.put(said)
        finally:
            self._words.put(None)

    def _hear(self, other: Connection) -> None:
        try:
            while "ended" not in (said := other.hear()):
                self._words.put(said)
        except OSError:  # also when it is closed here, at the end
            if self._started.poll() is None:
                self.lost.append(f"{other.name} is gone")
        end(self._started)


def main() -> None:
    """One of the processes, started by torchrun: `python -m model.together <folder>`."""
    end_with_stdin()
    end_with_parent(signal.SIGKILL)  # also of a process that stands still
    job = Path(sys.argv[1])
    described = json.loads((job / "job.json").read_text())
    torch.set_num_threads(described["threads"])
    list(Path(described["checkpoint"]).parent.iterdir())  # so that a network file system looks again what is there
    device = Ranks.local_device(described["device"])
    ranks = Ranks.join(device=device, meeting=partial(_told, int(os.environ["RANK"])))
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


@contextmanager
def _told(rank: int) -> Iterator[None]:
    _say({"comes": rank})
    yield
    _say({"goes_on": rank})


def _say(words: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(words) + "\n")  # in one piece: other processes write to the same pipe
    sys.stdout.flush()


if __name__ == "__main__":
    main()
