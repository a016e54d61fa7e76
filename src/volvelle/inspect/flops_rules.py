"""Counts of single operations: multiply-accumulates of products by hand formulas, and all other arithmetic apart.

Products (convolution, linear, matmul, attention) are counted in MACs. Everything else goes by these rules, in
operations: a pointwise operation 1 an element; a bias 1 an output; batch normalisation with stored statistics 2 an
element (scale and shift); layer, group and instance normalisation 5 (two for the statistics, two to normalise, one
reciprocal root spread out) and 2 more with weights; RMS normalisation 3 and 1 more; softmax 5; a reduction 1 an input;
pooling 1 for each tap of each output; nearest interpolation 0, linear 2·2^d - 1 an output in d dimensions, cubic
2·4^d - 1. Lookups and whatever only moves elements are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from volvelle.inspect.exported import Node, bound, operation, shape_of
from volvelle.inspect.receptive_field_shape import IDENTITIES


class Count(NamedTuple):
    """MACs of products, and operations beside them."""

    macs: int = 0
    other: int = 0


Rule = Callable[[Node, dict[str, Any]], Count]


def _size(value: Any) -> int:
    shape = shape_of(value)
    return 0 if shape is None else math.prod(shape)


def _result(node: Node) -> tuple[int, ...]:
    value = node.meta["val"]
    value = value[0] if isinstance(value, list | tuple) else value
    return tuple(int(n) for n in value.shape)


def _shape(value: Any) -> tuple[int, ...]:
    shape = shape_of(value)
    assert shape is not None
    return shape


def _convolution(node: Node, args: dict[str, Any]) -> Count:
    """Every output: C_in / groups * prod(k) MACs; transposed, every input: C_out / groups * prod(k)."""
    weight, out = _shape(args["weight"]), math.prod(_result(node))
    places = _size(args["input"]) if "transpose" in operation(node) or args.get("transposed") else out
    return Count(places * weight[1] * math.prod(weight[2:]), out if args.get("bias") is not None else 0)


def _linear(node: Node, args: dict[str, Any]) -> Count:
    out = math.prod(_result(node))
    return Count(out * _shape(args["weight"])[-1], out if args.get("bias") is not None else 0)


def _matmul(node: Node, args: dict[str, Any]) -> Count:
    """Every output: the length of the contracted dimension."""
    names = {"addmm": "mat1", "addmv": "mat", "baddbmm": "batch1", "addbmm": "batch1"}
    name = names.get(operation(node), "self")
    left, out = _shape(args[name]), math.prod(_result(node))
    plus = out if name != "self" else 0
    if operation(node) == "addbmm":
        return Count(out * left[-1] * left[0], plus)
    return Count(out * left[-1], plus)


def _outer(node: Node, args: dict[str, Any]) -> Count:
    return Count(math.prod(_result(node)))


def _einsum(node: Node, args: dict[str, Any]) -> Count:
    """Operands from left to right, two at a time; each step costs the product of all indices it touches."""
    left, arrow, result = str(args["equation"]).replace(" ", "").partition("->")
    shapes = [_shape(operand) for operand in args["tensors"]]
    terms = [_spelled(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)]
    if not arrow:
        letters = "".join(terms)
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    result = _spelled(result, len(_result(node)))
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, n in zip(term, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), n)
    macs, held = 0, set(terms[0])
    for i, term in enumerate(terms[1:], 1):
        touched = held | set(term)
        macs += math.prod(sizes[letter] for letter in touched)
        held = touched & set("".join([*terms[i + 1 :], result]))
    return Count(macs, 0 if len(terms) > 1 else math.prod(shapes[0]))


def _spelled(term: str, rank: int) -> str:
    """An ellipsis as letters of its own, named from the right, so that equal places share a name."""
    if "..." not in term:
        return term
    count = rank - len(term) + 3
    return term.replace("...", "".join(chr(0x2460 + count - 1 - i) for i in range(count)))


def _attention(node: Node, args: dict[str, Any]) -> Count:
    """Scores and their sum over values: (d + d_v) MACs for each visible pair of each query head; softmax beside it.

    With `is_causal` query i sees the keys j <= i; a mask given as a tensor hides nothing from the count.
    """
    *lead, queries, width = _shape(args["query"])
    keys, out = _shape(args["key"])[-2], _shape(args["value"])[-1]
    pairs = sum(min(i + 1, keys) for i in range(queries)) if args.get("is_causal") else queries * keys
    pairs *= math.prod(lead)
    return Count(pairs * (width + out), 6 * pairs)


def _recurrent(node: Node, args: dict[str, Any]) -> Count:
    """Every step multiplies the input and the state by the weights; gates are pointwise: 1 a weight row."""
    weights = [_shape(w) for w in (args.get("params") or args.get("_2") or []) if len(_shape(w)) == 2]
    steps = _size(args["input"]) // _shape(args["input"])[-1]
    return Count(steps * sum(math.prod(w) for w in weights), steps * sum(w[0] for w in weights))


def _normed(statistics: int, scaled: int) -> Rule:
    def count(node: Node, args: dict[str, Any]) -> Count:
        n = math.prod(_result(node))
        return Count(0, n * (statistics + (scaled if args.get("weight") is not None else 0)))

    return count


def _each_output(times: int) -> Rule:
    return lambda node, args: Count(0, times * math.prod(_result(node)))


def _each_input(node: Node, args: dict[str, Any]) -> Count:
    if "other" in args:
        return Count(0, math.prod(_result(node)))
    return Count(0, _size(next(iter(args.values()))))


def _pool(node: Node, args: dict[str, Any]) -> Count:
    name = operation(node)
    rank = int(name[name.index("pool") + 4])
    kernel = args["kernel_size"]
    kernel = [kernel] * rank if isinstance(kernel, int) else list(kernel) * (rank if len(kernel) == 1 else 1)
    return Count(0, math.prod(_result(node)) * math.prod(kernel))


def _adaptive(node: Node, args: dict[str, Any]) -> Count:
    """Each output takes the inputs of its own window; the windows of one dimension may overlap."""
    source, out = _shape(args["self"]), _result(node)
    taps = 1
    for n, count in zip(source, out, strict=True):
        taps *= n if n == count else sum(-((j + 1) * n // -count) - j * n // count for j in range(count))
    return Count(0, taps)


def _interpolated(node: Node, args: dict[str, Any]) -> Count:
    name, out = operation(node), _result(node)
    if "nearest" in name:
        return Count()
    return Count(0, math.prod(out) * (2 * (4 if "cubic" in name else 2) ** (len(out) - 2) - 1))


_FREE = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "swapaxes", "movedim", "mT", "numpy_T", "slice", "narrow", "select", "split", "split_with_sizes", "chunk",
    "unbind", "tensor_split", "cat", "concat", "stack", "expand", "expand_as", "repeat", "tile", "repeat_interleave",
    "flip", "roll", "unfold", "im2col", "index", "index_select", "gather", "slice_scatter", "select_scatter", "pad",
    "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "embedding", "embedding_bag", "getitem",
    "copy", "zeros", "ones", "full", "arange", "zeros_like", "ones_like", "full_like", "empty", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "triu", "tril", "masked_fill", "where", "fill", "zero", "scatter",
    "index_put", "index_copy", "diagonal", "view_as", "reshape_as", "broadcast_to", "rand", "randn", "scalar_tensor",
    "max_unpool2d", "max_unpool3d", "sym_size", "view_as_real", "view_as_complex", "one_hot", "native_channel_shuffle",
    "linspace", "eye", "atleast_3d", "ravel", "rand_like", "randn_like", "broadcast_tensors", "diff_view",
)  # fmt: skip
_REDUCTIONS = (
    "mean", "sum", "amax", "amin", "prod", "logsumexp", "norm", "linalg_vector_norm", "any", "all", "argmax", "argmin",
    "max", "min", "var", "std", "cumsum", "cumprod", "topk", "sort",
)  # fmt: skip
_POOLS = [f"{kind}_pool{rank}d{end}" for kind in ("avg", "max") for rank in (1, 2, 3) for end in ("", "_with_indices")]
_UPSAMPLES = [
    f"{start}upsample_{kind}{rank}d{end}"
    for rank in (1, 2, 3)
    for kind in ("nearest", "nearest_exact", "linear", "bilinear", "trilinear", "bicubic")
    for start in ("", "_")
    for end in ("", "_aa")
]

RULES: dict[str, Rule] = {
    **dict.fromkeys((*_FREE, *IDENTITIES), lambda node, args: Count()),
    **dict.fromkeys([f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)], _convolution),
    "convolution": _convolution,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "inner", "vdot"), _matmul),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm"), _matmul),
    **dict.fromkeys(("outer", "ger"), _outer),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("batch_norm", "cudnn_batch_norm"), _each_output(2)),
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm"), _normed(5, 2)),
    "rms_norm": _normed(3, 1),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_safe_softmax"), _each_output(5)),
    **dict.fromkeys(_REDUCTIONS, _each_input),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys([f"adaptive_{kind}_pool{rank}d" for kind in ("avg", "max") for rank in (1, 2, 3)], _adaptive),
    **dict.fromkeys(_UPSAMPLES, _interpolated),
    "glu": _each_output(2),
}


def count(node: Node) -> Count | None:
    """What one operation costs; None when there is no rule for it."""
    from volvelle.inspect.receptive_field_walk import ELEMENTWISE

    name = operation(node)
    if name in RULES:
        return RULES[name](node, bound(node))
    if name in ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        value = node.meta.get("val")
        return Count(0, math.prod(_result(node)) if value is not None else 0)
    return None
