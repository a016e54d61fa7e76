"""A receptive field as a table of text."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from volvelle.inspect.receptive_fields import NodeField, ReceptiveField

HEADERS = ("module", "operation", "shape", "size", "local", "stride", "offset", "note")


def cells(node: NodeField) -> tuple[str, ...]:
    """One row; `local` only where it differs from the size, one number where all axes agree."""
    gaps = any(axis.count < axis.local for axis in node.axes)
    note = "; ".join(filter(None, [node.note, f"reads {_each([a.count for a in node.axes])}" if gaps else None]))
    local = _each(node.local) if node.whole and any(node.local) else ""
    return (
        node.module or node.kind,
        node.op,
        "x".join(map(str, node.shape)),
        _each(node.size),
        local,
        _each(node.stride),
        _each(node.offset),
        note,
    )


def text(field: ReceptiveField) -> str:
    """The rows where the field changes, aligned."""
    rows = [HEADERS, *map(cells, field.rows())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADERS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{field.model}, input {'x'.join(map(str, field.input_shape))}", *lines, *_summary(field)])


def _summary(field: ReceptiveField) -> list[str]:
    lines = []
    if field.unknown:
        names = ", ".join(sorted(set(field.unknown.values())))
        lines.append(f"no rule for {names}: the whole input is assumed behind them")
    if field.checks:
        wrong = [check for check in field.checks if not check.agrees]
        lines.append(f"{len(field.checks) - len(wrong)} of {len(field.checks)} units agree with their gradients")
        lines += [f"differs: {check}" for check in wrong]
    return lines


def _each(values: object) -> str:
    found = [shown(value) for value in values]  # pyright: ignore[reportGeneralTypeIssues]
    return found[0] if len(set(found)) == 1 else " x ".join(found)


def shown(value: int | str | Fraction | None) -> str:
    """A number for people; a dash where there is none."""
    return "-" if value is None else str(value)
