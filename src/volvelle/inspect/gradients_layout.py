"""Layered layout of a directed acyclic graph (Sugiyama et al. 1981): ranks, bends, few crossings, coordinates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

_ACROSS, _DOWN, _BEND = 24.0, 40.0, 12.0  # pixels between boxes, between layers, and the width of a passing edge
_SWEEPS = 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Upper left corner of every box, the points of every edge from above to below, and the extent of it all."""

    places: list[Point]
    edges: list[list[Point]]
    width: float
    height: float


def layered(inputs: Sequence[Sequence[int]], sizes: Sequence[Point]) -> Layout:
    """Place boxes in layers so that every edge points down. `inputs[i]` are numbers below i; `sizes` (width, height).

    >>> layered([(), (0,), (0, 1)], [(10, 10)] * 3).places[2][1]
    100.0
    """
    ranks: list[int] = []
    for above in inputs:
        ranks.append(max((ranks[j] + 1 for j in above), default=0))
    # A box without inputs belongs just above its first reader, not at the top of the page.
    for i in reversed(range(len(inputs))):
        readers = [ranks[k] for k in range(i + 1, len(inputs)) if i in inputs[k]]
        if not inputs[i] and readers:
            ranks[i] = min(readers) - 1
    shift = min(ranks, default=0)
    ranks = [rank - shift for rank in ranks]
    widths = [width for width, _ in sizes]
    chains, links, layers = _bends(inputs, ranks, widths)
    _order(layers, links)
    centres = _coordinates(layers, links, widths)
    left = min((c - w / 2 for c, w in zip(centres, widths, strict=True)), default=0)
    tops, heights, y = [], [], 0.0
    for layer in layers:
        tall = max(sizes[i][1] for i in layer if i < len(sizes)) if any(i < len(sizes) for i in layer) else 0.0
        tops.append(y)
        heights.append(tall)
        y += tall + _DOWN
    places = [(centres[i] - sizes[i][0] / 2 - left, tops[ranks[i]]) for i in range(len(sizes))]
    edges = []
    for chain in chains:
        first, last = chain[0], chain[-1]
        points = [(centres[first] - left, places[first][1] + sizes[first][1])]
        for step, bend in enumerate(chain[1:-1], ranks[first] + 1):
            points += [(centres[bend] - left, tops[step]), (centres[bend] - left, tops[step] + heights[step])]
        edges.append([*points, (centres[last] - left, places[last][1])])
    right = max((c + w / 2 for c, w in zip(centres, widths, strict=True)), default=0)
    return Layout(places, edges, right - left, max(0.0, y - _DOWN))


def _bends(
    inputs: Sequence[Sequence[int]], ranks: Sequence[int], widths: list[float]
) -> tuple[list[list[int]], list[tuple[int, int]], list[list[int]]]:
    """Put a bend into every layer that an edge passes; appends the bends' widths."""
    layers: list[list[int]] = [[] for _ in range(max(ranks, default=-1) + 1)]
    for i, rank in enumerate(ranks):
        layers[rank].append(i)
    chains, links = [], []
    for i, above in enumerate(inputs):
        for j in above:
            chain = [j]
            for rank in range(ranks[j] + 1, ranks[i]):
                layers[rank].append(len(widths))
                chain.append(len(widths))
                widths.append(_BEND)
            chain.append(i)
            chains.append(chain)
            links += list(itertools.pairwise(chain))
    return chains, links, layers


def _order(layers: list[list[int]], links: Sequence[tuple[int, int]]) -> None:
    """Sort every layer by the mean place of its neighbours, downwards and upwards in turn."""
    above, below = _neighbours(links)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near, sequence = (above, layers[1:]) if down else (below, layers[-2::-1])
        for layer in sequence:
            place = {i: k for other in layers for k, i in enumerate(other)}
            middle = {i: _mean([place[j] for j in near.get(i, ())], place[i]) for i in layer}
            layer.sort(key=middle.__getitem__)


def _coordinates(
    layers: Sequence[Sequence[int]], links: Sequence[tuple[int, int]], widths: Sequence[float]
) -> list[float]:
    """Centres: every box tends to the mean of its neighbours, and pushes those beside it away."""
    above, below = _neighbours(links)
    centres = [0.0] * len(widths)
    for layer in layers:
        x = 0.0
        for i in layer:
            centres[i] = x + widths[i] / 2
            x += widths[i] + _ACROSS
    for sweep in range(4 * _SWEEPS):
        near = above if sweep % 2 == 0 else below
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wish = [_mean([centres[j] for j in near.get(i, ())], centres[i]) for i in layer]
            _spread(layer, wish, widths, centres)
    return centres


def _spread(layer: Sequence[int], wish: Sequence[float], widths: Sequence[float], centres: list[float]) -> None:
    """The centres nearest to the wishes, in order and without overlap: the mean of a push from each side."""
    gaps = [0.0] + [(widths[a] + widths[b]) / 2 + _ACROSS for a, b in itertools.pairwise(layer)]
    right = list(wish)
    for k in range(1, len(layer)):
        right[k] = max(right[k], right[k - 1] + gaps[k])
    left = list(wish)
    for k in reversed(range(len(layer) - 1)):
        left[k] = min(left[k], left[k + 1] - gaps[k + 1])
    for k, i in enumerate(layer):
        centres[i] = (left[k] + right[k]) / 2


def _neighbours(links: Sequence[tuple[int, int]]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for upper, lower in links:
        above.setdefault(lower, []).append(upper)
        below.setdefault(upper, []).append(lower)
    return above, below


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
