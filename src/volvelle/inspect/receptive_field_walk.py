"""The walk over a traced graph that gives every node its field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from volvelle.inspect import receptive_field_mix, receptive_field_shape, receptive_field_space
from volvelle.inspect.exported import Exported, Node, operation, shape_of
from volvelle.inspect.receptive_field_call import RULES, Call, Field, Result
from volvelle.inspect.receptive_field_reach import Reach

RULE_FILES = (receptive_field_mix, receptive_field_shape, receptive_field_space)
"""Importing them fills the table of rules."""
_CONSTANTS = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "zeros", "ones", "full", "empty", "arange", "linspace", "rand", "randn", "eye",
    "scalar_tensor", "sym_size", "sym_numel", "sym_stride", "triu_indices", "tril_indices", "_assert_async",
    "_assert_scalar",
})  # fmt: skip
ELEMENTWISE = frozenset({
    "hardswish", "hardsigmoid", "hardtanh", "relu6", "silu", "gelu", "elu", "selu", "celu", "prelu", "_prelu_kernel",
    "leaky_relu", "mish", "softplus", "logit", "where", "masked_fill", "clamp", "clip", "copy", "lerp", "addcmul",
    "addcdiv", "rsub", "true_divide", "floor_divide", "square", "rrelu", "hardshrink", "softshrink", "tanhshrink",
    "threshold", "log_sigmoid", "logsigmoid", "multiply", "subtract", "divide", "float_power", "nan_to_num", "fill",
    "triu", "tril", "zero", "softsign", "log_sigmoid_forward", "special_expit", "absolute",
    "fake_quantize_per_tensor_affine", "isnan", "isinf", "isfinite", "__and__", "__or__", "__xor__",
})  # fmt: skip


@dataclass
class Walk:
    """Fields by node name, and what was noted: why a field is larger than it need be; operations without a rule."""

    fields: dict[str, Result]
    notes: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def walk(traced: Exported, axes: Sequence[int], *, bounded: bool) -> Walk:
    """Give every node its field; `axes` are the spatial dimensions of the input.

    A `bounded` walk knows the input's borders: sets are exact for this input, padding reads nothing. The other one
    goes on outside, as if the input had no end, and holds what formulas for receptive fields give.
    """
    shape = shape_of(traced.input)
    assert shape is not None
    start: Field = tuple(Reach.identity(shape, dim, bounded=bounded) for dim in axes)
    found = Walk({traced.input.name: start})
    _nodes(traced.graph.nodes, found, traced.values, tuple(shape[dim] for dim in axes), bounded)
    return found


def _nodes(nodes: Any, found: Walk, values: Mapping[str, torch.Tensor], extent: tuple[int, ...], bounded: bool) -> None:
    for node in nodes:
        if node.op != "call_function" or node.name in found.fields:
            continue
        if not _depends(node, found):
            found.fields[node.name] = None
            continue
        if operation(node) == "getitem":
            source, index = node.args
            got = found.fields[source.name]
            found.fields[node.name] = got[index] if isinstance(got, list) else got
            if source.name in found.notes and found.fields[node.name] is not None:
                found.notes[node.name] = found.notes[source.name]
            continue
        inner = [arg for arg in node.args if _body(arg) is not None]
        call = Call(node, found.fields, extent, bounded, values)
        if len(inner) == 1:
            found.fields[node.name] = _inside(call, inner[0], found)
        else:
            found.fields[node.name] = _ruled(call, found)
        if call.notes:
            found.notes[node.name] = "; ".join(call.notes)


def _depends(node: Node, found: Walk) -> bool:
    return any(_present(found.fields.get(source.name)) for source in node.all_input_nodes)


def _present(result: Result) -> bool:
    return any(map(_present, result)) if isinstance(result, list) else result is not None


def _ruled(call: Call, found: Walk) -> Result:
    name = call.op
    if name in _CONSTANTS or (shape_of(call.node) is None and not isinstance(call.node.meta.get("val"), list | tuple)):
        return None
    if name in RULES:
        return RULES[name](call)
    tags = getattr(call.node.target, "tags", ())
    if name in ELEMENTWISE or torch.Tag.pointwise in tags:
        return call.join([call.of(node) for node in call.tensors()])
    found.unknown[call.node.name] = name
    call.note(f"no rule for {name}: the whole input is assumed")
    value = call.node.meta.get("val")
    if isinstance(value, list | tuple):
        return [None if (shape := shape_of(part)) is None else call.everything(shape) for part in value]
    return call.everything(call.out)


def _body(arg: Any) -> torch.fx.GraphModule | None:
    if not isinstance(arg, Node) or arg.op != "get_attr":
        return None
    owner = arg.graph.owning_module
    target = getattr(owner, str(arg.target), None) if owner is not None else None
    return target if isinstance(target, torch.fx.GraphModule) else None


def _inside(call: Call, arg: Node, found: Walk) -> Result:
    """A block that ran in another mode (no_grad, autocast) is a graph of its own: walk it in place."""
    body = _body(arg)
    assert body is not None
    operands = [value for value in call.node.args[list(call.node.args).index(arg) + 1 :] if isinstance(value, Node)]
    places = [node for node in body.graph.nodes if node.op == "placeholder"]
    inner = Walk({place.name: found.fields.get(value.name) for place, value in zip(places, operands, strict=True)})
    _nodes(body.graph.nodes, inner, {}, call.extent, call.bounded)
    found.unknown |= {f"{call.node.name}.{name}": op for name, op in inner.unknown.items()}
    call.notes += inner.notes.values()
    result = next(node for node in body.graph.nodes if node.op == "output").args[0]
    if isinstance(result, Node):
        return inner.fields[result.name]
    return [inner.fields.get(part.name) if isinstance(part, Node) else None for part in result]
