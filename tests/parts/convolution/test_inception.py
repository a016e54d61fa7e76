"""Inception blocks: the figure written in torch, the paper's table of sizes and costs, the factorised forms' fields."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from volvelle.nn import InceptionBlock

# Szegedy et al. 2015, table 1: input width, the six columns, output width, operations in M, image size.
TABLE = {
    "3a": (192, (64, 96, 128, 16, 32, 32), 256, 128, 28),
    "3b": (256, (128, 128, 192, 32, 96, 64), 480, 304, 28),
    "4a": (480, (192, 96, 208, 16, 48, 64), 512, 73, 14),
    "4b": (512, (160, 112, 224, 24, 64, 64), 512, 88, 14),
    "4c": (512, (128, 128, 256, 24, 64, 64), 512, 100, 14),
    "4d": (512, (112, 144, 288, 32, 64, 64), 528, 119, 14),
    "4e": (528, (256, 160, 320, 32, 128, 128), 832, 170, 14),
    "5a": (832, (256, 160, 320, 32, 128, 128), 832, 54, 7),
    "5b": (832, (384, 192, 384, 48, 128, 128), 1024, 71, 7),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_papers_table(name):
    """Operations as printed; only those of 5a, 54 M, do not follow from the widths that stand beside them."""
    c, widths, out, millions, size = TABLE[name]
    with torch.device("meta"):
        block, x = InceptionBlock(c, *widths), torch.zeros(1, c, size, size)
        with FlopCounterMode(display=False) as counter:
            result = block(x)
    assert result.shape == (1, out, size, size)
    assert block.out_channels == out
    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1)
    n1, r3, n3, r5, n5, p = widths
    assert weights == c * n1 + c * r3 + 9 * r3 * n3 + c * r5 + 25 * r5 * n5 + c * p
    assert counter.get_total_flops() == 2 * weights * size**2
    assert (abs(weights * size**2 / 1e6 - millions) < 1) == (name != "5a")


def conv(layer, x):
    return nn.functional.conv2d(
        x, layer.conv.weight, layer.conv.bias, padding=tuple(k // 2 for k in layer.conv.kernel_size)
    ).relu()


@pytest.mark.parametrize("reduced", [True, False])
def test_the_figure(reduced):
    torch.manual_seed(0)
    widths = (2, 3, 4, 5, 6, 7) if reduced else (2, None, 4, None, 6, None)
    block, x = InceptionBlock(3, *widths).double(), torch.randn(2, 3, 6, 9, dtype=torch.float64)
    chain = lambda branch, x: functools.reduce(lambda y, layer: conv(layer, y), branch, x)  # noqa: E731
    pooled = nn.functional.max_pool2d(x, 3, 1, 1)
    expected = [conv(block.branch1, x), chain(block.branch2, x), chain(block.branch3, x)]
    expected.append(chain(block.branch4[1:], pooled) if reduced else pooled)
    torch.testing.assert_close(block(x), torch.cat(expected, 1))
    assert block.out_channels == sum(e.shape[1] for e in expected)
    weights = sum(p.numel() for p in block.parameters() if p.ndim > 1)
    assert reduced or weights == 3 * 2 + 9 * 3 * 4 + 25 * 3 * 6


def field(branch, size=21):
    """Which inputs the middle of a branch's output sees, weights positive."""
    branch = branch.double()
    for parameter in branch.parameters():
        nn.init.ones_(parameter)
    x = torch.ones(1, 2, size, size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(branch(x)[0, :, size // 2, size // 2].sum(), x)
    return gradient[0, 0] > 0


@pytest.mark.parametrize(("factor", "k"), [("square", 7), ("stacked", 7), ("asymmetric", 7), ("asymmetric", 3)])
def test_a_factorised_kernel_has_the_same_field(factor, k):
    seen = field(InceptionBlock(2, 2, 2, 2, 2, 2, 2, factor=factor, kernels=(3, k)).branch3)
    expected = torch.zeros_like(seen)
    expected[10 - k // 2 : 11 + k // 2, 10 - k // 2 : 11 + k // 2] = True
    assert torch.equal(seen, expected)


def test_spread_is_a_cross():
    seen = field(InceptionBlock(2, 2, 2, 2, 2, 2, 2, factor="spread").branch2)
    expected = torch.zeros_like(seen)
    expected[10, 9:12] = expected[9:12, 10] = True
    assert torch.equal(seen, expected)
    seen = field(InceptionBlock(2, 2, 2, 2, 2, 2, 2, factor="spread", kernels=(3, 5)).branch3)
    assert seen.sum() == 9 + 4 * 3, "3 x 3, then the cross"


@pytest.mark.parametrize(
    ("factor", "per_pixel"),
    [
        ("square", 25 * 8 * 8),
        ("stacked", 2 * 9 * 8 * 8),  # 28 % less, section 3.1
        ("asymmetric", 2 * 5 * 8 * 8),
        ("spread", 9 * 8 * 4 + 2 * 3 * 4 * 4),
    ],
)
def test_costs_of_the_forms(factor, per_pixel):
    branch = InceptionBlock(3, 2, 2, 2, 8, 8, 2, factor=factor).branch3
    assert sum(p.numel() for p in branch[1:].parameters() if p.ndim > 1) == per_pixel


def test_norms_and_names():
    norm = functools.partial(nn.BatchNorm2d, eps=1e-3)
    block = InceptionBlock(3, 2, 2, 4, 2, 4, 2, norm=norm, factor="asymmetric")
    names = set(block.state_dict())
    assert {"branch1.conv.weight", "branch1.bn.running_mean", "branch2.0.conv.weight", "branch4.1.bn.weight"} <= names
    assert not any(name.endswith("conv.bias") for name in names), "redundant before a norm"
    assert all(m.eps == 1e-3 for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    assert block.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 12, 1, 1)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ((2, 0, 2, 2, 2, 2), {}, r"widths must be at least 1, got \[3, 2, 0"),
        ((2, 2, 2, 2, 2, 2), {"factor": "round"}, "factor must be one of square, stacked, asymmetric, spread"),
        ((2, 2, 2, 2, 2, 2), {"kernels": (3, 4)}, r"kernels must be odd and at least 1 when square, got \(3, 4\)"),
        ((2, 2, 2, 2, 2, 2), {"kernels": (1, 3), "factor": "stacked"}, "at least 3 when stacked"),
        ((2, 2, 3, 2, 2, 2), {"factor": "spread"}, r"must be even when spread, got \(3, 2\)"),
    ],
)
def test_what_cannot_be_is_named(widths, options, message):
    with pytest.raises(ValueError, match=message):
        InceptionBlock(3, *widths, **options)
