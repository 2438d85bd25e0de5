"""Devices that torch may be asked for."""

import torch

from model.errors import InvalidInputError


def check_device(device: str) -> None:
    """InvalidInputError when torch cannot use `device`, such as cpu or cuda:1, on this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise InvalidInputError(
            f"expected a device that torch can use on this machine, got {device!r}: {reason}."
        ) from error
