"""Depthwise convolutions whose gradients are computed in fp32: as exact as they say, and only where they should be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from volvelle.parts.precision.depthwise import DepthwiseInFp32


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "size"),
    [(3, 1, 1, 1, (8, 9)), (5, 2, 0, 1, (11, 13)), (5, 1, 4, 2, (7, 6)), ((3, 5), (2, 1), (1, 2), 1, (9, 8))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_fp64_within_the_rounding_of_their_inputs(kernel, stride, padding, dilation, size, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=6, bias=bias)
    x = torch.randn(3, 6, *size).bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), DepthwiseInFp32():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    g = torch.randn(y.shape).bfloat16()
    y.backward(g)
    exact = [x.detach().double().requires_grad_(), *(p.detach().double().requires_grad_() for p in layer.parameters())]
    z = F.conv2d(exact[0], exact[1], exact[2] if bias else None, stride, padding, dilation, 6)
    z.backward(g.double())
    assert relative(y, z.detach()) < 5e-3  # the forward pass is bf16
    assert relative(x.grad, exact[0].grad) < 5e-3  # rounded to bf16 on its way to the layer before
    for parameter, reference in zip(layer.parameters(), exact[1:], strict=True):
        assert parameter.grad is not None
        assert relative(parameter.grad, reference.grad) < 1e-6


def test_everything_else_is_left_alone():
    x = torch.randn(1, 4, 6, 6)
    depthwise, dense, grouped = (nn.Conv2d(4, 4, 3, groups=groups) for groups in (4, 1, 2))

    def kind(layer, *, autocast=True, dtype=torch.bfloat16, mode=True):
        import contextlib

        context = torch.autocast("cpu", dtype, enabled=autocast)
        with context, DepthwiseInFp32() if mode else contextlib.nullcontext():
            return type(layer(x).grad_fn).__name__

    assert kind(depthwise) == "DepthwiseConvBackward"
    assert kind(dense) == kind(dense, mode=False)
    assert kind(grouped) == kind(grouped, mode=False)
    assert kind(depthwise, autocast=False) == kind(dense, autocast=False) == "ConvolutionBackward0"
    assert kind(depthwise, dtype=torch.float16) == "ConvolutionBackward0"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), DepthwiseInFp32():
        assert depthwise(x).grad_fn is None


def test_a_second_derivative_is_refused_by_name():
    layer, x = nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), DepthwiseInFp32():
        y = layer(x).float().square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
