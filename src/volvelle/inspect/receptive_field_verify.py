"""Receptive fields checked against gradients: which input pixels a unit of a positive-weight copy depends on.

The traced graph runs once in float64 with every operation replaced by a linear one of the same support: weights are
random and positive, activations and batch normalisation are the identity, a maximum is a mean, a product of two
results their sum, a normalisation or a softmax adds the mean it takes. Nothing can cancel or saturate, so a pixel's
gradient is zero exactly when there is no path to it.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from volvelle.inspect.exported import Exported, Node, bound, operation, shape_of
from volvelle.inspect.receptive_field_positive import POSITIVE, Unsupported, pointwise

if TYPE_CHECKING:
    from volvelle.inspect.receptive_fields import NodeField, ReceptiveField

NODES, SEED = 12, 0


@dataclass(frozen=True)
class Check:
    """One unit of one node: the coordinates that the analysis and the gradients give, on every axis."""

    node: str
    unit: tuple[int, ...]
    expected: tuple[frozenset[int], ...]
    measured: tuple[frozenset[int], ...]

    @property
    def agrees(self) -> bool:
        """Whether both are the same sets."""
        return self.expected == self.measured

    def __str__(self) -> str:
        parts = [f"{_span(a)} against {_span(b)}" for a, b in zip(self.expected, self.measured, strict=True)]
        return f"{self.node} at {self.unit}: expected {', '.join(parts)} measured"

    def record(self) -> dict[str, Any]:
        """The values for JSON: first, last and number of coordinates on every axis."""
        sides = {"expected": self.expected, "measured": self.measured}
        return {"node": self.node, "unit": list(self.unit), "agrees": self.agrees} | {
            name: [[min(s), max(s), len(s)] if s else None for s in sets] for name, sets in sides.items()
        }


def verified(field: ReceptiveField, *, nodes: int = NODES) -> ReceptiveField:
    """The same result with checks of up to `nodes` nodes: the last one, and others where the field changes."""
    chosen = _chosen(field, nodes)
    return dataclasses.replace(field, checks=tuple(_checks(field, chosen)))


def _chosen(field: ReceptiveField, nodes: int) -> list[NodeField]:
    able = [node for node in field.rows() if node.op != "input"]
    step = max(1, len(able) / nodes)
    picked = {round(len(able) - 1 - i * step) for i in range(min(nodes, len(able)))}
    return [node for i, node in enumerate(able) if i in picked]


def _checks(field: ReceptiveField, chosen: Sequence[NodeField]) -> list[Check]:
    x, values = run_positive(field.traced, {node.name for node in chosen})
    found, order = [], random.Random(SEED)
    for node in chosen:
        value = values.get(node.name)
        if value is None:
            continue
        for unit in _units(value.shape, order):
            expected = field.seen(node.name, unit)
            # Where one axis reads nothing, the unit reads nothing at all.
            if not all(expected):
                expected = tuple(frozenset() for _ in expected)
            found.append(Check(node.name, unit, expected, gradient_support(value[unit], x, field.axes)))
    return found


def gradient_support(unit: Tensor, x: Tensor, axes: Sequence[int]) -> tuple[frozenset[int], ...]:
    """The coordinates on every axis where d unit / d x is not zero anywhere."""
    if not unit.requires_grad:
        return tuple(frozenset() for _ in axes)
    (gradient,) = torch.autograd.grad(unit, x, retain_graph=True, allow_unused=True)
    if gradient is None:
        return tuple(frozenset() for _ in axes)
    hit = gradient != 0
    return tuple(frozenset(hit.movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()) for axis in axes)


def _units(sizes: Sequence[int], order: random.Random) -> list[tuple[int, ...]]:
    """The first, the middle and the last element, and one at random."""
    fixed = [tuple(0 for _ in sizes), tuple(n // 2 for n in sizes), tuple(n - 1 for n in sizes)]
    return list(dict.fromkeys([*fixed, tuple(order.randrange(n) for n in sizes)]))


def local_support(field: ReceptiveField, name: str, unit: Sequence[int | slice]) -> tuple[frozenset[int], ...]:
    """What one element of a node reads by its gradients when all that passes through global operations is cut off.

    With slices in `unit` it is what several elements read together.
    """
    gates = {node.name for node in field.nodes if any(a.size == "whole" and not a.local for a in node.axes)}
    x, values = run_positive(field.traced, {field[name].name}, gates)
    return gradient_support(values[field[name].name][tuple(unit)].sum(), x, field.axes)


def run_positive(traced: Exported, wanted: set[str], cut: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the positive copy; the input (all ones, with gradient) and the values of the wanted nodes.

    A node that depends on an operation without a positive form is left out. No gradient passes through those in `cut`.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = shape_of(traced.input)
    assert shape is not None
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    values: dict[str, Any] = {}
    last = max((i for i, node in enumerate(traced.graph.nodes) if node.name in wanted), default=-1)
    for node in itertools.islice(traced.graph.nodes, last + 1):
        if node is traced.input:
            values[node.name] = x
        elif node.op == "placeholder":
            values[node.name] = _weight(traced, node, generator)
        elif node.op == "call_function" and all(source.name in values for source in node.all_input_nodes):
            try:
                value = _computed(node, values)
            except Unsupported:
                continue
            values[node.name] = value.detach() if node.name in cut else value
    return x, {name: values[name] for name in wanted if isinstance(values.get(name), Tensor)}


def _weight(traced: Exported, node: Node, generator: torch.Generator) -> Any:
    held = traced.values.get(node.name)
    if held is not None and not held.is_floating_point():
        return held
    shape = shape_of(node)
    if shape is None:
        return None
    # Sums over many inputs would grow without bound in deep networks; the mean has the same support.
    fan = max(1, torch.Size(shape[1:]).numel())
    return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5) / fan


def _computed(node: Node, values: dict[str, Any]) -> Any:
    if operation(node) == "getitem":
        source, index = node.args
        assert isinstance(source, Node)
        return values[source.name][index]

    def real(value: Any) -> Any:
        if isinstance(value, Node):
            return values[value.name]
        if isinstance(value, list | tuple):
            return type(value)(map(real, value))
        return value

    arguments = {name: real(value) for name, value in bound(node).items()}
    result = _form(node)(arguments, node)
    if isinstance(result, Tensor) and result.is_floating_point():
        result = result.double()
    expected = shape_of(node)
    if expected is not None and isinstance(result, Tensor) and tuple(result.shape) != expected:
        result = result.expand(expected)
    return result


def _form(node: Node) -> Callable[[dict[str, Any], Node], Any]:
    name = operation(node)
    if name in POSITIVE:
        return POSITIVE[name]
    from volvelle.inspect.receptive_field_walk import ELEMENTWISE

    if name in ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise
    raise Unsupported(name)


def _span(members: frozenset[int]) -> str:
    if not members:
        return "nothing"
    full = len(members) == max(members) - min(members) + 1
    return f"{min(members)}..{max(members)}" + ("" if full else f" ({len(members)} of them)")
