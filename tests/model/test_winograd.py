"""Winograd's convolution against the direct one."""

import pytest
import torch
from torch import nn

from model.winograd import WinogradConv


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 14, 14), (1, 1, 1), (3, 5, 9), (1, 67, 130), (40, 7, 7), (0, 14, 14)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_same_convolution(shape, bias, memory_format):
    torch.manual_seed(0)
    convolution = nn.Conv2d(128, 160, 3, padding=1, bias=bias)
    count, height, width = shape
    images = torch.randn(count, 128, height, width).contiguous(memory_format=memory_format)
    with torch.no_grad():
        exact = convolution.double()(images.double())
        found = WinogradConv(convolution.float())(images)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()) if count else 0)


def test_in_double_precision_it_is_exact():
    torch.manual_seed(0)
    convolution = nn.Conv2d(128, 128, 3, padding=1).double()
    images = torch.randn(2, 128, 10, 11, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(WinogradConv(convolution)(images), convolution(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("suits", "options"),
    [
        (True, {}),
        (False, {"kernel_size": 1, "padding": 0}),
        (False, {"stride": 2}),
        (False, {"padding": 0}),
        (False, {"dilation": 2, "padding": 2}),
        (False, {"groups": 2}),
        (False, {"in_channels": 64}),
        (False, {"out_channels": 512}),
    ],
)
def test_it_knows_which_convolutions_it_is_for(suits, options):
    defaults = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1}
    assert WinogradConv.suits(nn.Conv2d(**{**defaults, **options})) is suits
