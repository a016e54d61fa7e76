"""Receptive fields drawn over the input: the middle unit of chosen layers, and the energy of the effective field."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from fractions import Fraction
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.inspect.receptive_field_effective import EffectiveField
    from volvelle.inspect.receptive_fields import NodeField, ReceptiveField

MOST, SIDE, LEGEND, LINE = 6, 520, 330, 20
COLOURS = ("#3b78c2", "#2c9c86", "#b08a1e", "#d0672f", "#b8405e", "#7a55b5")
STYLE = """
.rf { font: 12px system-ui, sans-serif; --ink: #24292f; --soft: #6e7781; --page: #ffffff; --area: #eef1f4; }
@media (prefers-color-scheme: dark) { .rf { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --area: #21262d; } }
.rf text { fill: var(--ink); } .rf .soft { fill: var(--soft); } .rf .page { fill: var(--page); }
.rf .area { fill: var(--area); } .rf .title { font-size: 14px; font-weight: 600; }
"""
Span = tuple[float, float]


def overlay(field: ReceptiveField, picture: Any = None) -> str:
    """The field of the middle unit of up to six layers over the input: for three axes of the last two of them.

    `picture` is a PIL image that fills the input. Fields that reach beyond the input are drawn beyond it, for that is
    where the padding is.
    """
    chosen = _chosen(field)
    spans = [_spans(node, field) for node in chosen]
    extent = [field.input_shape[axis] for axis in field.axes][-2:]
    extent = [max(1, extent[0] // 8), *extent] if len(extent) == 1 else extent
    rows = [(0.0, float(extent[0]))] + [_pair(span, extent)[0] for span in spans]
    columns = [(0.0, float(extent[1]))] + [_pair(span, extent)[1] for span in spans]
    top, left = min(a for a, _ in rows), min(a for a, _ in columns)
    high, wide = max(b for _, b in rows) - top, max(b for _, b in columns) - left
    scale = SIDE / max(high, wide)
    height = max(high * scale + 70, 70 + LINE * (len(chosen) + 4))
    title = f"Receptive fields of {field.model}, input {'x'.join(map(str, field.input_shape))}"
    parts = _page(title, SIDE + LEGEND, height)
    parts.append(f'<g transform="translate(10 45) scale({scale:.5f}) translate({-left:.2f} {-top:.2f})">')
    parts.append(f'<rect class="area" width="{extent[1]}" height="{extent[0]}"/>')
    if picture is not None:
        parts.append(
            f'<image width="{extent[1]}" height="{extent[0]}" preserveAspectRatio="none" href="{_embedded(picture)}"/>'
        )
    parts += [_box(_pair(span, extent), COLOURS[i % len(COLOURS)]) for i, span in enumerate(spans)]
    parts.append("</g>")
    parts += _legend(field, chosen)
    return "\n".join([*parts, "</svg>\n"])


def heat(effective: EffectiveField, cells: int = 72) -> str:
    """The energy of the effective field as a picture, with its Gaussian (2 sigma) and the box of the analysis."""
    import torch

    energy = effective.energy
    energy = energy[None] if energy.dim() == 1 else energy.flatten(0, -3).sum(0) if energy.dim() > 2 else energy
    extent = list(energy.shape)
    grid = (min(cells, extent[0]), min(cells, extent[1]))
    small = torch.nn.functional.adaptive_avg_pool2d(energy[None, None], grid)[0, 0]
    shown = (small / small.max().clamp_min(1e-300)).sqrt()
    scale = SIDE / max(extent)
    high, wide = extent[0] / grid[0] * scale, extent[1] / grid[1] * scale
    parts = _page(f"Effective receptive field of {effective.node}", SIDE + LEGEND, SIDE * extent[0] / max(extent) + 90)
    parts.append('<g transform="translate(10 45)">')
    parts.append(f'<rect class="area" width="{extent[1] * scale:.1f}" height="{extent[0] * scale:.1f}"/>')
    for i, j in (shown > 0.02).nonzero().tolist():
        parts.append(
            f'<rect x="{j * wide:.1f}" y="{i * high:.1f}" width="{wide + 0.2:.1f}" height="{high + 0.2:.1f}" '
            f'fill="{COLOURS[3]}" fill-opacity="{float(shown[i, j]):.2f}"/>'
        )
    if len(effective.centre) > 1:
        cy, cx = (value + 0.5 for value in effective.centre[-2:])
        sy, sx = effective.sigma[-2:]
        (y0, y1), (x0, x1) = effective.box[-2:]
        parts.append(
            f'<ellipse cx="{cx * scale:.1f}" cy="{cy * scale:.1f}" rx="{2 * sx * scale:.1f}" ry="{2 * sy * scale:.1f}" '
            f'fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
            f'<rect x="{x0 * scale:.1f}" y="{y0 * scale:.1f}" width="{(x1 - x0 + 1) * scale:.1f}" '
            f'height="{(y1 - y0 + 1) * scale:.1f}" fill="none" stroke="{COLOURS[1]}" stroke-width="2" '
            'stroke-dasharray="6 4"/>'
        )
    parts.append("</g>")
    for i, line in enumerate(effective.lines()):
        parts.append(f'<text x="{SIDE + 30}" y="{62 + LINE * i}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _page(title: str, width: float, height: float) -> list[str]:
    return [
        f'<svg class="rf" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
        f'<text class="title" x="10" y="24">{escape(title)}</text>',
    ]


def _chosen(field: ReceptiveField) -> list[NodeField]:
    """Layers of clearly different size, the largest last."""
    by_size = {node.local: node for node in field.nodes if node.spatial and max(node.local) > 1}
    sizes = sorted(by_size, key=max)
    count = min(MOST, len(sizes))
    picked = [sizes[round(i * (len(sizes) - 1) / max(count - 1, 1))] for i in range(count)]
    return [by_size[size] for size in dict.fromkeys(picked)]


def _spans(node: NodeField, field: ReceptiveField) -> list[Span]:
    """First coordinate and end of the middle unit's field, on every axis."""
    found = []
    for axis, dim in zip(node.axes, field.axes, strict=True):
        assert axis.centre is not None
        assert axis.stride is not None
        units = node.shape[dim] if len(node.shape) == len(field.input_shape) else 1
        middle = axis.centre + axis.stride * Fraction(units - 1, 2) + Fraction(1, 2)
        found.append((float(middle - Fraction(axis.local, 2)), float(middle + Fraction(axis.local, 2))))
    return found


def _pair(spans: Sequence[Span], extent: Sequence[int]) -> tuple[Span, Span]:
    return ((0.0, float(extent[0])), spans[0]) if len(spans) == 1 else (spans[-2], spans[-1])


def _box(pair: tuple[Span, Span], colour: str) -> str:
    (y0, y1), (x0, x1) = pair
    return (
        f'<rect x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}" fill="{colour}" '
        f'fill-opacity="0.08" stroke="{colour}" stroke-width="2" vector-effect="non-scaling-stroke"/>'
    )


def _legend(field: ReceptiveField, chosen: Sequence[NodeField]) -> list[str]:
    parts = []
    for i, node in enumerate(chosen):
        y = 62 + LINE * i
        sizes = "x".join(map(str, node.local))
        strides = "x".join(map(str, node.stride))
        parts.append(f'<rect x="{SIDE + 30}" y="{y - 10}" width="12" height="12" fill="{COLOURS[i % len(COLOURS)]}"/>')
        label = f"{sizes} px, stride {strides}: {node.module or node.op}"
        parts.append(f'<text x="{SIDE + 50}" y="{y}">{escape(label)}</text>')
    y = 62 + LINE * (len(chosen) + 1)
    first = next((node for node in field.nodes if node.whole), None)
    if first is not None:
        lines = (f"the whole input from {first.module or first.op} on;", "boxes leave such paths out")
        parts += [
            f'<text class="soft" x="{SIDE + 30}" y="{y + LINE * i}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
    return parts


def _embedded(picture: Any) -> str:
    copy = picture.convert("RGB")
    copy.thumbnail((640, 640))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
