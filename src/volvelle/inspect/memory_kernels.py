"""What a kernel allocates and frees inside one operation, as formulas of the shapes.

A fake kernel tells only its results. Real ones also pack weights, copy inputs into blocked layouts, keep partial sums
per thread. On the CPU these buffers come from the same allocator as tensors, so a profiler counts them; the rules here
were derived from the kernels' sources and from what the allocator saw (torch 2.13, oneDNN 3.12, AVX-512), operation by
operation; memory_products has those of products. On CUDA the rules are those of FlashAttention-2's backward pass;
cuDNN's workspace is not modelled.

Every rule returns the extra bytes at the kernel's own peak: what it holds then, minus what its results occupy later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from volvelle.inspect.memory_products import Product, instructions, product_scratch

LANE = 16  # oneDNN pads channels to a vector of 16 floats
_ATEN = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)

Rule = Callable[["Kernels", tuple[Any, ...], dict[str, Any], Any], int]


@dataclass(frozen=True)
class Kernels:
    """The rules for one device. `threads` is the number of CPU threads that keep buffers of their own.

    Call it as `kernels(op, args, kwargs, result)` to get bytes.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        """Bytes that the kernel of this call holds besides its results."""
        rule = (_CPU if self.device == "cpu" else _CUDA).get(func.overloadpacket)
        if rule is not None:
            return max(0, rule(self, args, kwargs, result))
        if self.device == "cpu" and torch.Tag.pointwise in func.tags:
            return _mixed_types(args, result)
        return 0


def _bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _mixed_types(args: tuple[Any, ...], result: Any) -> int:
    """TensorIterator on the CPU converts the inputs that are not of the common type, each in full."""
    tensors = [t for t in tree_iter(args) if isinstance(t, Tensor) and t.dim() > 0]
    if len({t.dtype for t in tensors}) < 2 or not isinstance(result, Tensor):
        return 0
    common = tensors[0].dtype
    for tensor in tensors[1:]:
        common = torch.promote_types(common, tensor.dtype)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype not in (common, torch.bool))


def _convolution(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The library oneDNN reorders a plain (b, c, y, x) convolution into blocked layouts and its result back."""
    x, weight, stride, transposed, groups = args[0], args[1], args[3], args[6], args[8]
    if x.dim() != 4:
        return 0
    y, packed = result, _blocked_weight(weight, groups)
    if transposed:  # the kernel of a convolution's gradient: see there
        copies = 2 if max(stride) > 1 else 1
        gather = kernels.threads * (_bytes(x) // x.shape[0] + 4 * 4096)
        return max(_blocked(x) + packed + _bytes(y) + gather, (1 + copies) * _bytes(y)) - _bytes(y)
    if _channels_last(x, weight):
        ordered = weight.is_contiguous(memory_format=torch.channels_last) or groups > 1
        return packed + (0 if ordered else _bytes(weight))
    copies = 2 if _is_brgemm(weight, groups) else 1
    first = _input_copy(x) + packed + _blocked(y) + _strided_copy(kernels, x, weight, y, stride)
    return max(first, _blocked(y) + copies * _bytes(y)) - _bytes(y)


def _convolution_backward(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Two kernels one after the other: gradient of the input, then gradient of the weight."""
    grad, x, weight, stride, transposed, groups, mask = args[0], args[1], args[2], args[4], args[7], args[9], args[10]
    if x.dim() != 4:
        return 0
    dx, dw = _bytes(x) if mask[0] else 0, _bytes(weight) if mask[1] else 0
    strided, half = max(stride) > 1 and groups == 1, weight.dtype in _HALF
    # brgemm gathers one image of the gradient a thread; in half precision the weight's gradient is summed in fp32.
    gather = kernels.threads * (_bytes(grad) // grad.shape[0] + 4 * 4096) if strided else 0
    # ... from transposed copies of one image of both operands, or of a part of large images.
    images = min((_bytes(grad) + _bytes(x)) // grad.shape[0], 704 * 1024)
    sums = weight.numel() * 4 + kernels.threads * (images + 16 * 4096) if half and groups == 1 else 0
    packed = _blocked_weight(weight, groups)
    if _channels_last(x, weight):
        held = _bytes(weight) if groups == 1 else 0
        held += 0 if grad.is_contiguous(memory_format=torch.channels_last) else _bytes(grad)
        plain = dw if groups == 1 else 0  # once more, from channels-last to the weight's own layout
        gradient = _blocked_weight(weight, groups, gradient=True)
        stages = [held + dx + packed + gather] * mask[0] + [held + dx + gradient + max(plain + dw, sums)] * mask[1]
        return max(stages, default=0) - dx - dw
    held = 0 if grad.is_contiguous() else _bytes(grad)
    stages = [0]
    if mask[0] and transposed:
        stages += [_input_copy(grad) + packed + _blocked(x), _blocked(x) + dx]
    elif mask[0]:
        brgemm = strided or _is_brgemm(weight, groups)
        blocked, copies = (dx, 2) if brgemm else (_blocked(x), 1)
        stages += [_blocked(grad) + packed + blocked + gather, blocked + copies * dx]
    if mask[1]:
        # Depthwise kernels beyond 3 x 3 read plain layouts.
        direct = groups > 1 and max(weight.shape[2:]) > 3
        read = 0 if direct else _input_copy(grad) + _input_copy(x)
        stages += [dx + read + packed + max(sums, _strided_copy(kernels, x, weight, grad, stride)), dx + packed + dw]
    return held + max(stages) - dx - dw


def _is_brgemm(weight: Tensor, groups: int) -> bool:
    """Half precision runs on oneDNN's matrix-multiplication kernels, whose channels-last results are copied twice."""
    return groups == 1 and weight.dtype in _HALF


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether torch takes the channels-last path: either operand is laid out so and not also plainly contiguous."""
    form = torch.channels_last
    return any(not t.is_contiguous() and t.is_contiguous(memory_format=form) for t in (x, weight))


def _blocked(x: Tensor) -> int:
    b, c, *space = x.shape
    return b * _up(c, LANE) * math.prod(space) * x.element_size()


def _input_copy(x: Tensor) -> int:
    """An image of few channels is read as it is, except in half precision."""
    return _blocked(x) if x.shape[1] >= LANE else _bytes(x) if x.dtype in _HALF else 0


def _blocked_weight(weight: Tensor, groups: int, *, gradient: bool = False) -> int:
    out, inner, *kernel = weight.shape
    area = math.prod(kernel) * weight.element_size()
    if groups > 1 and inner == 1 and out == groups:
        return out * area * (LANE * LANE if gradient else 1)
    if groups > 1:
        return groups * _up(out // groups, LANE) * _up(inner, LANE) * area
    return _up(out, LANE) * (_up(inner, LANE) if inner >= LANE else inner) * area


def _strided_copy(kernels: Kernels, x: Tensor, weight: Tensor, y: Tensor, stride: Sequence[int]) -> int:
    """A strided 1 x 1 convolution first copies the pixels it needs, one image a thread.

    In half precision every strided one gathers its windows, about three images of them.
    """
    if max(stride) == 1:
        return 0
    if tuple(weight.shape[2:]) != (1, 1):
        return kernels.threads * 3 * (_bytes(x) // x.shape[0]) if x.dtype in _HALF else 0
    return kernels.threads * (x.shape[1] * math.prod(y.shape[2:]) * x.element_size() + 128)


def _batch_norm(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Mean and variance of each channel, before they are folded into the running ones."""
    return 2 * _bytes(args[1]) if args[5] else 0


def _batch_norm_backward(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The vectorised kernel, for operands laid out alike, needs one more tensor of the input's size."""
    grad, x = args[0], args[1]
    forms = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
    alike = any(grad.is_contiguous(memory_format=form) and x.is_contiguous(memory_format=form) for form in forms)
    return _bytes(x) if args[7] and alike else 0


def _layer_norm(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    return 0 if args[0].is_contiguous() else _bytes(args[0])


def _layer_norm_backward(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Non-contiguous operands are copied; each thread sums its own gradients of weight and bias."""
    grad, x, shape = args[0], args[1], args[2]
    copies = _bytes(*(t for t in (grad, x) if not t.is_contiguous()))
    return copies + 2 * kernels.threads * math.prod(shape) * max(4, x.element_size())


def _attention(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """One tile of scores, its maxima and sums, and one tile of the output for each thread."""
    q, k, v = args[:3]
    rows, columns = _tile(q, k)
    sums = 4 if q.dtype in _HALF else q.element_size()
    total = kernels.threads * (rows * columns + 2 * rows + rows * v.shape[-1]) * sums
    if q.dtype in _HALF:
        # Pairs of keys lie side by side: an odd number of them is rounded up.
        even = _up(columns, 2)
        total += kernels.threads * rows * even * q.element_size()
        total += _bytes(k) + _bytes(v) // v.shape[2] * _up(v.shape[2], 2)
        total += kernels.threads * columns * q.shape[-1] * q.element_size()
    return total


def _attention_backward(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    grad, q, k = args[:3]
    rows, columns = _tile(q, k)
    sums = 4 if q.dtype in _HALF else q.element_size()
    total = kernels.threads * (2 * rows * columns + rows) * sums
    total += 0 if grad.stride(-1) == 1 else _bytes(grad)  # an expanded gradient is written out
    if q.dtype in _HALF:
        total += kernels.threads * 2 * rows * columns * q.element_size()
    return total


def _tile(q: Tensor, k: Tensor) -> tuple[int, int]:
    n = q.shape[2]
    rows = 256 if n >= 768 else 64 if n >= 192 else 32
    return min(rows, n), min(512, k.shape[2])


def _product(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Copies of operands that BLAS cannot read, and what oneDNN packs in half precision."""
    a, b = args[-2:]
    copies = _bytes(*(t for t in (a, b) if not _has_leading_dimension(t)))
    return copies + (_packed(kernels, a, b) if b.dtype in _HALF else 0)


def _batched_product(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    a, b = args[-2:]
    return _packed(kernels, a, b) if b.dtype in _HALF else 0


def _packed(kernels: Kernels, a: Tensor, b: Tensor) -> int:
    *batch, m, k = a.shape
    transposed = a.stride(-1) != 1 and a.stride(-2) == 1
    product = Product(m, k, b.shape[-1], math.prod(batch), transposed)
    return product_scratch(product, b.dtype, kernels.threads, instructions())


def _has_leading_dimension(matrix: Tensor) -> bool:
    """Whether BLAS can read the matrix where it lies; an expanded gradient, for one, is written out first."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    return (right == 1 and down >= max(1, columns)) or (down == 1 and right >= max(1, rows))


def _logsumexp(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The exponentials of the differences from the maximum, and the maxima."""
    return _bytes(args[0]) + _bytes(result)


def _safe_softmax(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """A boolean map of the hidden scores, and one flag a row."""
    x = args[0]
    return x.numel() + x.numel() // max(1, x.shape[args[1]]) + 4


def _mean(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """A mean in half precision first converts its input to fp32."""
    return args[0].numel() * 4 if args[0].dtype in _HALF else 0


def _flash_backward_cuda(kernels: Kernels, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """FlashAttention-2 accumulates dq in fp32, keeps one sum a row, and expands dk and dv of grouped heads."""
    q, k, v = args[1], args[2], args[3]
    b, h, n, d = q.shape
    accumulators = b * h * _up(n, 128) * (_up(d, 32) + 1) * 4
    repeated = h // k.shape[1]
    return accumulators + (_bytes(k, v) * repeated if repeated > 1 else 0)


_CPU: dict[Any, Rule] = {
    _ATEN.convolution: _convolution,
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN.native_batch_norm: _batch_norm,
    _ATEN.native_batch_norm_backward: _batch_norm_backward,
    _ATEN.native_layer_norm: _layer_norm,
    _ATEN.native_layer_norm_backward: _layer_norm_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN.mean: _mean,
    _ATEN.mm: _product,
    _ATEN.addmm: _product,
    _ATEN.bmm: _batched_product,
    _ATEN.baddbmm: _batched_product,
    _ATEN.logsumexp: _logsumexp,
    _ATEN._safe_softmax: _safe_softmax,
}
_CUDA: dict[Any, Rule] = {_ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_cuda}
