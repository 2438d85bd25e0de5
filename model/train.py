"""Training: one linear loop that stops at any moment and goes on with the same weights as if it had not."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from model.config import TrainingConfig
from model.dataset import TrainingSteps
from model.errors import CheckpointError, NonFiniteLossError
from model.files import read_tensors, write_tensors
from model.losses import total_loss
from model.network import MaskRCNNWithScores
from model.types import LabeledImage


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
    checkpoint: Path | None = None,
    device: str = "cpu",
    on_step: Callable[[Progress], None] | None = None,
) -> Progress | None:
    """Train `network` in place on annotated and pseudo-labelled images (eq. 5); returns the last step's progress.

    With `checkpoint` (a file), the state is kept every `checkpoint_every_steps`; called again with the same arguments,
    training goes on from there and ends with the same weights (on the same kind of device, with as many threads).
    Raises NonFiniteLossError, CheckpointError (the file is another run's or damaged), DatasetError.
    """
    steps = TrainingSteps(images, network=network.config, training=config)
    network.to(device).train()
    parameters = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        [p for _, p in parameters], lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    run = _fingerprint(network, images, config)
    first = _resume(checkpoint, run, network, optimizer) if checkpoint else 0

    progress = None
    batches = DataLoader(
        steps, batch_size=None, sampler=range(first, len(steps)), num_workers=config.loader_workers
    )  # an item is a whole batch; workers prepare the next ones
    for step, (batch_images, batch_targets) in enumerate(batches, start=first):
        torch.manual_seed(config.seed * 1_000_003 + step)  # RoI sampling depends on the step alone, not on the past
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, len(steps))
        losses = network([image.to(device) for image in batch_images], [_to(t, device) for t in batch_targets])
        loss = total_loss(losses, beta=config.beta, iou_weight=config.iou_loss_weight)
        progress = Progress(
            step=step + 1,
            steps=len(steps),
            loss=loss.item(),
            losses={name: value.item() for name, value in losses.items()},
        )
        if not math.isfinite(progress.loss):
            raise NonFiniteLossError(
                f"step {step + 1} of {len(steps)}: the loss is {progress.loss} ({progress.losses}). "
                "Lower the learning rate or set gradient_clip; the last checkpoint is as it was."
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if config.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in parameters], config.gradient_clip)
        optimizer.step()
        if (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == len(steps):
            _check_weights(network, step + 1)
            if checkpoint:
                _save(checkpoint, run, step + 1, network, optimizer)
        if on_step:
            on_step(progress)
    network.eval()
    return progress


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


def _to(target: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}


def _fingerprint(network: MaskRCNNWithScores, images: Sequence[LabeledImage], config: TrainingConfig) -> str:
    """Tells one run from another: the network, what of the settings changes the weights, and the labels."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("loader_workers", "checkpoint_every_steps")}
    labels = [(image.image_id, image.pseudo, image.labels.tolist(), image.rles) for image in images]
    description = json.dumps([network.config.to_json(), settings, labels])
    return hashlib.sha256(description.encode()).hexdigest()


def _check_weights(network: MaskRCNNWithScores, step: int) -> None:
    """A step with a finite loss can still ruin the weights; such a network is neither kept nor handed out."""
    for name, tensor in network.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteLossError(
                f"after step {step}, {name} is not finite. Lower the learning rate or set gradient_clip; "
                "the last checkpoint is as it was."
            )


def _save(path: Path, run: str, step: int, network: MaskRCNNWithScores, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{index}"] = momentum
    write_tensors(path, tensors, {"run": run, "step": str(step)})


def _resume(path: Path, run: str, network: MaskRCNNWithScores, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint, if there is one; returns the number of steps that are done."""
    if not path.exists():
        return 0
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"{error}. Delete the file to train from the start.") from error
    if metadata.get("run") != run:
        raise CheckpointError(
            f"{path} belongs to another run (other settings, network or labels). Delete it to train from the start."
        )
    network.load_state_dict(
        {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    )
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if (momentum := tensors.get(f"momentum.{index}")) is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
    return int(metadata["step"])
