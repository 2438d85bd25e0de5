"""One training by several processes, on one machine or many: each takes its share of every step's images.

Started by torchrun, which sets RANK, WORLD_SIZE and where the processes meet. A step comes out as if one process had
done it (`model.train`), but for rounding, for images of different sizes, which are padded to the largest of their
share, and for batch norms that are not frozen, which see their own share. The ranking loss of `learning_loss` compares
the images of one process: with one image for each there is nothing to learn from, which `TrainingSteps` refuses.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed
from torch import Tensor, nn

from model.errors import InvalidInputError
from model.losses import Mean


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process, `rank` of 0 to `size` - 1, among those that train together.

    It enters a `meeting` whenever it comes to where it has to wait for all others, and leaves it when it can go on.
    """

    rank: int
    size: int
    meeting: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def join(cls, *, device: str = "cpu", meeting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Self:
        """Meet the others: by gloo on the CPU, by NCCL on GPUs. Raises InvalidInputError outside of torchrun."""
        if not torch.distributed.is_torchelastic_launched():
            raise InvalidInputError(
                "expected to be started by torchrun, such as `torchrun --nproc-per-node 2 script.py`: RANK and "
                "WORLD_SIZE are not set"
            )
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        with meeting():
            torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return cls(rank=rank, size=size, meeting=meeting)

    @staticmethod
    def local_device(device: str) -> str:
        """Of "cuda", the GPU that is this process's own; any other device as it is."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device

    def leave(self) -> None:
        """Part from the others; no process trains with them any more."""
        torch.distributed.destroy_process_group()

    def start_alike(self, network: nn.Module, first: int) -> None:
        """Give every process the weights of the first one. RuntimeError unless all go on at the same step, `first`."""
        steps = torch.tensor([first, -first], device=next(network.parameters()).device)
        with self._exchange(steps.device):
            torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
            latest, earliest = int(steps[0]), -int(steps[1])
        if latest != earliest:
            raise RuntimeError(
                f"expected that all processes see one checkpoint, got steps {earliest} to {latest}: does the folder "
                "that they share show what was written elsewhere?"
            )
        with self._exchange(steps.device):
            for tensor in network.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def together(self, losses: Mapping[str, Mean], names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """This process's part of each loss, and the whole losses; `names` are all that there may be.

        A loss is a mean over what was sampled, whose number differs from process to process: each part counts by its
        share of that, so that the sum of the parts is the mean over everything.
        """
        device = next(iter(losses.values())).value.device
        table = torch.zeros((len(names), 3), dtype=torch.float64, device=device)  # is there, samples, sum
        for row, name in zip(table, names, strict=True):
            if name in losses:
                value, samples = losses[name]
                row[:] = torch.stack([row.new_ones(()), row.new_tensor(samples), samples * value.detach()])
        with self._exchange(device):
            torch.distributed.all_reduce(table)
            rows = dict(zip(names, table.tolist(), strict=True))
        whole = {name: summed / max(samples, 1) for name, (is_there, samples, summed) in rows.items() if is_there}
        parts = {name: loss.value * (loss.samples / max(rows[name][1], 1)) for name, loss in losses.items()}
        return parts, whole

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradient of each parameter by the sum over all processes; all have the same afterwards."""
        known = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in known])
        with self._exchange(flat.device):
            torch.distributed.all_reduce(flat)
        for parameter, gradient in zip(known, torch.split(flat, [p.numel() for p in known]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    @contextmanager
    def _exchange(self, device: torch.device) -> Iterator[None]:
        """A meeting that is over when its tensors are there: on a GPU they are only asked for in the block."""
        with self.meeting():
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)
