"""Global convolution against the dense kernel it is, boundary refinement against its equation; counts of both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from volvelle.nn import BoundaryRefinement, GlobalConvolution


def count(module, x):
    """Parameters, and multiplications as torch counts them (two FLOPs each)."""
    with FlopCounterMode(display=False) as counter:
        module(x)
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 15])
@pytest.mark.parametrize("size", [(5, 6), (9, 16)])
def test_it_is_one_dense_kernel(k, size):
    """Without biases: W = Σ_m l2_m ⊗ l1_m + r2_m ⊗ r1_m, at the borders too, also where k exceeds the image."""
    torch.manual_seed(0)
    layer, x = GlobalConvolution(3, 4, k, bias=False).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    left = torch.einsum("dmx,mcy->dcyx", layer.conv_l2.weight[:, :, 0], layer.conv_l1.weight[..., 0])
    right = torch.einsum("dmy,mcx->dcyx", layer.conv_r2.weight[..., 0], layer.conv_r1.weight[:, :, 0])
    before = (k - 1) // 2
    padded = F.pad(x, (before, k - 1 - before) * 2)
    torch.testing.assert_close(layer(x), F.conv2d(padded, left + right))


def test_with_biases_it_is_the_figure():
    torch.manual_seed(0)
    layer, x = GlobalConvolution(3, 4, 5), torch.randn(2, 3, 6, 9)
    left = nn.Sequential(nn.Conv2d(3, 4, (5, 1), padding=(2, 0)), nn.Conv2d(4, 4, (1, 5), padding=(0, 2)))
    right = nn.Sequential(nn.Conv2d(3, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, (5, 1), padding=(2, 0)))
    for theirs, ours in zip((*left, *right), layer.children(), strict=True):
        theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(layer(x), left(x) + right(x))
    assert [name for name, _ in layer.named_children()] == ["conv_l1", "conv_l2", "conv_r1", "conv_r2"]


@pytest.mark.parametrize(("c", "d", "k", "bias"), [(8, 3, 7, True), (5, 11, 4, False)])
def test_counts_of_global_convolution(c, d, k, bias):
    parameters, products = count(GlobalConvolution(c, d, k, bias=bias), torch.zeros(2, c, 5, 6))
    assert parameters == 2 * k * d * (c + d) + 4 * d * bias
    assert products == 2 * k * d * (c + d) * 2 * 5 * 6


@pytest.mark.parametrize("kernel", [3, 5])
def test_boundary_refinement(kernel):
    torch.manual_seed(0)
    layer, x = BoundaryRefinement(4, kernel_size=kernel), torch.randn(2, 4, 5, 7)
    first, second = layer.conv1, layer.conv2
    inner = F.conv2d(x, first.weight, first.bias, padding=kernel // 2).clamp(min=0)
    torch.testing.assert_close(layer(x), x + F.conv2d(inner, second.weight, second.bias, padding=kernel // 2))
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    assert torch.equal(layer(x), x)
    parameters, products = count(layer, x)
    assert parameters == 2 * (kernel**2 * 16 + 4)
    assert products == 2 * kernel**2 * 16 * x[:, 0].numel()
