"""The timeline of a memory plan as one self-contained SVG: layers of memory over the operations of a step."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from volvelle.inspect.memory_cards import gigabytes
from volvelle.inspect.memory_ledger import CATEGORIES, Point

if TYPE_CHECKING:
    from volvelle.inspect.memory_plan import MemoryPlan

Scale = Callable[[float], float]
WIDTH, HEIGHT = 960, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 176, 44, 44

COLOURS = {
    "weights": "#3b5b92",
    "gradients": "#d08a3e",
    "optimiser": "#7b6aa8",
    "activations": "#4f9d8b",
    "temporaries": "#c9605b",
    "buffers": "#8d99a6",
    "inputs": "#b8a94c",
}
# Readable on a light and on a dark page; the layers themselves keep their colours.
STYLE = """
.vm { font: 12px system-ui, sans-serif; --ink: #24292f; --soft: #6e7781; --line: #d8dee4; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  .vm { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; }
}
.vm text { fill: var(--ink); } .vm .soft { fill: var(--soft); } .vm .grid { stroke: var(--line); }
.vm .title { font-size: 14px; font-weight: 600; } .vm .page { fill: var(--page); }
.vm .limit { stroke: #cf222e; stroke-dasharray: 6 4; } .vm .limit-text { fill: #cf222e; }
.vm .peak { fill: var(--ink); stroke: var(--page); }
"""


def timeline_svg(plan: MemoryPlan) -> str:
    """Draw `plan.timeline`: stacked layers, phases, the peak, and the card's capacity when it is near.

    Raises ValueError for a plan without a timeline.
    """
    points = plan.timeline
    if not points:
        raise ValueError("timeline_svg: the plan has no timeline")
    capacity = plan.card.cards.capacity if plan.card is not None and plan.card.cards.count == 1 else None
    # A capacity far above the peak would flatten the picture.
    shown = capacity if capacity is not None and capacity < 2.5 * plan.peak else None
    top = max(plan.peak, shown or 0) * 1.08
    right = WIDTH - RIGHT
    first, last = points[0].position, max(points[-1].position, points[0].position + 1)

    def x(position: float) -> float:
        return LEFT + (position - first) / (last - first) * (right - LEFT)

    def y(size: float) -> float:
        return HEIGHT - BOTTOM - size / top * (HEIGHT - TOP - BOTTOM)

    title = f"Memory of one training step: peak {gigabytes(plan.peak)}"
    parts = [
        f'<svg class="vm" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
        f'<text class="soft" x="{LEFT}" y="36">{escape(plan.label)}; operations in order</text>',
    ]
    parts += _grid(top, right, y)
    parts += _layers(points, x, y)
    parts += _phases(points, x)
    parts += _peak(plan, x, y)
    if shown is not None:
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{right}" y1="{y(shown):.1f}" y2="{y(shown):.1f}"/>')
        label = f"one card: {gigabytes(shown)}"
        parts.append(f'<text class="limit-text" x="{LEFT + 6}" y="{y(shown) - 5:.1f}">{label}</text>')
    parts += _legend(plan)
    return "\n".join([*parts, "</svg>"])


def _layers(points: list[Point], x: Scale, y: Scale) -> list[str]:
    """One closed path a category, on top of those below."""
    parts = []
    floor = [0] * len(points)
    for index, category in enumerate(CATEGORIES):
        roof = [low + point.sizes[index] for low, point in zip(floor, points, strict=True)]
        if roof != floor:
            edges = [x(p.position) for p in points]
            upper = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in zip(edges, roof, strict=True))
            lower = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in zip(reversed(edges), reversed(floor), strict=True))
            parts.append(
                f'<polygon fill="{COLOURS[category]}" points="{upper} {lower}"><title>{category}</title></polygon>'
            )
        floor = roof
    return parts


def _grid(top: float, right: float, y: Scale) -> list[str]:
    step = _round_step(top / 5)
    parts, size = [], 0.0
    while size <= top:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(size):.1f}" y2="{y(size):.1f}"/>')
        parts.append(f'<text class="soft" text-anchor="end" x="{LEFT - 8}" y="{y(size) + 4:.1f}">{_tick(size)}</text>')
        size += step
    return parts


def _tick(size: float) -> str:
    return "0" if size == 0 else f"{size / 1e9:g} GB" if size >= 1e9 else f"{size / 1e6:g} MB"


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten.

    >>> _round_step(33e6)
    50000000.0
    """
    power = 10.0 ** (len(str(int(max(rough, 1)))) - 1)
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough)


def _phases(points: list[Point], x: Scale) -> list[str]:
    """Name the stretches of forward, backward and optimiser; a recomputation belongs to backward."""
    parts: list[str] = []
    spans: list[tuple[str, int, int]] = []
    for point in points:
        name = "backward" if point.phase == "recompute" else point.phase
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], point.position)
        else:
            spans.append((name, point.position, point.position))
    base = HEIGHT - BOTTOM
    for name, start, stop in spans:
        parts.append(f'<line class="grid" x1="{x(start):.1f}" x2="{x(start):.1f}" y1="{TOP}" y2="{base + 6}"/>')
        if x(stop) - x(start) > 50:
            middle = (x(start) + x(stop)) / 2
            parts.append(f'<text class="soft" text-anchor="middle" x="{middle:.1f}" y="{base + 20}">{name}</text>')
    return parts


def _peak(plan: MemoryPlan, x: Scale, y: Scale) -> list[str]:
    point = max(plan.timeline, key=lambda p: sum(p.sizes))
    px, py = x(point.position), y(sum(point.sizes))
    anchor = "end" if px > (WIDTH - RIGHT + LEFT) / 2 else "start"
    offset = -8 if anchor == "end" else 8
    where = f"{plan.op}, {plan.phase}"
    return [
        f'<circle class="peak" cx="{px:.1f}" cy="{py:.1f}" r="4"/>',
        f'<text text-anchor="{anchor}" x="{px + offset:.1f}" y="{py - 6:.1f}">{escape(where)}</text>',
    ]


def _legend(plan: MemoryPlan) -> list[str]:
    parts = []
    x0, row = WIDTH - RIGHT + 18, TOP + 14
    parts.append(f'<text class="soft" x="{x0}" y="{row - 10}">at the peak</text>')
    for category in reversed(CATEGORIES):
        size = plan.composition.get(category, 0)
        parts.append(f'<rect x="{x0}" y="{row}" width="11" height="11" rx="2" fill="{COLOURS[category]}"/>')
        parts.append(f'<text x="{x0 + 17}" y="{row + 10}">{category}</text>')
        parts.append(f'<text text-anchor="end" x="{WIDTH - 8}" y="{row + 10}">{gigabytes(size)}</text>')
        row += 22
    return parts
