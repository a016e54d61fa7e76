"""One operation of a traced graph with the fields of its inputs, and the table of rules that rule files fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from volvelle.inspect.exported import Node, bound, operation, shape_of
from volvelle.inspect.receptive_field_reach import STILL, Reach

Field = tuple[Reach, ...]
"""One reach for each spatial axis of the input; None stands for a tensor that does not depend on the input."""
Result = Field | None | list[Any]
"""What a rule returns: one field, or a list where the operation has several results."""


@dataclass
class Call:
    """An operation: `args` by name (nodes for tensors), `fields` of all nodes so far, the extent of the input."""

    node: Node
    fields: Mapping[str, Result]
    extent: tuple[int, ...]
    bounded: bool
    values: Mapping[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.args: dict[str, Any] = bound(self.node)
        self.op = operation(self.node)

    def field(self, name: str) -> Field | None:
        """The field of a tensor argument."""
        return self.of(self.args.get(name))

    def of(self, value: Any) -> Field | None:
        """The field of a node."""
        found = self.fields.get(value.name) if isinstance(value, Node) else None
        return found if isinstance(found, tuple) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument."""
        found = shape_of(self.args[name])
        assert found is not None, name
        return found

    @property
    def out(self) -> tuple[int, ...]:
        """The shape of the result, of the first one when there are several."""
        value = self.node.meta.get("val")
        while isinstance(value, list | tuple):
            value = value[0]
        return shape_of(value) or ()

    def number(self, name: str, default: int = 0) -> int:
        """An integer argument."""
        value = self.args.get(name)
        return default if value is None else int(value)

    def dims(self, name: str, count: int) -> list[int]:
        """An argument of one or several dimensions, made positive; all of them when it is left out."""
        value = self.args.get(name)
        if value is None or (isinstance(value, list | tuple) and not value):
            return list(range(count))
        value = [value] if isinstance(value, int) else value
        return [int(dim) % count for dim in value] if count else []

    def known(self, value: Any) -> np.ndarray | None:
        """The numbers of a constant tensor, None when they are not known before the run."""
        while isinstance(value, Node) and value.op == "call_function":
            if operation(value) not in {"lift_fresh_copy", "detach", "clone", "alias", "to", "_to_copy"}:
                return None
            value = value.args[0]
        found = self.values.get(value.name) if isinstance(value, Node) else None
        if found is None or found.is_floating_point() or found.device.type == "meta":
            return None
        return found.detach().cpu().numpy()

    def tensors(self) -> list[Node]:
        """All tensors that the operation reads."""
        return list(self.node.all_input_nodes)

    def join(self, parts: Sequence[Field | None], shape: Sequence[int] | None = None) -> Field | None:
        """Union after broadcasting; None when nothing depends on the input."""
        found = [part for part in parts if part is not None]
        shape = self.out if shape is None else tuple(shape)
        if not found:
            return None
        total = each(found[0], lambda r: r.broadcast(shape))
        for part in found[1:]:
            total = tuple(a.union(b, shape).compact() for a, b in zip(total, part, strict=True))
        return total

    def nothing(self, shape: Sequence[int]) -> Field:
        """The field of a tensor that does not depend on the input, where one is needed beside others."""
        ones = (1,) * len(shape)
        blank = Reach(
            tuple(shape), np.zeros(ones, int), np.zeros(ones, int).astype(object), np.zeros(ones, bool),
            (STILL,) * len(shape), self.bounded,
        )  # fmt: skip
        return (blank,) * len(self.extent)

    def everything(self, shape: Sequence[int]) -> Field:
        """The whole input, for every element."""
        blank = self.nothing(shape)
        if not self.bounded:
            return each(blank, lambda r: r._as_whole(None))
        return tuple(r._as_whole(n) for r, n in zip(blank, self.extent, strict=True))

    def note(self, text: str) -> None:
        """Say that the field is larger than it need be, or rests on an assumption, and why."""
        self.notes.append(text)


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Record a rule for operations by name."""

    def record(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return record


def each(field: Field, change: Callable[[Reach], Reach]) -> Field:
    """The same change on every axis; axes that share a reach go on sharing it."""
    return tuple(change(reach) for reach in field)
