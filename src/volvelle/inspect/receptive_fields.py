"""Receptive fields of any nn.Module: for every operation and spatial axis size, stride and offset, exactly.

The module is traced by torch.export on fake tensors. From the input on, every element of every tensor is given the set
of input coordinates it depends on, axis by axis, in integers; merges take the union. For a chain this is the recursion
r = 1 + Σ_l (k_l - 1) Π_{i<l} s_i, or from the last layer back to the input N_RF = (N_RF - 1) * stride + ksize.

A set is the field along one axis: what a unit reads at all in any row, and at all in any column. Where branches of
different shape merge (1 x 3 beside 3 x 1), the units read less than the rectangle that both axes span.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from volvelle.errors import UsageError, did_you_mean
from volvelle.inspect.exported import Exported, example_input, exported, home, operation, shape_of
from volvelle.inspect.receptive_field_reach import Reach, counts
from volvelle.inspect.receptive_field_walk import Walk, walk

if TYPE_CHECKING:
    from volvelle.inspect.receptive_field_verify import Check

CUT = "cut at a border: the input is too small to tell how the field goes on"


@dataclass(frozen=True)
class AxisField:
    """The field of one operation's result along one axis of the input, in input pixels."""

    size: int | Literal["whole"]
    """Extent of a unit's field, "whole" where it is the whole input whatever its size; 0 without any dependence."""
    stride: Fraction | None
    """How far the field moves from one unit to the next (1/2 after upsampling by 2); None where no dimension is the
    axis any more."""
    offset: int | None
    """The first coordinate that the first unit reads, negative inside the padding; None where nothing is local."""
    centre: Fraction | None
    """The middle of the first unit's field."""
    count: int
    """How many coordinates of the local extent are read; fewer than the extent where dilation leaves gaps."""
    local: int
    """Extent without the paths through global pooling, attention and the like; equal to `size` when there are none."""

    def __str__(self) -> str:
        return "whole" if self.size == "whole" else str(self.size)

    def record(self) -> dict[str, Any]:
        """The values for JSON; fractions as text."""
        exact = {"stride": self.stride, "centre": self.centre}
        shown = {name: None if value is None else str(value) for name, value in exact.items()}
        return {"size": self.size, "offset": self.offset, "count": self.count, "local": self.local, **shown}


@dataclass(frozen=True)
class NodeField:
    """One operation of the traced graph: where it ran, the shape of its result and its field on every axis."""

    name: str
    op: str
    module: str
    kind: str
    """Class of the innermost module."""
    shape: tuple[int, ...]
    axes: tuple[AxisField, ...]
    note: str | None = None
    """Why the field is larger than it need be, or what it rests on."""

    @property
    def size(self) -> tuple[int | Literal["whole"], ...]:
        """The size on every axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def local(self) -> tuple[int, ...]:
        """The local extent on every axis."""
        return tuple(axis.local for axis in self.axes)

    @property
    def stride(self) -> tuple[Fraction | None, ...]:
        """The stride on every axis."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def offset(self) -> tuple[int | None, ...]:
        """The offset on every axis."""
        return tuple(axis.offset for axis in self.axes)

    @property
    def whole(self) -> bool:
        """Whether some axis is read as a whole."""
        return "whole" in self.size

    @property
    def spatial(self) -> bool:
        """Whether units still lie along every axis and have a local field."""
        return all(axis.stride is not None and axis.local for axis in self.axes)

    def record(self) -> dict[str, Any]:
        """The values for JSON."""
        axes = [axis.record() for axis in self.axes]
        shown = {"name": self.name, "op": self.op, "module": self.module, "kind": self.kind, "shape": list(self.shape)}
        return {**shown, "axes": axes, "note": self.note}


@dataclass(frozen=True)
class ReceptiveField:
    """The fields of all operations that depend on the input, in the order they run; `str()` is the table."""

    model: str
    input_shape: tuple[int, ...]
    axes: tuple[int, ...]
    """Which dimensions of the input are space."""
    nodes: tuple[NodeField, ...]
    unknown: Mapping[str, str]
    """Operations without a rule, by node name; the whole input was assumed for them."""
    traced: Exported = field(repr=False, compare=False)
    checks: tuple[Check, ...] = ()
    """What `verify=True` compared with gradients."""

    @property
    def output(self) -> NodeField:
        """The last operation."""
        return self.nodes[-1]

    @property
    def features(self) -> NodeField:
        """The last operation whose units still lie in space with a local field: a backbone's last features."""
        return next((node for node in reversed(self.nodes) if node.spatial), self.nodes[-1])

    @property
    def size(self) -> tuple[int | Literal["whole"], ...]:
        """The size of the output's field on every axis."""
        return self.output.size

    @property
    def agrees(self) -> bool | None:
        """Whether every check agreed with the gradients; None without checks."""
        return all(check.agrees for check in self.checks) if self.checks else None

    def __getitem__(self, name: str) -> NodeField:
        """A node by its name, or the last operation inside a module by the module's path."""
        found = next((node for node in self.nodes if node.name == name), None)
        inside = [node for node in self.nodes if node.module == name or node.module.startswith(f"{name}.")]
        if found is None and not inside:
            names = [*dict.fromkeys(node.module for node in self.nodes), *(node.name for node in self.nodes)]
            tip = did_you_mean(name, names)
            raise UsageError(f"receptive_field: {self.model} has no operation or module {name!r}", tip=tip)
        return found or inside[-1]

    def __iter__(self) -> Iterator[NodeField]:
        return iter(self.nodes)

    @cached_property
    def _bounded(self) -> Walk:
        return walk(self.traced, self.axes, bounded=True)

    def seen(self, name: str, unit: Sequence[int]) -> tuple[frozenset[int], ...]:
        """The input coordinates on every axis that one element of a node reads, borders and gaps included.

        `unit` is an index along the dimensions that carry space, or a full index of the result.
        """
        node = self[name]
        reaches = self._bounded.fields[node.name]
        assert isinstance(reaches, tuple)
        varying = [d for d in range(len(node.shape)) if any(r.low.shape[d] > 1 for r in reaches)]
        index = list(unit)
        if len(index) != len(node.shape):
            if len(index) != len(varying):
                raise UsageError(
                    f"receptive_field: {node.name} has shape {node.shape}, a unit is {len(varying)} or "
                    f"{len(node.shape)} numbers, got {tuple(unit)}"
                )
            index = [0] * len(node.shape)
            for dim, place in zip(varying, unit, strict=True):
                index[dim] = place % node.shape[dim]
        return tuple(_members(reach, index) for reach in reaches)

    def rows(self) -> list[NodeField]:
        """The nodes where the field changes, or where something is noted."""
        rows: list[NodeField] = []
        for node in self.nodes:
            before = rows[-1] if rows else None
            noted = node.note is not None and (before is None or node.note != before.note)
            if before is None or noted or node.axes != before.axes:
                rows.append(node)
        return rows if rows[-1] is self.output else [*rows, self.output]

    def __str__(self) -> str:
        from volvelle.inspect.receptive_field_table import text

        return text(self)

    def record(self) -> dict[str, Any]:
        """All values for JSON."""
        return {
            "model": self.model,
            "input_shape": list(self.input_shape),
            "axes": list(self.axes),
            "nodes": [node.record() for node in self.nodes],
            "unknown": dict(self.unknown),
            "agrees": self.agrees,
            "checks": [check.record() for check in self.checks],
        }

    def svg(self, picture: Any = None) -> str:
        """Fields of chosen layers drawn over the input (a PIL image, or a blank page)."""
        from volvelle.inspect.receptive_field_drawing import overlay

        return overlay(self, picture)


def receptive_field(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    axes: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> ReceptiveField:
    """The receptive field of every operation of `module` for an input of shape (b, c, *space), one to three axes.

    Sizes, strides and offsets are those of an input without end: a size may exceed the input, and borders do not cut
    it. What single units read inside the borders of this input is `ReceptiveField.seen`. `axes` names the spatial
    dimensions of another layout, (1, 2) for (b, y, x, c). With `verify`, units all over the network are compared with
    the gradient support of a copy with positive weights (`checks`, `agrees`). The module is not changed.

    Batch normalisation, dropout and the like act as in evaluation. Layer, group and instance normalisation read all
    that they average over. An operation without a rule counts as reading the whole input and is named in `unknown`.
    Raises ValueError for a shape that is no picture, VolvelleError for a module that torch.export cannot trace.
    After Araujo, Norris and Sim 2019, Computing Receptive Fields of Convolutional Neural Networks.

    >>> field = receptive_field(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 32, 32))
    >>> field.size, field.output.stride, field.seen("2", (1, 0))[0] == {4, 5, 6, 7, 8}
    ((5, 5), (Fraction(4, 1), Fraction(4, 1)), True)
    """
    shape = tuple(int(n) for n in input_shape)
    space = _axes(shape, axes)
    traced = exported(module, example_input(module, shape, dtype), call="receptive_field")
    walked = walk(traced, space, bounded=False)
    nodes = tuple(_node(node, walked) for node in traced.graph.nodes if isinstance(walked.fields.get(node.name), tuple))
    found = ReceptiveField(type(module).__name__, shape, space, nodes, walked.unknown, traced)
    if not verify:
        return found
    from volvelle.inspect.receptive_field_verify import verified

    return verified(found)


def chain_field(layers: Sequence[tuple[int, int]]) -> int:
    """Field of one unit of the last of some layers (ksize, stride), by the recursion from the top down.

    N_RF = (N_RF - 1) * stride + ksize, begun with 1 at the last layer; a dilated kernel counts as
    dilation * (k - 1) + 1.

    >>> chain_field([(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)])
    195
    """
    size = 1
    for ksize, stride in reversed(layers):
        size = (size - 1) * stride + ksize
    return size


def _axes(shape: tuple[int, ...], axes: Sequence[int] | None) -> tuple[int, ...]:
    rank = len(shape)
    if any(n < 1 for n in shape):
        raise ValueError(f"receptive_field: sizes must be positive, got input_shape {shape}")
    if axes is None and not 3 <= rank <= 5:
        raise ValueError(f"receptive_field: input_shape is (b, c, *space) with one to three axes, got {shape}")
    found = tuple(range(2, rank)) if axes is None else tuple(axis % rank for axis in axes if -rank <= axis < rank)
    if axes is not None and (len(found) != len(axes) or len(set(found)) != len(found) or not 1 <= len(found) <= 3):
        raise ValueError(f"receptive_field: axes are one to three dimensions of {shape}, got {tuple(axes)}")
    return found


def _node(node: torch.fx.Node, walked: Walk) -> NodeField:
    reaches = walked.fields[node.name]
    assert isinstance(reaches, tuple)
    path, kind = home(node)
    axes = tuple(_axis(i, reaches) for i in range(len(reaches)))
    op = "input" if node.op == "placeholder" else operation(node)
    notes = [walked.notes[node.name]] if node.name in walked.notes else []
    if any(reach.cut for reach in reaches):
        notes.append(CUT)
    return NodeField(node.name, op, path, kind, shape_of(node) or (), axes, "; ".join(notes) or None)


def _axis(number: int, reaches: Sequence[Reach]) -> AxisField:
    reach = reaches[number]
    varying = [dim for dim in range(len(reach.shape)) if reach.carries(dim)]
    units = reach.reduce([dim for dim in range(len(reach.shape)) if dim not in varying])
    whole, local = bool(units.whole.any()), ~units.empty
    sizes = np.where(local, units.high - units.low + 1, 0)
    size = int(sizes.max())
    first = tuple(0 for _ in reach.shape)
    offset, centre = None, None
    if local[first]:
        offset = int(units.low[first])
        centre = Fraction(offset + int(units.high[first]), 2)
    alone = len(varying) == 1 and not any(r.carries(varying[0]) for i, r in enumerate(reaches) if i != number)
    stride = Fraction(reach.steps[varying[0]][1], reach.steps[varying[0]][0]) if alone else None
    count = int(counts(units.mask)[sizes == size].max()) if size else 0
    return AxisField("whole" if whole else size, stride, offset, centre, count, size)


def _members(reach: Reach, index: Sequence[int]) -> frozenset[int]:
    place = tuple(i if n > 1 else 0 for i, n in zip(index, reach.low.shape, strict=True))
    low, mask = int(reach.low[place]), int(reach.mask[place])
    return frozenset(low + k for k in range(mask.bit_length()) if mask >> k & 1)
