"""The autograd graph of a loss, folded by module: as text, and laid out in layers as a self-contained SVG."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from volvelle.inspect.gradients_layout import layered

if TYPE_CHECKING:
    from volvelle.inspect.gradients import Origin
    from volvelle.inspect.gradients_record import Call

READABLE = 48  # boxes in a drawing whose depth is chosen here
_MOST_NOTES = 40  # parameters listed in a drawing; the text lists all
_LINE, _CHARACTER, _PADDING = 16, 7.3, 10  # pixels: line height, width of a 12 px monospace letter, inside a box
_COLOURS = {  # state: fill, stroke
    "ok": ("#f4f6f8", "#6b7785"),
    "frozen": ("#e8eefc", "#5b78b5"),
    "zero": ("#fff3d6", "#b57f00"),
    "non-finite": ("#fde3e1", "#c0281c"),
    "loss": ("#e3f4e6", "#2c7a3a"),
}
_ORDER = ("non-finite", "zero", "ok", "frozen")


@dataclass(frozen=True)
class Box:
    """One operation, or one call of a module with all that happened inside it."""

    title: str
    detail: str
    parameters: tuple[tuple[str, str], ...]
    """Name and state of every parameter that enters here."""
    module: str
    inputs: tuple[int, ...]
    """Numbers of the boxes whose results it uses; always smaller than its own."""
    marked: str | None = None
    """What began here, such as "NaN"."""

    @property
    def state(self) -> str:
        """The worst state of its parameters."""
        states = {state for _, state in self.parameters}
        return "non-finite" if self.marked else next((s for s in _ORDER if s in states), "ok")

    @property
    def lines(self) -> list[str]:
        """What is written in it."""
        lines = [self.title, self.detail] if self.detail else [self.title]
        if len(self.parameters) > 3:
            kinds: dict[str, int] = {}
            for _, state in self.parameters:
                kinds[state] = kinds.get(state, 0) + 1
            lines.append(f"{len(self.parameters)} parameters: " + ", ".join(f"{n} {s}" for s, n in kinds.items()))
        else:
            lines += [name if state == "ok" else f"{name}: {state}" for name, state in self.parameters]
        return [*lines, *([f"{self.marked} began here"] if self.marked else [])]


@dataclass(frozen=True)
class Graph:
    """Boxes in the order they ran, the loss last; `notes` are the parameters that the loss does not reach."""

    boxes: tuple[Box, ...]
    notes: tuple[str, ...] = ()

    def with_notes(self, notes: Iterable[str], origin: Origin | None) -> Graph:
        """The same graph with its notes, and with the box marked where something non-finite began."""
        boxes = list(self.boxes)
        if origin is not None:
            names = [(i, box) for i, box in enumerate(boxes) if origin.module == box.module]
            same = [(i, box) for i, box in names if box.title.startswith(origin.op.split(" ")[0])]
            inside = [(i, b) for i, b in enumerate(boxes) if b.module and origin.module.startswith(f"{b.module}.")]
            for i, box in (same or names or inside)[:1]:
                boxes[i] = replace(box, marked=origin.what)
        return Graph(tuple(boxes), tuple(notes))

    def text(self) -> str:
        """One line a box: its number, what it is, the numbers of its inputs, its parameters."""
        width = max((len(box.title) for box in self.boxes), default=0)
        lines = []
        for i, box in enumerate(self.boxes):
            uses = f"<- {', '.join(map(str, box.inputs))}" if box.inputs else ""
            lines.append(f"{i:>4}  {box.title:<{width}}  {uses:<12}  {'; '.join(box.lines[1:])}".rstrip())
        return "\n".join([*lines, *(f"not reached  {note}" for note in self.notes)])

    def svg(self) -> str:
        """A drawing that needs nothing else: inputs above, the loss below."""
        sizes = [_size(box.lines) for box in self.boxes]
        layout = layered([box.inputs for box in self.boxes], sizes)
        more = [f"and {len(self.notes) - _MOST_NOTES} more"] if len(self.notes) > _MOST_NOTES else []
        notes = ["not reached by the loss", *self.notes[:_MOST_NOTES], *more]
        note_width, note_height = _size(notes) if self.notes else (0, 0)
        width = max(layout.width, note_width) + 40
        height = layout.height + 40 + (note_height + 30 if self.notes else 0)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="-20 -20 {width:.0f} {height:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" '
            'font-size="12">',
            "<title>Gradient graph</title>",
            f'<rect x="-20" y="-20" width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="#8a95a1"/></marker></defs>',
        ]
        parts += [_curve(points) for points in layout.edges]
        for i, box in enumerate(self.boxes):
            state = "loss" if i == len(self.boxes) - 1 and box.state == "ok" else box.state
            parts.append(_drawn(box.lines, layout.places[i], sizes[i], _COLOURS[state], 3 if box.marked else 1))
        if self.notes:
            parts.append(_drawn(notes, (0.0, layout.height + 30), (note_width, note_height), _COLOURS["non-finite"]))
        return "\n".join([*parts, "</svg>\n"])


def _size(lines: Sequence[str]) -> tuple[float, float]:
    return max(map(len, lines)) * _CHARACTER + 2 * _PADDING, len(lines) * _LINE + _PADDING


def _curve(points: Sequence[tuple[float, float]]) -> str:
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        path += f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return f'<path d="{path}" fill="none" stroke="#8a95a1" marker-end="url(#tip)"/>'


def _drawn(
    lines: Sequence[str],
    place: tuple[float, float],
    size: tuple[float, float],
    colours: tuple[str, str],
    border: int = 1,
) -> str:
    (x, y), (width, height), (fill, stroke) = place, size, colours
    parts = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{border}"/>'
    ]
    for i, line in enumerate(lines):
        look = 'font-weight="bold" fill="#1c2430"' if i == 0 else 'fill="#47525f"'
        baseline = y + _PADDING / 2 + (i + 0.75) * _LINE
        parts.append(f'<text x="{x + _PADDING:.1f}" y="{baseline:.1f}" {look}>{html.escape(line)}</text>')
    return "\n".join(parts)


def build_graph(
    root: Any,
    nodes: Sequence[Any],
    calls: Sequence[Call],
    names: Mapping[int, str],
    states: Mapping[str, str],
    depth: int | None,
) -> Graph:
    """Fold the autograd nodes above the loss into boxes, modules below `depth` into one box each."""
    from volvelle.inspect.gradients import _call_of

    inner = sorted((n for n in nodes if not hasattr(n, "variable")), key=lambda n: n._sequence_nr())
    made = {node: _call_of(node, calls) for node in inner}
    deepest = max((len(call.scope) for call in made.values() if call), default=0)
    if depth is None:
        depth = deepest + 1
        while depth > 1 and len({_key(n, made[n], depth) for n in inner}) > READABLE:
            depth -= 1
    groups: dict[Any, list[Any]] = {}
    for node in inner:
        groups.setdefault(_key(node, made[node], depth), []).append(node)
    number = {key: i for i, key in enumerate(groups)}
    home = {node: number[_key(node, made[node], depth)] for node in inner}
    return Graph(tuple(_box(key, group, made, home, names, states) for key, group in groups.items()))


def _key(node: Any, call: Call | None, depth: int) -> Any:
    # A module call is a stretch of time, and so is an operation: folding them cannot make a cycle.
    if call is None:
        return node
    return call.scope[:depth] if len(call.scope) >= depth else ("call", call.first)


def _box(
    key: Any, group: list[Any], made: Mapping, home: Mapping, names: Mapping[int, str], states: Mapping[str, str]
) -> Box:
    inputs: dict[int, None] = {}
    parameters: dict[str, None] = {}
    for node in group:
        for parent, _ in node.next_functions:
            if hasattr(parent, "variable"):
                parameters[names.get(id(parent.variable), "an input")] = None
            elif parent is not None and home[parent] != home[node]:
                inputs[home[parent]] = None
    call = made[group[0]]
    entering = tuple((name, states.get(name, "ok")) for name in parameters)
    if call is None:
        return Box(group[0].name(), "", entering, "", tuple(sorted(inputs)))
    if isinstance(key, tuple) and key[0] != "call":
        operations = len({id(made[n]) for n in group})
        detail = f"{operations} operation{'s' if operations > 1 else ''}"
        return Box(key[-1][0], detail, entering, key[-1][0], tuple(sorted(inputs)))
    return Box(f"{call.op}", f"{call.module}, {call.where}", entering, call.module, tuple(sorted(inputs)))
