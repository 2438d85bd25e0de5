"""Inference: images in, `Detections` out; the polygons and scores that people see are made from these."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.dataset import image_tensor, input_hw
from model.errors import InvalidInputError, TooLargeError
from model.memory import is_out_of_memory
from model.network import MaskRCNNWithScores
from model.types import Detections, FloatArray

T = TypeVar("T")

_END: Any = object()


def ahead(items: Iterable[T], *, held: int = 1) -> Iterator[T]:
    """The same items in order, made by another thread while the caller works on those before; `held` of them wait at
    most. What making an item raises is raised in its place."""
    source = iter(items)
    # In a new thread torch's convolutions would use all cores, until it is asked how many it may use.
    maker = ThreadPoolExecutor(max_workers=1, initializer=torch.get_num_threads)
    try:
        made = deque(maker.submit(next, source, _END) for _ in range(held))
        while (item := made[0].result()) is not _END:
            made.popleft()
            made.append(maker.submit(next, source, _END))
            yield item
    finally:
        maker.shutdown(cancel_futures=True)


def detect(
    network: MaskRCNNWithScores, images: Iterable[NDArray[np.uint8]], *, batch_size: int = 1
) -> Iterator[Detections]:
    """The detections in each image (H, W, 3) uint8 RGB, in pixels of that image, in order.

    Lazy: no more than `batch_size` images are held at a time; a batch that does not fit into memory is halved. The
    network runs where its weights are.
    """
    device = next(network.parameters()).device
    network.eval()
    source = iter(images)
    while batch := list(islice(source, batch_size)):
        for pixels in batch:
            _check_pixels(pixels)
        sizes = [(pixels.shape[0], pixels.shape[1]) for pixels in batch]
        inputs = [image_tensor(p, input_hw(hw, network.config)).to(device) for p, hw in zip(batch, sizes, strict=True)]
        outputs = outputs_in_memory(network, inputs)
        for tensor, output, hw in zip(inputs, outputs, sizes, strict=True):
            yield detections_of(output, input_hw=tensor.shape[-2:], image_hw=hw)


def outputs_in_memory(network: MaskRCNNWithScores, inputs: list[Tensor]) -> list[dict[str, Tensor]]:
    """The network's output for each image; raises TooLargeError when one alone does not fit into memory."""
    try:
        with torch.inference_mode():
            return list(network(inputs))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(inputs) == 1:
            raise TooLargeError(
                f"an image of {tuple(inputs[0].shape[-2:])} pixels does not fit into memory. Lower the image size "
                f"(min_size, max_size) or proposals_inference. ({str(error).splitlines()[0]})"
            ) from error
    half = len(inputs) // 2
    return [*outputs_in_memory(network, inputs[:half]), *outputs_in_memory(network, inputs[half:])]


def detections_of(tensors: Mapping[str, Tensor], *, input_hw: tuple[int, ...], image_hw: tuple[int, int]) -> Detections:
    """The network's output for one image, scaled from its input size to the image's own."""
    output = {key: value.cpu().numpy() for key, value in tensors.items()}
    scale_xyxy = np.array([image_hw[1] / input_hw[1], image_hw[0] / input_hw[0]] * 2, dtype=np.float32)
    order = np.argsort(-output["scores"], kind="stable")
    return Detections(
        image_hw=image_hw,
        boxes_xyxy=(output["boxes"] * scale_xyxy)[order],
        labels=output["labels"][order],
        class_scores=output["scores"][order],
        box_scores=output["box_scores"][order],
        mask_scores=output["mask_scores"][order],
        roi_masks=output["roi_masks"][order],
    )


def rescored(detections: Detections, calibrate: Callable[[FloatArray], FloatArray] | None = None) -> Detections:
    """The detections with c x m in the place of c, the best first, as Mask Scoring R-CNN ranks them.

    `calibrate` (`model.calibration.fit_calibration`) maps m (D,) to (D,) before.
    """
    mask_scores = detections.mask_scores if calibrate is None else calibrate(detections.mask_scores)
    scores = detections.class_scores * mask_scores
    return replace(detections, class_scores=scores).select(np.argsort(-scores, kind="stable"))


def _check_pixels(pixels: NDArray[np.uint8]) -> None:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise InvalidInputError(f"expected an RGB image (H, W, 3) uint8, got {pixels.dtype} {pixels.shape}")
