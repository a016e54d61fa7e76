"""Depthwise convolutions trained in bf16 on CPUs: forward in bf16, gradients computed in fp32.

oneDNN 3 has no fast kernel for the gradients of depthwise convolutions in bf16: with 5 x 5 kernels, or strides on odd
sizes, they take four to five times as long as in fp32, and in networks of inverted residuals they are a third of a
training step. Here the forward pass stays bf16 (and so does what is kept for the backward pass), and the gradients are
computed in fp32, which is also the more exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Pair = tuple[int, int]


class DepthwiseConv(torch.autograd.Function):
    """conv2d in bf16 with one group a channel, whose gradients are computed in fp32. Not differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """bf16 result; `weight` and `bias` may be fp32."""
        x, small = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        ctx.bias = None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, small, None if bias is None else bias.bfloat16(), *ctx.geometry, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x (bf16), weight and bias (in their own dtypes)."""
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], ctx.bias is not None and ctx.needs_input_grad[2]]
        with torch.autocast("cpu", enabled=False):
            found = torch.ops.aten.convolution_backward(
                gradients[0].float(),
                x.float(),
                weight.float(),
                [weight.shape[0]] if ctx.bias is not None else None,
                *ctx.geometry,
                False,
                [0, 0],
                x.shape[1],
                wanted,
            )
        x_grad, w_grad, b_grad = found
        return (
            None if x_grad is None else x_grad.bfloat16(),
            None if w_grad is None else w_grad.to(weight.dtype),
            None if b_grad is None else b_grad.to(ctx.bias),
            None,
            None,
            None,
        )


class DepthwiseInFp32(TorchFunctionMode):
    """While the block runs, depthwise `conv2d` under bf16 autocast on a CPU computes its gradients in fp32.

    Everything else, and every other device, precision and kind of convolution, is left alone.

    >>> layer, x = torch.nn.Conv2d(4, 4, 5, padding=2, groups=4), torch.randn(1, 4, 8, 8)
    >>> with torch.autocast("cpu", torch.bfloat16), DepthwiseInFp32():
    ...     y = layer(x)
    >>> y.dtype, type(y.grad_fn).__name__
    (torch.bfloat16, 'DepthwiseConvBackward')
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at each call of conv2d."""
        kwargs = kwargs or {}
        if func is not torch.conv2d and func is not F.conv2d:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
        given |= kwargs
        x, weight, padding = given["input"], given["weight"], given.get("padding", 0)
        depthwise = 1 < given.get("groups", 1) == x.shape[1] == weight.shape[0] and x.dim() == 4
        if not (depthwise and not isinstance(padding, str) and _in_bf16(x) and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        stride, dilation = given.get("stride", 1), given.get("dilation", 1)
        return DepthwiseConv.apply(x, weight, given.get("bias"), _pair(stride), _pair(padding), _pair(dilation))


def _in_bf16(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
    )


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
