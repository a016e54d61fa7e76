"""Receptive fields through operations that mix elements along dimensions: products, reductions, norms, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from volvelle.inspect.receptive_field_call import Call, Field, Result, each, rule
from volvelle.inspect.receptive_field_space import slid

LARGEST = 1 << 16
"""Elements of a product for which every pair of rows is kept apart; larger ones (scores) join all columns first."""

_REDUCTIONS = (
    "mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "norm", "linalg_vector_norm", "any", "all",
    "argmax", "argmin", "nansum", "nanmean", "median", "max", "min", "mode", "nanmedian", "kthvalue", "aminmax",
    "var_mean", "std_mean", "count_nonzero", "linalg_norm", "frobenius_norm",
)  # fmt: skip


@rule(*_REDUCTIONS)
def _reduced(call: Call) -> Result:
    if "other" in call.args:  # max and min of two tensors
        return call.join([call.of(node) for node in call.tensors()])
    field = call.of(call.node.args[0])
    count = len(call.node.meta["val"]) if isinstance(call.node.meta.get("val"), list | tuple) else 0
    if field is None:
        return [None] * count if count else None
    dims = call.dims("dim", len(field[0].shape))
    found = each(field, lambda r: r.reduce(dims).reshape(call.out).compact())
    return [found] * count if count else found


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "normalize", "fft_fft", "fft_ifft", "fft_rfft", "sort",
      "argsort", "flip_sort", "renorm", "_safe_softmax", "softmin")  # fmt: skip
def _along(call: Call) -> Result:
    """Every element depends on all that share its line along one dimension."""
    field = call.of(call.node.args[0])
    count = len(call.node.meta["val"]) if isinstance(call.node.meta.get("val"), list | tuple) else 0
    if field is None:
        return [None] * count if count else None
    found = _lines(field, call.dims("dim", len(field[0].shape)), call.out)
    return [found] * count if count else found


def _lines(field: Field, dims: Sequence[int], shape: Sequence[int]) -> Field:
    """Each element joined with the union over `dims`."""
    if tuple(shape) != field[0].shape:
        return each(field, lambda r: r.reduce(dims).broadcast(shape))
    return each(field, lambda r: r.union(r.reduce(dims), shape).compact())


@rule("topk")
def _topk(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return [None, None]
    dim = call.number("dim", -1) % len(call.out)
    found = each(field, lambda r: r.reduce([dim]).broadcast(call.out))
    return [found, found]


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def _cumulative(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    dim = call.number("dim") % len(call.out)
    if not call.bounded:
        found = _lines(field, [dim], call.out)
    else:
        n = call.out[dim]
        found = slid(field, dim, np.minimum(np.arange(n)[:, None], np.arange(n)), None)
    return [found, found] if isinstance(call.node.meta["val"], list | tuple) else found


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _normed(call: Call) -> Result:
    field = call.field("input")
    if field is None:
        return None
    rank = len(field[0].shape)
    found = _lines(field, range(rank - len(call.args["normalized_shape"]), rank), field[0].shape)
    return [found, None, None] if call.op.startswith(("native", "_fused")) else found


@rule("group_norm", "native_group_norm")
def _group_normed(call: Call) -> Result:
    field = call.field("input")
    if field is None:
        return None
    shape = field[0].shape
    groups = call.number("num_groups", call.number("group", 1))
    wide = (shape[0], groups, shape[1] // groups, *shape[2:])
    dims = range(2, len(wide))
    found = each(_lines(each(field, lambda r: r.reshape(wide)), dims, wide), lambda r: r.reshape(shape).compact())
    return [found, None, None] if call.op.startswith("native") else found


@rule("instance_norm")
def _instance_normed(call: Call) -> Result:
    field = call.field("input")
    if field is None or not call.args.get("use_input_stats", True):
        return field
    return _lines(field, range(2, len(call.out)), call.out)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "native_batch_norm",
      "_native_batch_norm_legit")  # fmt: skip
def _batch_normed(call: Call) -> Result:
    """With stored statistics every element is on its own."""
    field = call.field("input")
    training = call.args.get("training", False)
    if field is not None and training:
        call.note("batch normalisation by the batch's own statistics")
        field = _lines(field, [0, *range(2, len(field[0].shape))], field[0].shape)
    return [field, None, None] if "native" in call.op else field


@rule("linear", "addmm", "addbmm", "baddbmm", "addmv", "mm", "bmm", "matmul", "mv", "dot", "inner", "bilinear",
      "_grouped_mm", "outer", "ger", "vdot")  # fmt: skip
def _product(call: Call) -> Result:
    if call.op == "bilinear":
        nodes = [call.field("input1"), call.field("input2")]
        parts = [None if f is None else each(f, lambda r: r.reduce([-1])) for f in nodes]
        return call.join(parts)
    names = {"linear": ("input", "weight"), "addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")}
    names |= dict.fromkeys(("baddbmm", "addbmm"), ("batch1", "batch2")) | {
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
    }
    names |= {"mv": ("self", "vec"), "dot": ("self", "tensor"), "ger": ("self", "vec2"), "outer": ("self", "vec2")}
    first, second = names.get(call.op, ("self", "other"))
    if call.op in {"outer", "ger"}:
        a, b = call.field(first), call.field(second)
        rows = None if a is None else each(a, lambda r: r.reshape((*r.shape, 1)))
        return call.join([rows, b])
    left, right = _factor(call, first, -1), _factor(call, second, -1 if call.op in {"linear", "inner"} else -2)
    bias = call.field("bias" if call.op == "linear" else "self") if call.op in {"linear", "addmm", "baddbmm"} else None
    if left is not None and right is not None and math.prod(call.out) > LARGEST:
        right = each(right, lambda r: r.reduce([-1]).broadcast(r.shape))
    if call.op == "addbmm":
        left, right = (None if f is None else each(f, lambda r: r.reduce([0], keep=False)) for f in (left, right))
    return call.join([left, right, bias])


def _factor(call: Call, name: str, contracted: int) -> Field | None:
    """The field of one side of a product, summed over the contracted dimension and laid out as the result's."""
    field = call.field(name)
    if field is None:
        return None
    rank = len(field[0].shape)
    if rank == 1:
        return each(field, lambda r: r.everything().reshape(()))
    found = each(field, lambda r: r.reduce([contracted]))
    other = len(call.shape({"self": "other"}.get(name, "self"))) if call.op == "matmul" else 2
    if contracted == -1 and other == 1:  # matrix times vector
        return each(found, lambda r: r.reshape(r.shape[:-1]))
    if contracted == -1 and call.op in {"linear", "inner"} and name in {"weight", "other"}:
        order = [*range(rank - 2), rank - 1, rank - 2]
        return each(found, lambda r: r.permute(order))
    if call.op == "mv":
        return each(found, lambda r: r.reshape(r.shape[:-1]))
    return found


@rule("einsum")
def _einsum(call: Call) -> Result:
    equation = str(call.args["equation"]).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if "." in equation:
        call.note("einsum with an ellipsis: all elements are joined")
        fields = [call.of(node) for node in call.args["tensors"]]
        return call.join([None if f is None else each(f, lambda r: r.everything().expand(call.out)) for f in fields])
    if not arrow:
        letters = sorted(set("".join(terms)))
        result = "".join(letter for letter in letters if "".join(terms).count(letter) == 1)
    parts = []
    for term, node in zip(terms, call.args["tensors"], strict=True):
        field = call.of(node)
        if field is None:
            continue
        gone = [i for i, letter in enumerate(term) if letter not in result or term.index(letter) != i]
        kept = [letter for i, letter in enumerate(term) if i not in gone]
        found = each(field, lambda r, dims=gone: r.reduce(dims, keep=False) if dims else r)
        order = [kept.index(letter) for letter in result if letter in kept]
        sizes = [field[0].shape[term.index(letter)] if letter in kept else 1 for letter in result]
        parts.append(each(found, lambda r, o=order, s=sizes: r.permute(o).reshape(s)))
    if len(parts) > 1 and math.prod(call.out) > LARGEST:
        parts[1:] = [each(part, lambda r: r.everything().expand((1,) * len(call.out))) for part in parts[1:]]
    return call.join(parts)


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
      "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_flash_attention")  # fmt: skip
def _attention(call: Call) -> Result:
    """A query sees itself and all keys and values, whatever the mask hides."""
    q, k, v = (call.field(name) for name in ("query", "key", "value"))
    parts = [] if q is None else [each(q, lambda r: r.reduce([-1]))]
    for part in (k, v):
        if part is not None:
            seen = each(part, lambda r: r.reduce([-2, -1]))
            if seen[0].shape[-3] not in (1, call.out[-3]):
                seen = each(seen, lambda r: r.reduce([-3]))
            parts.append(seen)
    if parts and (call.args.get("is_causal") or call.args.get("attn_mask") is not None):
        call.note("attention with a mask: what the mask hides is counted as seen")
    found = call.join(parts)
    return found if call.op == "scaled_dot_product_attention" or found is None else [found] + [None] * 8


@rule("glu")
def _glu(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    dim = call.number("dim", -1) % len(call.out)
    n = call.out[dim]
    first, second = (slid(field, dim, np.arange(start, start + n)[:, None], (1, 1)) for start in (0, n))
    return call.join([first, second])


@rule("cosine_similarity", "pairwise_distance")
def _paired(call: Call) -> Result:
    rank = len(call.out) + 1
    dim = call.number("dim", 1) % rank if call.op == "cosine_similarity" else rank - 1
    parts = [call.of(node) for node in call.tensors()]
    return call.join([None if f is None else each(f, lambda r: r.reduce([dim], keep=False)) for f in parts])


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> Result:
    fields = [f for f in (call.of(node) for node in call.tensors()) if f is not None]
    outs = call.node.meta["val"]
    if not fields:
        return [None] * len(outs)
    call.note("a recurrent layer carries everything along: every element may be read")
    joined = [each(f, lambda r: r.everything()) for f in fields]
    return [call.join([each(f, lambda r, s=o.shape: r.expand(s)) for f in joined], o.shape) for o in outs]
