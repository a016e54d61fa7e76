"""Line charts as inline SVG: no library, no script, colours from the page's CSS variables (so dark mode works)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 36


@dataclass(frozen=True)
class Series:
    """One curve. `smooth` draws its running mean over a faint trace of the points; `dots` marks each point."""

    name: str
    points: Sequence[tuple[float, float]]
    smooth: bool = False
    dots: bool = False


def line_chart(
    series: Sequence[Series], *, x_label: str = "step", y_label: str = "", log_y: bool = False, width: int = 640
) -> str:
    """An SVG with axes, a legend, and the finite points of each series; an empty string when there are none.

    `width` is that of the drawing, against a height of 260: text keeps its size when the page shows it at that width.
    """
    drawn = [Series(s.name, _finite(s.points, log_y), s.smooth, s.dots) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = sorted(y for s in drawn for _, y in s.points)
    # One early outlier (the first loss) must not flatten everything that follows.
    low, high = ys[0], ys[min(len(ys) - 1, math.ceil(0.995 * len(ys)))]
    scale = _Scale(min(xs), max(xs), *_padded(low, high, log_y), log_y, width)
    parts = [_grid(scale, x_label, y_label)]
    for number, s in enumerate(drawn):
        parts.append(_curve(s, scale, number))
    parts.append(_legend(drawn, scale.right))
    title = html.escape(", ".join(s.name for s in drawn) + (f" by {x_label}" if x_label else ""))
    return f'<svg class="chart" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool
    width: int

    @property
    def right(self) -> int:
        return self.width - RIGHT

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low or 1.0
        return LEFT + (value - self.x_low) / span * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high, at = self.y_low, self.y_high, min(max(value, self.y_low), self.y_high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return HEIGHT - BOTTOM - (at - low) / (high - low or 1.0) * (HEIGHT - TOP - BOTTOM)


def _finite(points: Sequence[tuple[float, float]], positive: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not positive)]


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    # An axis that would dip below zero for numbers that cannot is only confusing.
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 10)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(found) < 3:
        return ticks(low, high)
    return found if len(found) <= 7 else [t for t in found if math.log10(t).is_integer()]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-4 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _grid(scale: _Scale, x_label: str, y_label: str) -> str:
    parts = []
    for value in _log_ticks(scale.y_low, scale.y_high) if scale.log else ticks(scale.y_low, scale.y_high, 6):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{scale.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(scale.x_low, scale.x_high, scale.width // 100):
        x = scale.x(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_number(value)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{scale.right}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + scale.right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{html.escape(x_label)}</text>')
    if y_label:
        at = (TOP + base) / 2
        turned = f'transform="rotate(-90 12 {at})" text-anchor="middle"'
        parts.append(f'<text x="12" y="{at}" {turned}>{html.escape(y_label)}</text>')
    return "".join(parts)


def _curve(series: Series, scale: _Scale, number: int) -> str:
    colour = f"s{number % 4}"
    parts = []
    points = list(series.points)
    if series.smooth and len(points) > 20:
        parts.append(_path(points, scale, f"line faint {colour}"))
        points = _running_mean(points)
    parts.append(_path(points, scale, f"line {colour}"))
    if series.dots or len(points) == 1:
        for x, y in points:
            label = html.escape(f"{series.name}: {y:.6g} at {x:,.0f}")
            parts.append(
                f'<circle class="dot {colour}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5">'
                f"<title>{label}</title></circle>"
            )
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], scale: _Scale, classes: str) -> str:
    # More points than pixels only make the file large.
    stride = max(1, len(points) // 1200)
    kept = [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]
    path = " ".join(f"{'L' if i else 'M'}{scale.x(x):.1f} {scale.y(y):.1f}" for i, (x, y) in enumerate(kept))
    return f'<path class="{classes}" d="{path}"/>'


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a centred window of a twentieth of the curve."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smooth = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        smooth.append((x, (sums[high] - sums[low]) / (high - low)))
    return smooth


def _legend(series: Sequence[Series], right: int) -> str:
    parts, x = [], float(right)
    for number, s in reversed(list(enumerate(series))):
        width = 26 + 6.6 * len(s.name)
        x -= width
        parts.append(f'<line class="line s{number % 4}" x1="{x:.0f}" x2="{x + 16:.0f}" y1="{TOP}" y2="{TOP}"/>')
        parts.append(f'<text x="{x + 21:.0f}" y="{TOP + 4}">{html.escape(s.name)}</text>')
    return "".join(parts)
