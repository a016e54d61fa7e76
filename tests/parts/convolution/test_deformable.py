"""Deformable convolution: its loop, the peer, convolution at rest, shifts, derivatives, NaNs, dtypes, graphs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.parts.regions import loops
from tests.parts.regions.peer import torchvision

from volvelle.functional import deform_conv2d
from volvelle.nn import DeformConv2d

CASES = [((3, 3), 1, 1, 1, 1, 1), ((3, 2), 2, 1, 1, 2, 1), ((3, 3), 1, 2, 2, 1, 2), ((1, 3), 2, 0, 1, 2, 4)]
EACH = pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "moving", "groups"), CASES)


def case(kernel, stride, padding, dilation, moving, groups, spread=2.0):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, 7, generator=g, dtype=torch.float64)
    weight = torch.randn(4, 8 // groups, *kernel, generator=g, dtype=torch.float64)
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip((6, 7), kernel, strict=True)]
    taps = moving * kernel[0] * kernel[1]
    offset = torch.randn(2, 2 * taps, *size, generator=g, dtype=torch.float64) * spread
    mask = torch.rand(2, taps, *size, generator=g, dtype=torch.float64)
    return x, offset, weight, mask


def close(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=1e-12, rtol=0)


@EACH
def test_its_loop_and_convolution_at_rest(kernel, stride, padding, dilation, moving, groups):
    x, offset, weight, mask = case(kernel, stride, padding, dilation, moving, groups)
    where = (stride, padding, dilation)
    for scale in (None, mask):
        expected = loops.deform_conv2d(
            x.numpy(), offset.numpy(), weight.numpy(), *where, None if scale is None else scale.numpy()
        )
        close(deform_conv2d(x, offset, weight, None, *where, scale), expected)
    bias = torch.randn(4, dtype=torch.float64)
    close(deform_conv2d(x, offset * 0, weight, bias, *where), F.conv2d(x, weight, bias, *where, groups))
    whole = torch.tensor([1.0, -2.0], dtype=torch.float64).repeat(offset.shape[1] // 2).view(1, -1, 1, 1)
    shifted = F.pad(x, (2, -2, -1, 1))  # one down, two to the left
    found = deform_conv2d(x, whole.expand_as(offset), weight, None, stride, 0, dilation) if padding == 0 else None
    if found is not None:
        close(found, F.conv2d(shifted, weight, None, stride, 0, dilation, groups))


@pytest.mark.peer
@EACH
def test_torchvision_agrees(kernel, stride, padding, dilation, moving, groups):
    peer = torchvision()
    inputs = [t.requires_grad_() for t in case(kernel, stride, padding, dilation, moving, groups)]
    x, offset, weight, mask = inputs
    found = deform_conv2d(x, offset, weight, None, stride, padding, dilation, mask)
    numbers = (stride, stride, padding, padding, dilation, dilation, groups, moving, True)
    expected = peer.deform_conv2d(x, weight, offset, mask, torch.zeros(4, dtype=torch.float64), *numbers)
    close(found, expected)
    u = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, u), torch.autograd.grad(expected, inputs, u), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("groups", [1, 2])
def test_derivatives_over_the_borders(groups):
    g = torch.Generator().manual_seed(1)
    shapes = ((1, 2, 3, 4), (1, 16, 4, 5), (2, 2 // groups, 2, 2), (1, 8, 4, 5))
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]

    def run(x, offset, weight, mask):
        return deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_odd_offsets_and_maps_stay_local():
    x, offset, weight, _ = case(*CASES[0])
    clean = deform_conv2d(x, offset, weight, None, 1, 1)
    for odd in (math.nan, math.inf, -math.inf, 1e30):
        bad = offset.clone().requires_grad_()
        with torch.no_grad():
            bad[0, 3, 2, 4] = odd
        found = deform_conv2d(x, bad, weight, None, 1, 1)
        changed = (found != clean).any(1)
        assert int(changed.sum()) <= 1
        assert bool(found.isnan().any()) == math.isnan(odd), "an infinite offset reads the zeros outside"
        found.nan_to_num(0.0).sum().backward()
    other = x.clone()
    other[1] = math.nan
    assert torch.equal(deform_conv2d(other, offset, weight, None, 1, 1)[0], clean[0])
    assert deform_conv2d(x[:0], offset[:0], weight, None, 1, 1).shape == (0, 4, 6, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_autocast(dtype):
    x, offset, weight, mask = (t.to(dtype) for t in case(*CASES[0]))
    exact = deform_conv2d(x.double(), offset.double(), weight.double(), None, 1, 1, 1, mask.double())
    found = deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 64 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        mixed = deform_conv2d(x.float(), offset, weight.float(), torch.zeros(4), 1, 1, 1, mask)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.double() - exact).abs().max() <= 64 * torch.finfo(torch.bfloat16).eps


def test_one_graph():
    torch.compiler.reset()
    x, offset, weight, mask = (t.requires_grad_() for t in case(*CASES[0]))
    run = torch.compile(
        lambda x, o, w, m: deform_conv2d(x, o, w, None, 1, 1, 1, m), fullgraph=True, backend="aot_eager"
    )
    found, expected = run(x, offset, weight, mask), deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)
    close(found, expected)
    inputs = (x, offset, weight, mask)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        close(ours, theirs)


def test_a_layer_at_rest_is_the_convolution_of_its_weights():
    layer = DeformConv2d(3, 4, 3, padding=1)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    conv.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(layer(x, torch.zeros(2, 18, 5, 6)), conv(x))


def test_bad_calls_are_named():
    x, offset, weight, mask = case(*CASES[0])
    with pytest.raises(ValueError, match=r"deform_conv2d: offset must be \(b, 2 g K K, 6, 7\).*offset \(2, 17, 6, 7\)"):
        deform_conv2d(x, offset[:, :17], weight, None, 1, 1)
    with pytest.raises(ValueError, match=r"deform_conv2d: mask must be half of the offset, got \(2, 8, 6, 7\)"):
        deform_conv2d(x, offset, weight, None, 1, 1, 1, mask[:, :8])
    with pytest.raises(ValueError, match="DeformConv2d: groups must divide 3 and 4, got 2"):
        DeformConv2d(3, 4, 3, groups=2)
