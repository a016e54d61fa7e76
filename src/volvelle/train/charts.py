"""Line charts as inline SVG: no library, no script, colours from the page's CSS variables (so dark mode works)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 36
LETTER, LABEL = 6.6, 13.0
"""Width of a letter and height of a line of text."""
DASHES = ("", "6 4", "2 4", "10 3 2 3")
"""Strokes of the first four curves, of the next four, and so on: there are four colours."""


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

    `width` is that of the drawing: text keeps its size when the page shows it at that width. The height is 260, or what
    it takes to name the curves at their right ends where they are too many for a line above.
    """
    drawn = [Series(s.name, _finite(s.points, log_y), s.smooth, s.dots) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = sorted(y for s in drawn for _, y in s.points)
    # One early outlier (the first loss) must not flatten everything that follows.
    low, high = ys[0], ys[min(len(ys) - 1, math.ceil(0.995 * len(ys)))]
    many = sum(map(_legend_width, drawn)) > width - LEFT - RIGHT
    height = max(HEIGHT, math.ceil((len(drawn) + 1) * LABEL) + TOP + BOTTOM) if many else HEIGHT
    margin = math.ceil(max(map(_legend_width, drawn))) if many else RIGHT
    scale = _Scale(min(xs), max(xs), *_padded(low, high, log_y), log_y, width, height, margin)
    parts = [_grid(scale, x_label, y_label)]
    for number, s in enumerate(drawn):
        parts.append(_curve(s, scale, number))
    parts.append(_end_names(drawn, scale) if many else _legend(drawn, scale.right))
    title = html.escape(", ".join(s.name for s in drawn) + (f" by {x_label}" if x_label else ""))
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool
    width: int
    height: int
    margin: int

    @property
    def right(self) -> int:
        return self.width - self.margin

    @property
    def base(self) -> int:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low or 1.0
        return LEFT + (value - self.x_low) / span * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high, at = self.y_low, self.y_high, min(max(value, self.y_low), self.y_high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return self.base - (at - low) / (high - low or 1.0) * (self.base - TOP)


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
        parts.append(f'<text x="{x:.1f}" y="{scale.base + 17}" text-anchor="middle">{_number(value)}</text>')
    base = scale.base
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{scale.right}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + scale.right) / 2
    parts.append(f'<text x="{middle}" y="{scale.height - 3}" text-anchor="middle">{html.escape(x_label)}</text>')
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
        parts.append(_path(points, scale, f"line faint {colour}", number))
        points = _running_mean(points)
    parts.append(_path(points, scale, f"line {colour}", number))
    if series.dots or len(points) == 1:
        for x, y in points:
            label = html.escape(f"{series.name}: {y:.6g} at {x:,.0f}")
            parts.append(
                f'<circle class="dot {colour}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5">'
                f"<title>{label}</title></circle>"
            )
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], scale: _Scale, classes: str, number: int) -> str:
    # More points than pixels only make the file large.
    stride = max(1, len(points) // 1200)
    kept = [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]
    path = " ".join(f"{'L' if i else 'M'}{scale.x(x):.1f} {scale.y(y):.1f}" for i, (x, y) in enumerate(kept))
    return f'<path class="{classes}"{_dashes(number)} d="{path}"/>'


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
        x -= _legend_width(s)
        parts.append(
            f'<line class="line s{number % 4}"{_dashes(number)} x1="{x:.0f}" x2="{x + 16:.0f}" y1="{TOP}" y2="{TOP}"/>'
        )
        parts.append(f'<text x="{x + 21:.0f}" y="{TOP + 4}">{html.escape(s.name)}</text>')
    return "".join(parts)


def _legend_width(series: Series) -> float:
    return 26 + LETTER * len(series.name)


def _dashes(number: int) -> str:
    dashes = DASHES[number // 4 % len(DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _end_names(drawn: Sequence[Series], scale: _Scale) -> str:
    """The names at the curves' last points, moved apart where they would overlap, in the order of the curves."""
    ends = sorted((scale.y(s.points[-1][1]), number) for number, s in enumerate(drawn))
    places = apart([y for y, _ in ends], LABEL, TOP, scale.base)
    parts = []
    for (y, number), place in zip(ends, places, strict=True):
        s, x = drawn[number], scale.right
        end = f"M{scale.x(s.points[-1][0]):.1f} {y:.1f} L{x + 4} {y:.1f} L{x + 20} {place:.1f}"
        parts.append(f'<path class="line faint s{number % 4}"{_dashes(number)} d="{end}"/>')
        parts.append(f'<text x="{x + 23}" y="{place + 4:.1f}">{html.escape(s.name)}</text>')
    return "".join(parts)


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels, as near as may be above what is `wanted` (in order) and `gap` apart, up to `high`.

    >>> apart([0, 1, 2, 50], 10, 0, 50)
    [0, 10, 20, 50]
    >>> apart([48, 49, 50], 10, 0, 50)
    [30, 40, 50]
    """
    places: list[float] = []
    for y in wanted:
        places.append(max(y, low, places[-1] + gap if places else low))
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], high if i == len(places) - 1 else places[i + 1] - gap)
    return places


def standalone(svg: str) -> str:
    """The chart as a file of its own: with the page's colours, on the page's background."""
    style = resources.files("volvelle.train").joinpath("report.css").read_text(encoding="utf-8")
    opening, rest = svg.split(">", 1)
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
    return f'{opening}><style>{style}</style><rect width="100%" height="100%" fill="var(--card)"/>{rest}'
