"""Upsample2d: every method against torch's own layers, sizes, the start of each, what two of them have in common."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from volvelle.functional import checkerboard, upsample2d
from volvelle.nn import Upsample2d
from volvelle.parts.resampling.upsample import Method

METHODS = get_args(Method)
EACH = pytest.mark.parametrize("method", METHODS)


def layer(method, c=4, d=3, **options):
    torch.manual_seed(0)
    up = Upsample2d(c, d, method=method, **options).double()
    for parameter in up.parameters():
        nn.init.normal_(parameter)
    return up


@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_torchs_own_layers(s, k):
    x, near = torch.randn(2, 4, 5, 7, dtype=torch.float64), k // 2
    for method, options in (
        ("nearest", {}),
        ("bilinear", {"mode": "bilinear"}),
        ("bilinear_aligned", {"mode": "bilinear", "align_corners": True}),
    ):
        up = layer(method, factor=s, kernel_size=k)
        fine = F.interpolate(x, scale_factor=s, **options)
        torch.testing.assert_close(up(x), F.conv2d(fine, up.weight, up.bias, padding=near))
    up = layer("pixel_shuffle", factor=s, kernel_size=k)
    torch.testing.assert_close(up(x), F.pixel_shuffle(F.conv2d(x, up.weight, up.bias, padding=near), s))
    up = layer("transposed", factor=s, kernel_size=k)
    theirs = F.conv_transpose2d(x, up.weight, up.bias, stride=s, padding=s * (k - 1) // 2)
    torch.testing.assert_close(up(x), theirs)
    up, (values, indices) = layer("unpool", factor=s, kernel_size=k), F.max_pool2d(x, s, return_indices=True)
    fine = F.max_unpool2d(values, indices, s, output_size=x.shape)
    torch.testing.assert_close(up(values, indices, size=(5, 7)), F.conv2d(fine, up.weight, up.bias, padding=near))


def test_the_kernel_of_many_generators():
    """Kernel 4, stride 2, padding 1."""
    up, x = layer("transposed", kernel_size=2), torch.randn(2, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, up.weight, up.bias, stride=2, padding=1))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("s", [1, 2, 3, 4])
@EACH
def test_the_size_is_the_factor_times(method, s, k):
    up, x = Upsample2d(2, 3, s, method=method, kernel_size=k), torch.randn(2, 2, 5, 3)
    inputs = (x,)
    if method == "unpool":
        inputs = F.max_pool2d(torch.randn(2, 2, 5 * s, 3 * s), s, return_indices=True)
    assert up(*inputs).shape == (2, 3, 5 * s, 3 * s)


@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_shuffled_and_transposed_are_the_same_functions(s, k):
    """Shi et al. 2016b: W[c, d, s (k - 1 - a) + p, ..] of the one is w[d s² + s p + q, c, a, b] of the other."""
    c, d = 4, 3
    shuffled, transposed = layer("pixel_shuffle", factor=s, kernel_size=k), layer("transposed", factor=s, kernel_size=k)
    kernels = shuffled.weight.view(d, s, s, c, k, k).flip(-2, -1)
    kernels = kernels.permute(3, 0, 4, 1, 5, 2).reshape(c, d, k * s, k * s)
    shuffled.bias = nn.Parameter(transposed.bias.repeat_interleave(s * s))
    transposed.weight = nn.Parameter(kernels)
    x = torch.randn(2, c, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(transposed(x), shuffled(x))


@EACH
@pytest.mark.parametrize(("s", "k"), [(2, 3), (3, 1)])
def test_counts(method, s, k):
    c, d, x = 4, 5, torch.zeros(1, 4, 6, 7)
    up = Upsample2d(c, d, s, method=method, kernel_size=k, bias=False)
    size = (6 * s, 7 * s)
    inputs = F.max_pool2d(torch.zeros(1, c, *size), s, return_indices=True) if method == "unpool" else (x,)
    with FlopCounterMode(display=False) as counter:
        up(*inputs)
    own = s * s if method in {"pixel_shuffle", "transposed"} else 1
    assert sum(p.numel() for p in up.parameters()) == k * k * c * d * own
    assert counter.get_total_flops() == 2 * k * k * c * d * size[0] * size[1]
    assert up.bias is None


def even(method, **options):
    """The checkerboard in what a fresh layer makes of a constant image, away from the borders."""
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        up, x = Upsample2d(4, 3, method=method, **options).double(), torch.ones(1, 4, 10, 10, dtype=torch.float64)
        inputs = (x, torch.arange(100).view(1, 1, 10, 10).expand(1, 4, 10, 10) * 4) if method == "unpool" else (x,)
        s = up.factor
        found.append(float(checkerboard(up(*inputs).detach()[..., 4 * s : -4 * s, 4 * s : -4 * s], s).mean()))
    return found


def test_which_methods_start_without_a_checkerboard():
    for method in ("nearest", "bilinear", "bilinear_aligned", "pixel_shuffle"):
        assert max(even(method)) == 0, method
        assert max(even(method, factor=3)) == 0, method
    assert min(even("transposed")) == pytest.approx(1), "nothing but the pattern is left of a constant"


@EACH
def test_sizes_that_are_asked_for(method):
    up, x = layer(method), torch.randn(2, 4, 5, 3, dtype=torch.float64)
    if method == "unpool":
        image = torch.randn(2, 4, 11, 7, dtype=torch.float64)
        x, indices = F.max_pool2d(image, 2, return_indices=True)
        assert up(x, indices, size=(11, 7)).shape == (2, 3, 11, 7)
        return
    assert up(x, size=(9, 6)).shape == (2, 3, 9, 6)
    if method in {"pixel_shuffle", "transposed"}:
        assert torch.equal(up(x, size=(9, 5)), up(x)[..., :9, :5])
        with pytest.raises(ValueError, match=rf"{method} cuts its result \(10, 6\) to a size within it, got \(11, 6\)"):
            up(x, size=(11, 6))
    else:
        assert up(x, size=(11, 7)).shape == (2, 3, 11, 7)


def test_indices_go_with_unpooling():
    x = torch.zeros(2, 4, 5, 3)
    with pytest.raises(ValueError, match="indices go with the method unpool and with no other, got 'unpool'"):
        Upsample2d(4, 3, method="unpool")(x)
    with pytest.raises(ValueError, match="got 'nearest'"):
        Upsample2d(4, 3, method="nearest")(x, torch.zeros(2, 4, 5, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Upsample2d(4, 3, method="cubic"), "method must be one of nearest, bilinear, .*, unpool, got 'cubic'"),
        (lambda: Upsample2d(4, 3, 0), "Upsample2d: factor must be at least 1, got 0"),
        (lambda: Upsample2d(4, 0), "channels and kernel_size must be at least 1, got 4, 0 and 3"),
        (
            lambda: upsample2d(torch.zeros(4, 5, 3), torch.zeros(3, 4, 3, 3)),
            r"upsample2d: input must be \(b, c, y, x\)",
        ),
        (
            lambda: upsample2d(torch.zeros(1, 4, 5, 3), torch.zeros(4, 3, 3, 3), method="transposed"),
            r"weight must be \(c, d, s k, s k\).*weight \(4, 3, 3, 3\) and factor 2",
        ),
        (
            lambda: upsample2d(torch.zeros(1, 4, 5, 3), torch.zeros(3, 5, 3, 3)),
            r"got input \(1, 4, 10, 6\), weight \(3, 5, 3, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_printing():
    assert "4, 3, factor=3, method='pixel_shuffle', kernel_size=3" in str(Upsample2d(4, 3, 3, method="pixel_shuffle"))
    assert "4, 3, factor=2, method='transposed'" in str(Upsample2d(4, 3, method="transposed"))
    assert "4, 3, factor=2, method='bilinear'" in str(Upsample2d(4, 3))
