"""Pictures of the claim amp: the bits of the number formats, and where gradients lie in fp16's range. Without torch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#47525f}.strong{font-weight:600;fill:#1c2430}"
    ".sign{fill:#c2571a}.exponent{fill:#2f6f8f}.fraction{fill:#4b8a4f}.bar{fill:#2f6f8f}.lost{fill:#c0281c}"
    ".zone{fill:#fde3e1}.weak{fill:#fff3d6}.line{stroke:#8a95a1}.bit{fill:#fff;font:9px ui-monospace,monospace}</style>"
)
_CELL = 13


def _picture(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><title>{html.escape(title)}</title>{STYLE}'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, *, look: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{look}">{html.escape(text)}</text>'


def layouts(rows: Sequence[tuple[str, str, str]]) -> str:
    """A row a format: name, the bits of an example as "sign exponent fraction", and a line about its range."""
    parts, y = [], 16.0
    longest = max(len(bits) - 2 for _, bits, _ in rows)
    for name, bits, about in rows:
        parts.append(_text(12, y + 13, name, look="strong"))
        x = 60.0
        for kind, field in zip(("sign", "exponent", "fraction"), bits.split(" "), strict=True):
            for bit in field:
                parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{_CELL - 1}" height="18"/>')
                parts.append(_text(x + _CELL / 2 - 0.5, y + 12, bit, look="bit", anchor="middle"))
                x += _CELL
        parts.append(_text(60, y + 34, about))
        y += 56
    x = 60.0
    for kind in ("sign", "exponent", "fraction"):
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="12" height="12"/>')
        parts.append(_text(x + 17, y + 10, kind))
        x += 90
    return _picture(80 + longest * _CELL, y + 28, "Bit layouts of fp64, fp32, fp16 and bf16", parts)


def histogram(panels: Sequence[tuple[str, Mapping[int, float]]], *, low: int = -48, high: int = 26) -> str:
    """Shares of gradient entries by the power of two below their magnitude, over fp16's range; a panel a title.

    Left of 2^-25 a number rounds to zero in fp16, below 2^-14 it is subnormal, from 2^16 on it is infinite.
    """
    left, step, tall, gap = 46.0, 10.0, 130.0, 66.0
    width = left + (high - low) * step + 20
    top = max(max(shares.values(), default=0.0) for _, shares in panels) or 1.0

    def x(power: float) -> float:
        return left + (min(max(power, low), high) - low) * step

    parts, y = [], 30.0
    for title, shares in panels:
        zones = (
            ("zone", low, -25, "zero"),
            ("weak", -25, -14, "subnormal"),
            ("", -14, 16, "normal"),
            ("zone", 16, high, "infinite"),
        )
        parts.append(_text(left, y - 12, title, look="strong"))
        for kind, start, stop, name in zones:
            if kind:
                parts.append(
                    f'<rect class="{kind}" x="{x(start):.1f}" y="{y:.1f}" width="{x(stop) - x(start):.1f}" '
                    f'height="{tall:.1f}"/>'
                )
            inside = sum(share for power, share in shares.items() if start <= power < stop)
            parts.append(_text((x(start) + x(stop)) / 2, y + 14, f"{name} {inside:.1%}", anchor="middle"))
        for power, share in sorted(shares.items()):
            if low <= power < high and share > 0:
                height = share / top * (tall - 24)
                look = "lost" if power < -25 or power >= 16 else "bar"
                parts.append(
                    f'<rect class="{look}" x="{x(power) + 0.5:.1f}" y="{y + tall - height:.1f}" '
                    f'width="{step - 1:.1f}" height="{height:.1f}"><title>2^{power}: {share:.2%}</title></rect>'
                )
        parts.append(f'<path class="line" d="M{left} {y + tall:.1f}H{x(high):.1f}"/>')
        parts += [_text(x(p), y + tall + 16, f"2^{p}", anchor="middle") for p in range(low, high + 1, 8)]
        y += tall + gap
    parts.append(_text(left, y - 24, "magnitude of a gradient entry"))
    return _picture(width, y - 10, "Gradients in fp16's range", parts)
