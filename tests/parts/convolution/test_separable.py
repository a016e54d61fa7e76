"""Depthwise separable convolution: the dense kernel it is, groups and 1 x 1 in torch, its counts, bad calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from volvelle.functional import depthwise_separable_conv2d, pointwise_conv2d
from volvelle.nn import DepthwiseSeparableConv2d, PointwiseConv2d


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), ((1, 2), 3)])
def test_it_is_one_dense_kernel(multiplier, stride, dilation):
    """W_nc = Σ over the kernels m of channel c of v_nm w_m."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    depthwise = torch.randn(3 * multiplier, 1, 3, 3, dtype=torch.float64)
    pointwise, bias = torch.randn(5, 3 * multiplier, 1, 1, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    dense = torch.einsum("ncm,cmyx->ncyx", pointwise.view(5, 3, multiplier), depthwise.view(3, multiplier, 3, 3))
    expected = F.conv2d(x, dense, bias, stride, dilation, dilation)
    torch.testing.assert_close(depthwise_separable_conv2d(x, depthwise, pointwise, bias, stride, dilation), expected)


def test_torch_in_two_steps_under_the_usual_names():
    torch.manual_seed(0)
    ours = DepthwiseSeparableConv2d(4, 6, 5, stride=2)
    theirs = nn.ModuleDict(
        {"depthwise": nn.Conv2d(4, 4, 5, 2, 2, groups=4, bias=False), "pointwise": nn.Conv2d(4, 6, 1)}
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 9, 8)
    assert torch.equal(ours(x), theirs["pointwise"](theirs["depthwise"](x)))


def test_pointwise_is_a_matrix_at_each_pixel():
    torch.manual_seed(0)
    layer, x = PointwiseConv2d(3, 5).double(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = torch.einsum("nm,bmyx->bnyx", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("m", "n", "k", "multiplier"), [(8, 16, 3, 1), (6, 5, 5, 2)])
def test_the_papers_cost(m, n, k, multiplier):
    """Howard et al. 2017, equation 4, and its ratio to a dense kernel, 1/N + 1/K²."""
    layer, x = DepthwiseSeparableConv2d(m, n, k, multiplier=multiplier, bias=False), torch.zeros(1, m, 6, 7)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    weights = sum(p.numel() for p in layer.parameters())
    assert weights == multiplier * (k * k * m + m * n)
    assert counter.get_total_flops() == 2 * weights * 6 * 7
    assert weights / (k * k * m * n) == pytest.approx(multiplier * (1 / n + 1 / k**2))


def test_adapters_on_its_layers_act():
    """A layer whose weight were read past its Module would lose them silently."""
    layer, x = DepthwiseSeparableConv2d(3, 4), torch.randn(2, 3, 5, 5)
    before, called = layer(x), []
    for child in layer.children():
        child.register_forward_hook(lambda module, inputs, out: called.append(type(module).__name__) or out + 1)
    assert not torch.equal(layer(x), before)
    assert called == ["AtrousConv2d", "PointwiseConv2d"]


def test_what_does_not_fit_is_named():
    x = torch.zeros(2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"pointwise_conv2d: weight must be \(d, c, 1, 1\), got \(4, 3, 3, 3\)"):
        pointwise_conv2d(x, torch.zeros(4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"pointwise_conv2d: .*got input \(2, 3, 5, 5\), weight \(4, 2, 1, 1\)"):
        depthwise_separable_conv2d(x, torch.zeros(3, 1, 3, 3), torch.zeros(4, 2, 1, 1))
    with pytest.raises(ValueError, match=r"atrous_conv2d: .*weight \(4, 1, 3, 3\) and groups 3"):
        depthwise_separable_conv2d(x, torch.zeros(4, 1, 3, 3), torch.zeros(4, 4, 1, 1))
