"""3 x 3 convolutions with a quarter of the multiplications (Winograd's F(4 x 4, 3 x 3); Lavin and Gray 2015).

A tile of 6 x 6 pixels gives 4 x 4 of the output: tile and kernel are transformed, so that the convolution becomes 36
matrix products over the channels, and the result is transformed back.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The interpolation points are 0, 1, -1, 2, -2 and infinity.
_TILE = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
_KERNEL = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
) / torch.tensor([[24]])
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)
_TILES_AT_ONCE = 128  # so many stay in the cache
_CHANNELS = range(128, 257)  # with fewer the transforms cost more than they save; with more the kernels get large


class WinogradConv(nn.Module):
    """A convolution with kernel 3, stride 1 and padding 1, for inference on CPUs; its kernels take four times as much
    memory. The result differs by roundings, about four times those of the direct sum."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        dtype, weight = convolution.weight.dtype, convolution.weight.detach().double()  # (K, C, 3, 3)
        kernels = torch.kron(_KERNEL, _KERNEL) @ weight.permute(2, 3, 1, 0).reshape(9, -1)
        self.kernels = nn.Buffer(kernels.reshape(36, weight.shape[1], -1).to(dtype))
        self.bias = convolution.bias
        self.to_tiles = nn.Buffer(torch.kron(_TILE, _TILE).to(dtype))
        self.to_output = nn.Buffer(torch.kron(_OUTPUT, _OUTPUT).to(dtype))

    @staticmethod
    def suits(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Whether a module is a convolution that this makes quicker."""
        return (
            isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride, module.padding, module.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
            and module.groups == 1
            and module.in_channels in _CHANNELS
            and module.out_channels in _CHANNELS
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W), channels last."""
        count, channels, height, width = images.shape
        rows, columns = -(-height // 4), -(-width // 4)  # of tiles
        padded = F.pad(images, (1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height))
        b, c, y, x = padded.stride()
        tiles = padded.as_strided((6, 6, count, rows, columns, channels), (y, x, b, 4 * y, 4 * x, c))
        output = images.new_empty(count, rows, 4, columns, 4, self.kernels.shape[2])
        some_rows = max(1, _TILES_AT_ONCE // columns)
        some_images = max(1, some_rows // rows)
        for image in range(0, count, some_images):
            for row in range(0, rows, some_rows):
                part = tiles[:, :, image : image + some_images, row : row + some_rows]
                here = output[image : image + some_images, row : row + some_rows]
                here.copy_(self._convolved(part).permute(2, 3, 0, 4, 1, 5))
        return output.view(count, 4 * rows, 4 * columns, self.kernels.shape[2])[:, :height, :width].permute(0, 3, 1, 2)

    def _convolved(self, tiles: Tensor) -> Tensor:
        """Tiles (6, 6, b, rows, columns, C) -> (4, 4, b, rows, columns, K)."""
        channels = tiles.shape[-1]
        transformed = (self.to_tiles @ tiles.reshape(36, -1)).view(36, -1, channels)
        products = torch.bmm(transformed, self.kernels)
        result = (self.to_output @ products.view(36, -1)).view(4, 4, *tiles.shape[2:5], -1)
        return result if self.bias is None else result.add_(self.bias)
