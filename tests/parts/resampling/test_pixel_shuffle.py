"""The shuffle against loops and torch; ICNR: any init, groups, odd channels, and nearest upsampling at the start."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from volvelle.functional import icnr_init, pixel_shuffle, resize_nearest


@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 3])
def test_the_shuffle(s, d):
    x = torch.randn(2, d * s * s, 3, 5)
    out = pixel_shuffle(x, s)
    assert torch.equal(out, F.pixel_shuffle(x, s))
    for n in range(d):
        for p in range(s):
            for q in range(s):
                assert torch.equal(out[:, n, p::s, q::s], x[:, n * s * s + s * p + q])


INITS = {
    "kaiming": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "dirac": nn.init.dirac_,
    "truncated": functools.partial(nn.init.trunc_normal_, std=0.1),
    "returns another": lambda tensor: torch.rand(tensor.shape),
    "returns nothing": lambda tensor: fill(tensor),
}


def fill(tensor):
    tensor.copy_(torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("d", "groups", "s"), [(1, 1, 2), (3, 1, 3), (5, 1, 2), (3, 3, 2), (6, 2, 3)])
def test_it_starts_as_nearest_upsampling_of_a_convolution(init, d, groups, s):
    torch.manual_seed(0)
    c = 6
    conv = nn.Conv2d(c, d * s * s, 3, padding=1, groups=groups, dtype=torch.float64)
    same = icnr_init(conv.weight, s, INITS[init], groups=groups)
    assert same is conv.weight, "filled in place"
    assert conv.weight.requires_grad
    icnr_init(conv.bias, s, nn.init.normal_, groups=groups)
    x = torch.randn(2, c, 5, 4, dtype=torch.float64)
    coarse = F.conv2d(x, conv.weight[:: s * s], conv.bias[:: s * s], padding=1, groups=groups)
    found = pixel_shuffle(conv(x), s)
    torch.testing.assert_close(found, resize_nearest(coarse, (5 * s, 4 * s)), rtol=0, atol=1e-12)
    assert found.abs().sum() > 0


def test_the_init_sees_the_kernels_of_one_phase():
    """Its fans, and so its variance, are those of the convolution before nearest upsampling."""
    seen = []
    icnr_init(torch.empty(8 * 9, 5, 3, 3), 3, lambda tensor: seen.append(tuple(tensor.shape)))
    assert seen == [(8, 5, 3, 3)]
    torch.manual_seed(0)
    weight = icnr_init(torch.empty(256 * 4, 32, 3, 3), 2)
    assert weight.std() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_drawn_in_fp32(dtype):
    """torch.nn.init.orthogonal_ has no half-precision kernel."""
    weight = icnr_init(torch.empty(12, 5, 3, 3, dtype=dtype), 2, nn.init.orthogonal_)
    flat = weight[::4].flatten(1).double()
    assert (flat @ flat.T - torch.eye(3)).abs().max() < 4 * torch.finfo(dtype).eps


def test_without_it_the_phases_differ():
    """The mutant: drawn kernel by kernel, a constant image becomes a checkerboard."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert pixel_shuffle(conv(torch.ones(1, 3, 6, 6)), 2)[0, 0, 4:8, 4:8].std() > 0.05
    icnr_init(conv.weight)
    assert pixel_shuffle(conv(torch.ones(1, 3, 6, 6)), 2)[0, 0, 4:8, 4:8].std() > 0.01, "the bias has phases too"
    icnr_init(conv.bias, 2, nn.init.zeros_)
    assert pixel_shuffle(conv(torch.ones(1, 3, 6, 6)), 2)[0, 0, 4:8, 4:8].std() < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: icnr_init(torch.empty(6, 1, 3, 3), 2), r"multiple of the squared factor, got weight \(6, 1, 3, 3\)"),
        (lambda: icnr_init(torch.empty(12, 1, 3, 3), 2, groups=2), "groups must divide the 3 channels.*got groups 2"),
        (lambda: icnr_init(torch.empty(4, 1, 3, 3), 0), "upscale_factor 0"),
        (lambda: pixel_shuffle(torch.empty(1, 6, 2, 2), 2), r"pixel_shuffle: .*input \(1, 6, 2, 2\)"),
        (lambda: pixel_shuffle(torch.empty(4, 2, 2), 2), r"pixel_shuffle: input must be \(b, c, y, x\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
