"""Strong views of an image for a student whose labels a teacher made on the plain one; pure, boxes and masks stay.

Photometric changes and small cutouts, as in Unbiased Teacher; nothing moves, so that no label has to.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

_CONTRAST = 0.4  # the factor is drawn from 1 -+ this
_BRIGHTNESS = 0.2  # added, of the range [0, 1]
_LOG_GAMMA = 0.4
_BLUR_SIGMA_PX = (0.3, 1.5)
_NOISE = 0.05  # largest standard deviation
_CUTOUTS = 3  # at most
_CUTOUT_SIDE = (0.05, 0.2)  # of the image's sides


def strong_view(image: Tensor, rng: np.random.Generator) -> Tensor:
    """A changed copy of an image (3, H, W) in [0, 1], of the same size and range, on its device."""
    view = image + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    view = (view - view.mean()) * rng.uniform(1 - _CONTRAST, 1 + _CONTRAST) + view.mean()
    view = view.clamp(0, 1) ** float(np.exp(rng.uniform(-_LOG_GAMMA, _LOG_GAMMA)))
    if rng.random() < 0.5:
        view = gaussian_blur(view, [5, 5], [rng.uniform(*_BLUR_SIGMA_PX)])
    else:
        noise = rng.standard_normal(tuple(view.shape), dtype=np.float32) * np.float32(rng.uniform(0, _NOISE))
        view = (view + torch.from_numpy(noise).to(view)).clamp(0, 1)
    grey = view.mean(dim=(1, 2), keepdim=True)
    for _ in range(rng.integers(0, _CUTOUTS + 1)):
        height, width = (max(1, int(side * rng.uniform(*_CUTOUT_SIDE))) for side in image.shape[1:])
        y, x = rng.integers(0, image.shape[1] - height + 1), rng.integers(0, image.shape[2] - width + 1)
        view[:, y : y + height, x : x + width] = grey
    return view
