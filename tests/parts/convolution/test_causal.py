"""Causal convolution: nothing of the future, WaveNet's field, and the same in parts as in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volvelle.functional import causal_conv1d
from volvelle.nn import CausalConv1d


@pytest.mark.parametrize(("taps", "rate"), [(1, 1), (2, 1), (2, 4), (3, 2), (4, 3)])
def test_equals_the_sum(taps, rate):
    x, weight = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(4, 3, taps, dtype=torch.float64)
    expected = torch.zeros(2, 4, 9, dtype=torch.float64)
    for i in range(9):
        for k in range(taps):
            if (j := i - rate * (taps - 1 - k)) >= 0:
                expected[:, :, i] += x[:, :, j] @ weight[:, :, k].T
    torch.testing.assert_close(causal_conv1d(x, weight, dilation=rate), expected)


def stack(layers=5):
    torch.manual_seed(0)
    return nn.Sequential(*(CausalConv1d(1, 1, 2, dilation=2**i) for i in range(layers))).double()


def test_it_sees_two_to_the_number_of_layers_and_nothing_later():
    net, x = stack(5), torch.randn(1, 1, 50, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x)[0, 0, 40], x)
    seen = gradient[0, 0].nonzero().flatten().tolist()
    assert seen == list(range(40 - 2**5 + 1, 41))


@pytest.mark.parametrize("parts", [[23], [1] * 23, [5, 1, 9, 8]])
def test_read_in_parts(parts):
    """One input at a time is how a sequence is generated; a part may be shorter than what is looked back."""
    net, x = stack(4), torch.randn(2, 1, 23, dtype=torch.float64)
    pasts = [torch.zeros(2, 1, layer.past, dtype=torch.float64) for layer in net]
    found = []
    for part in x.split(parts, dim=-1):
        for i, layer in enumerate(net):
            after = torch.cat((pasts[i], part), dim=-1)
            part, pasts[i] = layer(part, pasts[i]), after[..., after.shape[-1] - layer.past :]
        found.append(part)
    torch.testing.assert_close(torch.cat(found, dim=-1), net(x))


def test_what_does_not_fit_is_named():
    x, weight = torch.zeros(2, 3, 5), torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match=r"before must be \(2, 3, 4\), the last 4 inputs, got \(2, 3, 3\)"):
        causal_conv1d(x, weight, dilation=4, before=x[..., :3])
    with pytest.raises(ValueError, match="causal_conv1d: dilation must be at least 1"):
        causal_conv1d(x, weight, dilation=0)
    with pytest.raises(ValueError, match=r"got input \(2, 3, 5\), weight \(4, 3, 2\) and groups 2"):
        causal_conv1d(x, weight, groups=2)
    with pytest.raises(ValueError, match="CausalConv1d: kernel_size must be at least 1"):
        CausalConv1d(3, 4, 0)
