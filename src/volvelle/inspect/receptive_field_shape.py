"""Receptive fields through operations that move elements without computing: views, indexing, joining."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from volvelle.inspect.receptive_field_call import Call, Field, Result, each, rule
from volvelle.inspect.receptive_field_space import slid

IDENTITIES = (
    "clone", "contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh_copy", "lift_fresh", "dropout",
    "feature_dropout", "alpha_dropout", "type_as", "float", "half", "double", "bfloat16", "positive",
    "resolve_conj", "resolve_neg", "pin_memory", "native_dropout", "_assert_tensor_metadata", "cudnn_affine",
)  # fmt: skip


@rule(*IDENTITIES)
def _identity(call: Call) -> Result:
    return call.of(call.node.args[0])


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
      "atleast_3d", "ravel")  # fmt: skip
def _reshaped(call: Call) -> Result:
    field = call.of(call.node.args[0])
    return None if field is None else each(field, lambda r: r.reshape(call.out).compact())


@rule("permute", "transpose", "t", "swapaxes", "movedim", "mT", "numpy_T", "adjoint", "swapdims", "moveaxis")
def _permuted(call: Call) -> Result:
    field = call.of(call.node.args[0])
    if field is None:
        return None
    count = len(field[0].shape)
    if call.op == "permute":
        order = call.dims("dims", count)
    elif call.op in {"movedim", "moveaxis"}:
        source, target = (call.dims(name, count) for name in ("source", "destination"))
        order = [dim for dim in range(count) if dim not in source]
        for place, dim in sorted(zip(target, source, strict=True)):
            order.insert(place, dim)
    elif call.op == "numpy_T":
        order = list(range(count))[::-1]
    else:
        first, second = (call.number(*pair) % max(count, 1) for pair in _exchanged(call))
        order = list(range(count))
        if count > 1:
            order[first], order[second] = order[second], order[first]
    return each(field, lambda r: r.permute(order))


def _exchanged(call: Call) -> tuple[tuple[str, int], tuple[str, int]]:
    names = {"transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1")}
    first, second = names.get(call.op, ("", ""))
    return (first, -2), (second, -1)


@rule("slice", "narrow")
def _slice(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    dim = call.number("dim") % len(field[0].shape)
    n = field[0].shape[dim]
    if call.op == "narrow":
        start, step = call.number("start") % max(n, 1), 1
    else:
        start, step = slice(call.args.get("start"), None, None).indices(n)[0], call.number("step", 1)
    return slid(field, dim, (start + step * np.arange(call.out[dim]))[:, None], (1, step))


@rule("select")
def _select(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    shape = field[0].shape
    dim = call.number("dim") % len(shape)
    taps = np.array([[call.number("index") % shape[dim]]])
    return each(slid(field, dim, taps, (1, 0)), lambda r: r.reshape(call.out))


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split", "unsafe_split_with_sizes")
def _split(call: Call) -> Result:
    field = call.field("self")
    shapes = [tuple(value.shape) for value in call.node.meta["val"]]
    if field is None:
        return [None] * len(shapes)
    dim = call.number("dim") % len(field[0].shape)
    found: list[Result] = []
    start = 0
    for shape in shapes:
        found.append(slid(field, dim, np.arange(start, start + shape[dim])[:, None], (1, 1)))
        start += shape[dim]
    return found


@rule("unbind")
def _unbind(call: Call) -> Result:
    field = call.field("self")
    count = len(call.node.meta["val"])
    if field is None:
        return [None] * count
    dim = call.number("dim") % len(field[0].shape)
    parts = (slid(field, dim, np.array([[i]]), (1, 0)) for i in range(count))
    return [each(part, lambda r: r.reshape(call.out)) for part in parts]


@rule("cat", "concat", "concatenate", "hstack", "vstack")
def _cat(call: Call) -> Result:
    nodes = call.args["tensors"]
    parts = [node for node in nodes if tuple(node.meta["val"].shape) != (0,)]
    dim = {"hstack": 1, "vstack": 0}.get(call.op, call.number("dim")) % len(call.out)
    return _joined(call, [call.of(node) for node in parts], [tuple(node.meta["val"].shape) for node in parts], dim)


@rule("stack")
def _stack(call: Call) -> Result:
    nodes = call.args["tensors"]
    dim = call.number("dim") % len(call.out)
    shape = tuple(1 if i == dim else n for i, n in enumerate(call.out))
    fields = [call.of(node) for node in nodes]
    parts = [None if f is None else each(f, lambda r: r.reshape(shape)) for f in fields]
    return _joined(call, parts, [shape] * len(nodes), dim)


def _joined(call: Call, parts: Sequence[Field | None], shapes: Sequence[tuple[int, ...]], dim: int) -> Result:
    if all(part is None for part in parts):
        return None
    full = [call.nothing(shape) if part is None else part for part, shape in zip(parts, shapes, strict=True)]
    return tuple(axis[0].cat(axis[1:], dim).compact() for axis in zip(*full, strict=True))


@rule("slice_scatter", "select_scatter")
def _scattered(call: Call) -> Result:
    """A part of the tensor replaced: what lies before, the new part, what lies behind."""
    shape = call.out
    dim = call.number("dim") % len(shape)
    kept, put = call.field("self") or call.nothing(shape), call.field("src")
    if call.op == "select_scatter":
        index = np.array([call.number("index") % shape[dim]])
    else:
        index = np.arange(shape[dim])[slice(call.args.get("start"), call.args.get("end"), call.args.get("step"))]
    part = tuple(len(index) if i == dim else n for i, n in enumerate(shape))
    new = call.nothing(part) if put is None else each(put, lambda r: r.reshape(part))
    both = _joined(call, [kept, new], [shape, part], dim)
    taps = np.arange(shape[dim])
    taps[index] = shape[dim] + np.arange(len(index))
    assert isinstance(both, tuple)
    return each(slid(both, dim, taps[:, None], None), lambda r: r._observed())


@rule("expand", "expand_as", "broadcast_to")
def _expand(call: Call) -> Result:
    field = call.of(call.node.args[0])
    return None if field is None else each(field, lambda r: r.broadcast(call.out))


@rule("repeat", "tile")
def _repeat(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    lead = len(call.out) - len(field[0].shape)
    field = each(field, lambda r: r.reshape((1,) * lead + r.shape))
    for dim, n in enumerate(call.out):
        if n != field[0].shape[dim]:
            field = slid(field, dim, (np.arange(n) % field[0].shape[dim])[:, None], None)
    return field


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    if not isinstance(call.args.get("repeats"), int):
        return _anywhere(call, field, "repetitions that depend on values")
    times = call.number("repeats")
    if call.args.get("dim") is None:
        field = each(field, lambda r: r.reshape((int(np.prod(r.shape)),)))
    dim = call.number("dim") % len(call.out)
    return slid(field, dim, (np.arange(call.out[dim]) // times)[:, None], (times, 1))


@rule("flip", "fliplr", "flipud")
def _flip(call: Call) -> Result:
    field = call.field("self")
    for dim in {"fliplr": [1], "flipud": [0]}.get(call.op) or call.dims("dims", len(call.out)):
        field = field and slid(field, dim, np.arange(call.out[dim])[::-1, None], (1, -1))
    return field


@rule("roll")
def _roll(call: Call) -> Result:
    field = call.field("self")
    if field is None:
        return None
    dims = call.args.get("dims") or []
    if not dims:
        return _anywhere(call, field, "roll over the flattened tensor")
    for dim, shift in zip(call.dims("dims", len(call.out)), np.atleast_1d(call.args["shifts"]), strict=True):
        taps = np.arange(call.out[dim])[:, None] - int(shift)
        # What wraps around matters at one border only; without bounds the interior goes on.
        field = slid(field, dim, taps % call.out[dim] if call.bounded else taps, (1, 1))
    return field


@rule("unfold")
def _unfold(call: Call) -> Result:
    """Sliding windows of one dimension, with the places inside a window as a last dimension."""
    field = call.field("self")
    if field is None:
        return None
    shape = field[0].shape
    dim = call.number("dimension") % len(shape)
    size, step, count = call.number("size"), call.number("step"), call.out[dim]
    taps = np.arange(count)[:, None] * step + np.arange(size)
    wide = slid(field, dim, taps.reshape(-1, 1), None)
    lifted = each(wide, lambda r: r.reshape((*shape[:dim], count, size, *shape[dim + 1 :])))
    order = [i for i in range(len(shape) + 1) if i != dim + 1] + [dim + 1]
    return each(lifted, lambda r: r.permute(order))


@rule("index", "index_select", "_unsafe_index")
def _index(call: Call) -> Result:
    field = call.field("self")
    if call.op == "index_select":
        where = {call.number("dim") % len(call.shape("self")): call.args["index"]}
    else:
        where = {i: index for i, index in enumerate(call.args["indices"]) if index is not None}
    moved = [call.of(index) for index in where.values()]
    if field is None and all(part is None for part in moved):
        return None
    if field is not None and len(where) == 1 and moved == [None]:
        ((dim, node),) = where.items()
        known = call.known(node)
        if known is not None and known.dtype != bool and known.ndim == 1:
            taps = (known % field[0].shape[dim])[:, None]
            return each(slid(field, dim, taps, None), lambda r: r._observed())
    return _anywhere(call, field, "indices that are not known before the run", moved)


@rule("gather", "scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "take_along_dim",
      "masked_scatter", "index_fill", "take", "_index_put_impl")  # fmt: skip
def _gather(call: Call) -> Result:
    return _anywhere(call, None, "indices that are not known before the run", [call.of(n) for n in call.tensors()])


@rule("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
def _bags(call: Call) -> Result:
    """Sums of rows of a table: how deformable convolution and the poolings of regions read between pixels."""
    why = "rows that are not known before the run (deformable convolution, pooling of regions)"
    return [_anywhere(call, None, why, [call.of(node) for node in call.tensors()]), None, None, None]


def _anywhere(call: Call, field: Field | None, why: str, others: Sequence[Field | None] = ()) -> Result:
    """Every element may come from every other one."""
    parts = [part for part in (field, *others) if part is not None]
    if not parts:
        return None
    call.note(f"{why}: every element may be read")
    spread = [each(part, lambda r: r.everything().expand(call.out)) for part in parts]
    return call.join(spread)
