"""Training: one linear loop that stops at any moment and goes on with the same weights as if it had not."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from model.augment import strong_view
from model.config import PseudoLabelConfig, TrainingConfig
from model.dataset import Batch, TrainingSteps
from model.distributed import Ranks
from model.errors import CheckpointError, InvalidInputError, NonFiniteLossError, TooLargeError
from model.files import read_tensors, write_tensors
from model.losses import NAMES, SEMI, total_loss
from model.memory import is_out_of_memory
from model.network import MaskRCNNWithScores
from model.pretrained import network_state
from model.teacher import Teacher
from model.types import FloatArray, LabeledImage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """After one step: `step` of `steps` are done; `losses` by name, unweighted, and `loss`, their sum by eq. 5."""

    step: int
    steps: int
    loss: float
    losses: dict[str, float]


def train(
    network: MaskRCNNWithScores,
    images: Sequence[LabeledImage],
    config: TrainingConfig,
    *,
    pseudo: PseudoLabelConfig | None = None,
    class_thresholds: FloatArray | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    ranks: Ranks | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Progress | None:
    """Train `network` in place on annotated and pseudo-labelled images (eq. 5); returns the last step's progress.

    With `checkpoint` (a file), the state is kept every `checkpoint_every_steps`; called again with the same arguments,
    training goes on from there and ends with the same weights (on the same kind of device, with as many threads).
    With `ema_decay`, a teacher labels each step's unlabelled images anew after the burn-in, by `pseudo` and
    `class_thresholds` (`model.pseudo_labels`), and its weights are what is left in `network`. These images may come
    without labels (N = 0, pseudo).
    With `ranks`, all processes call this with the same arguments and share the images of each step; the first one keeps
    the checkpoint, which all of them must be able to read.
    A step whose batch does not fit into memory is done again in smaller pieces, and so are all steps after it: an
    approximation, see `_gradients`.
    Raises NonFiniteLossError, TooLargeError, CheckpointError (the file is another run's or damaged), DatasetError.
    """
    share = (ranks.rank, ranks.size) if ranks else None
    steps = TrainingSteps(images, network=network.config, training=config, share=share)
    network.to(device).train()
    parameters = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    optimizer = _optimizer([p for _, p in parameters], config)
    teacher = Teacher(network, config.ema_decay) if config.ema_decay else None
    if teacher and steps.pseudo and pseudo is None:
        raise InvalidInputError("ema_decay: a teacher needs to know what it may trust, pass `pseudo` to train()")
    run = _fingerprint(network, images, config, (pseudo, class_thresholds) if teacher else (None, None))
    first = _resume(checkpoint, run, network, optimizer, teacher) if checkpoint else 0
    if ranks:
        ranks.start_alike(network, first)
        if teacher:  # it was made of weights that may have been others until now
            ranks.start_alike(teacher.network, first)

    progress, at_once = None, None
    batches = DataLoader(
        steps, batch_size=None, sampler=range(first, len(steps)), num_workers=config.loader_workers
    )  # an item is a whole batch; workers prepare the next ones
    for step, batch in enumerate(batches, start=first):
        batch_images, batch_targets = _on(batch, device)
        if teacher and pseudo and step >= steps.teacher_from:
            batch_images, batch_targets = _relabeled(
                (batch_images, batch_targets), teacher, config, pseudo, class_thresholds, step
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, len(steps))
        if ranks:
            progress = _shared_gradients(network, (batch_images, batch_targets), config, step, len(steps), ranks)
        else:
            progress, at_once = _gradients_in_memory(
                network, (batch_images, batch_targets), config, step, len(steps), at_once
            )
        if config.gradient_clip is not None:
            _clip_gradients(parameters, config.gradient_clip)
        optimizer.step()
        if teacher:
            teacher.follow(step + 1)
        if (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == len(steps):
            _check_weights(network, step + 1)
            if checkpoint and (ranks is None or ranks.rank == 0):
                goes_on = step + 1 < len(steps)  # nothing needs the optimizer's state after the last step
                _save(checkpoint, run, progress, network, optimizer if goes_on else None, teacher)
        if on_step:
            on_step(progress)
    if teacher:
        network.load_state_dict(teacher.network.state_dict())
    network.eval()
    return progress


def _clip_gradients(parameters: Sequence[tuple[str, torch.nn.Parameter]], most: float) -> None:
    """Of the detector, and apart from it of the loss predictor, whose gradients must not shorten the detector's."""
    for watches in (False, True):
        part = [p for name, p in parameters if name.startswith("loss_predictor.") == watches]
        torch.nn.utils.clip_grad_norm_(part, most)


def _gradients_in_memory(
    network: MaskRCNNWithScores, batch: Batch, config: TrainingConfig, step: int, steps: int, at_once: int | None
) -> tuple[Progress, int | None]:
    """`_gradients`, in pieces of at most `at_once` images (None: all), which are halved until memory is enough; returns
    that number, too. Raises TooLargeError when one image is too much."""
    while True:
        network.zero_grad(set_to_none=True)
        try:
            return _gradients(network, batch, config, step, steps, at_once), at_once
        except (RuntimeError, MemoryError) as error:
            tried = min(at_once or len(batch[0]), len(batch[0]))
            if not is_out_of_memory(error):
                raise
            if tried == 1:
                largest = max((tuple(image.shape[-2:]) for image in batch[0]), key=math.prod)
                raise TooLargeError(
                    f"step {step + 1} of {steps}: one image of up to {largest} pixels at a time does "
                    "not fit into memory. Lower the image size (min_size, max_size), or proposals_training and "
                    f"rois_per_image; the last checkpoint is as it was. ({str(error).splitlines()[0]})"
                ) from error
        # Out here nothing holds on to the attempt any more.
        at_once = -(-tried // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("step %d: %d images do not fit into memory, from now on %d at a time", step + 1, tried, at_once)


def _gradients(
    network: MaskRCNNWithScores, batch: Batch, config: TrainingConfig, step: int, steps: int, at_once: int | None
) -> Progress:
    """Add the gradients of one step's loss to the parameters; the losses are returned.

    In pieces of `at_once` images, each counts by its share of the annotated, and of the pseudo-labelled, images. That
    is an approximation: the losses are means over sampled RoIs, whose number differs from image to image, a batch norm
    that is not frozen sees one piece at a time, and the ranking loss only the pairs within a piece.
    """
    torch.manual_seed(config.seed * 1_000_003 + step)  # RoI sampling depends on the step alone, not on the past
    total, sums = 0.0, dict[str, float]()
    for images, targets, shares in _pieces(batch, at_once):
        losses = network(images, targets)
        if shares is not None:
            losses = {name: shares[name.startswith(SEMI)] * loss for name, loss in losses.items()}
        loss = total_loss(losses, **_weights(config, step, steps))
        total += loss.item()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        _check_loss(total, sums, step, steps)
        torch.autograd.backward(loss)
    return Progress(step=step + 1, steps=steps, loss=total, losses=sums)


def _shared_gradients(
    network: MaskRCNNWithScores, batch: Batch, config: TrainingConfig, step: int, steps: int, ranks: Ranks
) -> Progress:
    """`_gradients` of what all processes have of this step: each ends with the same gradients, and the whole losses."""
    network.zero_grad(set_to_none=True)
    weights = _weights(config, step, steps)
    torch.manual_seed(config.seed * 1_000_003 + step)
    parts, whole = ranks.together(network.losses(*batch), NAMES)
    total = total_loss({name: torch.tensor(value) for name, value in whole.items()}, **weights).item()
    _check_loss(total, whole, step, steps)  # the same in all processes: none waits for one that has given up
    torch.autograd.backward(total_loss(parts, **weights))
    ranks.add_gradients(p for p in network.parameters() if p.requires_grad)
    return Progress(step=step + 1, steps=steps, loss=total, losses=whole)


def _weights(config: TrainingConfig, step: int, steps: int) -> dict[str, Any]:
    """What the losses of one step count in `total_loss`."""
    return {
        "beta": beta(config, step, steps),
        "iou_weight": config.iou_loss_weight,
        "pseudo_outlines": config.pseudo_outlines,
    }


def _check_loss(total: float, losses: Mapping[str, float], step: int, steps: int) -> None:
    if not math.isfinite(total):
        raise NonFiniteLossError(
            f"step {step + 1} of {steps}: the loss is {total} ({losses}). "
            "Lower the learning rate or set gradient_clip; the last checkpoint is as it was."
        )


def _pieces(batch: Batch, at_once: int | None) -> Iterator[tuple[list[Tensor], list[Any], tuple[float, float] | None]]:
    """Images, targets, and which share of the step's annotated and pseudo-labelled images they are; a batch that needs
    no cutting comes as it is, with None."""
    images, targets = batch
    if at_once is None or len(images) <= at_once:
        yield images, targets, None
        return
    counts = Counter(bool(target["pseudo"]) for target in targets)
    for start in range(0, len(images), at_once):
        piece = slice(start, start + at_once)
        here = Counter(bool(target["pseudo"]) for target in targets[piece])
        yield images[piece], targets[piece], (here[False] / max(counts[False], 1), here[True] / max(counts[True], 1))


def _optimizer(parameters: list[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


def is_trained(
    network: MaskRCNNWithScores,
    images: Sequence[LabeledImage],
    config: TrainingConfig,
    *,
    checkpoint: Path,
    pseudo: PseudoLabelConfig | None = None,
    class_thresholds: FloatArray | None = None,
) -> bool:
    """Whether a `train` with these arguments has come to its end, as the checkpoint says. Raises CheckpointError and
    DatasetError as `train` does."""
    if not checkpoint.exists():
        return False
    teaching = (pseudo, class_thresholds) if config.ema_decay else (None, None)
    _, done = _read_checkpoint(checkpoint, _fingerprint(network, images, config, teaching))
    return done == len(TrainingSteps(images, network=network.config, training=config))


def load_trained(network: MaskRCNNWithScores, checkpoint: Path) -> None:
    """Load what a finished `train` left in its network from its checkpoint: the teacher's weights if there was one."""
    tensors, _ = read_tensors(checkpoint)
    network.load_state_dict(network_state(tensors))
    network.eval()


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of one of `steps` steps.

    "step" divides by 10 at each milestone epoch (section 4.2); "one_cycle" rises for a fifth of the run, then falls.
    """
    if config.schedule == "step":
        passed = sum(step * config.epochs >= epoch * steps for epoch in config.milestones)
        return float(config.learning_rate * 0.1**passed)
    done = step / max(steps - 1, 1)
    rise = 0.2  # of the run; from and back to a hundredth of the peak
    share = done / rise if done < rise else (1 - done) / (1 - rise)
    return config.learning_rate * (0.01 + 0.99 * (1 - math.cos(math.pi * share)) / 2)


def beta(config: TrainingConfig, step: int, steps: int) -> float:
    """Beta of eq. 5 at one of `steps` steps; with `ramp_up` it is beta exp(-5 (1 - t)^2) while t rises from 0 to 1.

    t is the share of the ramp that has passed. When only each n-th step has pseudo-labelled images, there it is n times
    as large. Laine and Aila, "Temporal ensembling", ICLR 2017.
    """
    full = config.beta * config.pseudo_every_steps
    if step >= config.ramp_up * steps:
        return full
    return full * math.exp(-5 * (1 - step / (config.ramp_up * steps)) ** 2)


def _on(batch: Batch, device: str) -> Batch:
    images, targets = batch
    return [image.to(device) for image in images], [
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}
        for target in targets
    ]


def _relabeled(
    batch: Batch,
    teacher: Teacher,
    config: TrainingConfig,
    pseudo: PseudoLabelConfig,
    class_thresholds: FloatArray | None,
    step: int,
) -> Batch:
    """The step's batch with its unlabelled images labelled by the teacher and shown to the student in strong views."""
    images, targets = list(batch[0]), list(batch[1])
    unlabelled = [i for i, target in enumerate(targets) if target["pseudo"]]
    labels = teacher.targets([images[i] for i in unlabelled], config, pseudo, class_thresholds=class_thresholds)
    for i, target in zip(unlabelled, labels, strict=True):
        seed = {name: value for name, value in targets[i].items() if name == "seed"}
        # With a seed, which the position would not do for: it depends on how the batch is shared.
        images[i] = strong_view(images[i], np.random.default_rng((config.seed, 3, step, seed.get("seed", i))))
        targets[i] = {**target, **seed}
    return _on((images, targets), str(images[0].device))


def _fingerprint(
    network: MaskRCNNWithScores,
    images: Sequence[LabeledImage],
    config: TrainingConfig,
    teaching: tuple[PseudoLabelConfig | None, FloatArray | None],
) -> str:
    """Tells one run from another: the network, what of the settings changes the weights, and the labels."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("loader_workers", "checkpoint_every_steps")}
    labels = [
        (
            image.image_id,
            image.pseudo,
            image.labels.tolist(),
            image.rles,
            _rows(image.triplets),
            _rows(image.ignored_boxes_xyxy),
        )
        for image in images
    ]
    trust = (asdict(teaching[0]) if teaching[0] else None, _rows(teaching[1]))
    description = json.dumps([network.config.to_json(), settings, labels, trust])
    return hashlib.sha256(description.encode()).hexdigest()


def _rows(array: FloatArray | None) -> Any:
    return None if array is None else array.tolist()


def _check_weights(network: MaskRCNNWithScores, step: int) -> None:
    """A step with a finite loss can still ruin the weights; such a network is neither kept nor handed out."""
    for name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteLossError(
                f"after step {step}, {name} is not finite. Lower the learning rate or set gradient_clip; "
                "the last checkpoint is as it was."
            )


def _save(
    path: Path,
    run: str,
    progress: Progress,
    network: MaskRCNNWithScores,
    optimizer: torch.optim.Optimizer | None,
    teacher: Teacher | None,
) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if teacher:
        tensors |= {f"teacher.{name}": tensor for name, tensor in teacher.network.state_dict().items()}
    states = optimizer.state_dict()["state"] if optimizer else {}
    for index, state in states.items():  # momentum, or both moments and the step
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items() if value is not None}
    write_tensors(path, tensors, {"run": run, "step": str(progress.step), "steps": str(progress.steps)})


def _resume(
    path: Path,
    run: str,
    network: MaskRCNNWithScores,
    optimizer: torch.optim.Optimizer,
    teacher: Teacher | None,
) -> int:
    """Load the checkpoint, if there is one; returns the number of steps that are done."""
    if not path.exists():
        return 0
    tensors, done = _read_checkpoint(path, run)
    for prefix, part in (("network.", network), ("teacher.", teacher.network if teacher else None)):
        if part is not None:
            part.load_state_dict(
                {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            )
    parameters = optimizer.param_groups[0]["params"]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".")
            # The step's count stays where AdamW keeps it, on the CPU.
            device = "cpu" if field == "step" else parameters[int(index)].device
            # A copy: what was read is the file, mapped into memory, whose space would stay taken once it is replaced.
            optimizer.state[parameters[int(index)]][field] = tensor.to(device, copy=True)
    return done


def _read_checkpoint(path: Path, run: str) -> tuple[dict[str, Tensor], int]:
    """The tensors of a checkpoint and the number of steps that are done; CheckpointError unless it is this run's."""
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"{error}. Delete the file to train from the start.") from error
    if metadata.get("run") != run:
        raise CheckpointError(
            f"{path} belongs to another run (other settings, network or labels). Delete it to train from the start."
        )
    return tensors, int(metadata["step"])
