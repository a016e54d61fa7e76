"""Linear stand-ins with positive weights and the same support, for the check of receptive fields by gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.inspect.exported import Node, operation
from volvelle.inspect.receptive_field_shape import IDENTITIES

Form = Callable[[dict[str, Any], Node], Any]


class Unsupported(Exception):
    """An operation without a stand-in: what depends on it is not checked."""


def _floats(arguments: dict[str, Any]) -> list[Tensor]:
    flat = [v for value in arguments.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return [value for value in flat if isinstance(value, Tensor) and value.is_floating_point()]


def pointwise(arguments: dict[str, Any], node: Node) -> Any:
    """The mean of all operands after broadcasting."""
    operands = _floats(arguments)
    if not operands:
        raise Unsupported(operation(node))
    total = operands[0]
    for operand in operands[1:]:
        total = total + operand
    return total / len(operands)


def _as_is(arguments: dict[str, Any], node: Node) -> Any:
    """The operation itself: it moves elements, or is linear with weights that are not negative."""
    return node.target(**arguments)  # pyright: ignore[reportCallIssue]


def _first(arguments: dict[str, Any], node: Node) -> Any:
    return next(iter(arguments.values()))


def _shaped(arguments: dict[str, Any], node: Node) -> Any:
    return _first(arguments, node).reshape(node.meta["val"].shape)


def _convolved(arguments: dict[str, Any], node: Node) -> Any:
    return node.target(**{**arguments, "bias": None})  # pyright: ignore[reportCallIssue]


def _list(value: Any, count: int, default: int) -> list[int]:
    if value is None or (isinstance(value, list | tuple) and not value):
        return [default] * count
    value = [value] if isinstance(value, int) else list(value)
    return value * count if len(value) == 1 else value


def _pooled(arguments: dict[str, Any], node: Node) -> Any:
    """A sum over each window, as a convolution of every channel with ones."""
    x, name = arguments.get("self", arguments.get("input")), operation(node)
    rank = int(name[name.index("pool") + 4])
    kernel = _list(arguments["kernel_size"], rank, 1)
    stride = _list(arguments.get("stride"), rank, 0)
    stride = [s or k for s, k in zip(stride, kernel, strict=True)]
    padding, dilation = _list(arguments.get("padding"), rank, 0), _list(arguments.get("dilation"), rank, 1)
    value = node.meta["val"]
    sizes = (value[0] if isinstance(value, list | tuple) else value).shape[-rank:]
    assert isinstance(x, Tensor)
    amounts: list[int] = []
    for i in reversed(range(rank)):
        need = (sizes[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        amounts += [padding[i], need - padding[i] - x.shape[x.dim() - rank + i]]
    flat = F.pad(x, amounts).reshape(-1, 1, *(n + amounts[2 * (rank - 1 - i)] + amounts[2 * (rank - 1 - i) + 1]
                                              for i, n in enumerate(x.shape[-rank:])))  # fmt: skip
    convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    found = convolution(flat, torch.ones(1, 1, *kernel, dtype=x.dtype), stride=stride, dilation=dilation)
    found = found.reshape(*x.shape[:-rank], *sizes)
    return (found, found) if isinstance(value, list | tuple) else found


def _adaptive(arguments: dict[str, Any], node: Node) -> Any:
    rank = len(_list(arguments["output_size"], 1, 1))
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
    found = pool(arguments["self"], arguments["output_size"])
    return (found, found) if isinstance(node.meta["val"], list | tuple) else found


def _mean(arguments: dict[str, Any], node: Node) -> Any:
    if "other" in arguments:
        return pointwise(arguments, node)
    x = next(iter(arguments.values()))
    dims = arguments.get("dim")
    dims = list(range(x.dim())) if dims is None or dims == [] else dims
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, list | tuple) else value).shape
    found = x.mean(dims, keepdim=True).reshape(shape) if x.dim() else x
    return (found,) * len(value) if isinstance(value, list | tuple) else found


def _joined(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Each element and the mean over some dimensions."""
    return (x + x.mean(list(dims), keepdim=True)) / 2


def _along(arguments: dict[str, Any], node: Node) -> Any:
    found = _joined(next(iter(arguments.values())), [arguments["dim"]])
    return (found, found) if isinstance(node.meta["val"], list | tuple) else found


def _topk(arguments: dict[str, Any], node: Node) -> Any:
    found = arguments["self"].mean(arguments["dim"], keepdim=True).expand(node.meta["val"][0].shape)
    return found, found


def _layer_normed(arguments: dict[str, Any], node: Node) -> Any:
    x = arguments["input"]
    return _joined(x, range(x.dim() - len(arguments["normalized_shape"]), x.dim()))


def _group_normed(arguments: dict[str, Any], node: Node) -> Any:
    x, groups = arguments["input"], arguments["num_groups"]
    wide = x.reshape(x.shape[0], groups, -1)
    return _joined(wide, [2]).reshape(x.shape)


def _instance_normed(arguments: dict[str, Any], node: Node) -> Any:
    x = arguments["input"]
    return _joined(x, range(2, x.dim())) if arguments.get("use_input_stats", True) else x


def _product(arguments: dict[str, Any], node: Node) -> Any:
    """A b becomes a 1 + 1 b where both depend on the input, so that neither can hide the other."""
    names = [name for name, value in arguments.items() if isinstance(value, Tensor) and name != "bias"]
    bias = names.pop(0) if operation(node) in {"addmm", "baddbmm", "addbmm", "addmv"} else None
    ones = {name: torch.ones_like(arguments[name]) / max(1, arguments[name].shape[-1]) for name in names}
    kept = {k: v for k, v in arguments.items() if k != "bias"}
    moving = [name for name in names if arguments[name].requires_grad] or names[:1]
    total: Any = 0
    for name in moving:
        total = total + node.target(**{**kept, **ones, name: arguments[name]})  # pyright: ignore[reportCallIssue]
    return total if bias is None else total + arguments[bias]


def _einsum(arguments: dict[str, Any], node: Node) -> Any:
    operands = arguments["tensors"]
    moving = [i for i, operand in enumerate(operands) if operand.requires_grad] or [0]
    total: Any = 0
    for i in moving:
        mixed = [operand if j == i else torch.ones_like(operand) for j, operand in enumerate(operands)]
        total = total + torch.einsum(arguments["equation"], *mixed)
    return total


def _attended(arguments: dict[str, Any], node: Node) -> Any:
    if arguments.get("is_causal") or arguments.get("attn_mask") is not None:
        raise Unsupported("attention with a mask")
    q, k, v = (arguments[name] for name in ("query", "key", "value"))
    keys = k.mean((-2, -1), keepdim=True) + v.mean((-2, -1), keepdim=True)
    if keys.shape[-3] not in (1, q.shape[-3]):
        keys = keys.mean(-3, keepdim=True)
    return (q.mean(-1, keepdim=True) + keys).expand(node.meta["val"].shape)


def _glu(arguments: dict[str, Any], node: Node) -> Any:
    first, second = arguments["self"].chunk(2, arguments["dim"])
    return first + second


_MOVES = (
    "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "swapaxes", "movedim", "mT", "slice", "narrow", "select", "split", "split_with_sizes", "chunk", "unbind", "cat",
    "concat", "stack", "expand", "repeat", "tile", "repeat_interleave", "flip", "roll", "unfold", "im2col", "index",
    "index_select", "slice_scatter", "select_scatter", "pad", "constant_pad_nd", "reflection_pad2d", "cumsum",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "zeros_like", "ones_like", "zeros", "ones", "arange",
    "full", "new_zeros", "new_ones", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "native_channel_shuffle", "linspace", "eye", "full_like",
    "empty_like", "scalar_tensor",
)  # fmt: skip
_POOLS = [f"{kind}_pool{rank}d{end}" for kind in ("avg", "max") for rank in (1, 2, 3) for end in ("", "_with_indices")]
_MEANS = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min", "prod")

POSITIVE: dict[str, Form] = {
    **dict.fromkeys(_MOVES, _as_is),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _shaped),
    **dict.fromkeys(IDENTITIES, _first),
    **dict.fromkeys(("batch_norm", "cudnn_batch_norm"), _first),
    **dict.fromkeys([f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)], _convolved),
    "convolution": _convolved,
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys([f"adaptive_{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3)], _adaptive),
    **dict.fromkeys(_MEANS, _mean),
    **dict.fromkeys(("softmax", "log_softmax", "sort"), _along),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_normed),
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"), _product),
    "group_norm": _group_normed,
    "instance_norm": _instance_normed,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attended,
    "glu": _glu,
    "topk": _topk,
}
