"""What a step costs on this machine, learned from the steps of real decoding; and what a paper's formula expects.

The time of a forward over n tokens against that over one decides whether drafts pay. It depends on the machine, the
dtype, the model and the length of the cache, so it is measured where it is used: every step of a run is a sample.

Shapes: n tokens a step, k = n - 1 of them drafted.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Mapping

_RECENT = 7  # samples of a width that count; their median is the estimate


class CostCurve:
    """Seconds of a step by its width n and by the cache's length, in classes of a factor of two.

    The estimate is the median of recent samples, without a width's first, in which kernels are prepared. Of widths that
    were not seen twice it hopes a little, so that they are tried: between two known ones they cost the narrower one's
    time and a quarter of what a straight line adds, beyond all the widest one's. A class that lacks a width takes it
    from the nearest class, scaled by what both know.

    >>> curve = CostCurve()
    >>> for n, seconds in ((1, 9.0), (1, 2.0), (5, 9.0), (5, 3.0)):
    ...     curve.observe(n, 100, seconds)
    >>> curve.seconds(1, 100), curve.seconds(3, 100), curve.seconds(9, 100), curve.seconds(1, 5000)
    (2.0, 2.125, 3.0, 2.0)
    """

    def __init__(self) -> None:
        self._samples: dict[int, dict[int, deque[float]]] = {}
        self._medians: dict[int, dict[int, float]] = {}
        self._cold: dict[int, int] = {}  # widths seen once, and the class they were seen in
        self._points: dict[int, dict[int, float]] = {}  # what `points` answered since the last sample
        self._trusted: dict[int, dict[int, float]] = {}  # of these, the widths that are settled

    def observe(self, n: int, length: int, seconds: float) -> None:
        """Take in the time of a step of n tokens over a cache of `length` tokens."""
        kind = length.bit_length()
        if not self.knows(n):
            self._cold[n] = kind
        elif n in self._cold:
            cold = self._cold.pop(n)
            del self._samples[cold][n], self._medians[cold][n]
        samples = self._samples.setdefault(kind, {}).setdefault(n, deque(maxlen=_RECENT))
        samples.append(seconds)
        self._medians.setdefault(kind, {})[n] = statistics.median(samples)
        self._points.clear()
        self._trusted.clear()

    def knows(self, n: int) -> bool:
        """Whether a step of this width was seen at any length."""
        return any(n in medians for medians in self._medians.values())

    def settled(self, n: int) -> bool:
        """Whether more than the first sample of this width is known."""
        return self.knows(n) and n not in self._cold

    def seconds(self, n: int, length: int) -> float | None:
        """The expected time of such a step; None before any was seen. A first sample counts where there is no other."""
        kind = length.bit_length()
        if kind not in self._trusted:
            points = self.points(length)
            self._trusted[kind] = {n: points[n] for n in points if n not in self._cold} or points
        points = self._trusted[kind]
        if not points:
            return None
        if n in points:
            return points[n]
        widths = list(points)
        if len(widths) == 1 and n < widths[0]:
            return points[widths[0]]
        if n >= widths[-1]:
            return self._beyond(n, points)
        right = max(bisect.bisect(widths, n), 1)
        low, high = widths[right - 1], widths[right]
        if n < low:
            return points[low]
        # Between the straight line and the narrower neighbour: a width that may be a bargain is tried.
        return points[low] + (points[high] - points[low]) * (n - low) / (high - low) / 4

    def _beyond(self, n: int, points: Mapping[int, float]) -> float:
        """The guess for a width above all that were seen, of which there is at least one."""
        return points[max(points)]

    def at_most(self, n: int, length: int) -> float | None:
        """The most that such a step can take where n tokens never cost more than the same in narrower steps.

        Known widths are taken at their word; None where no width of up to n is known.
        """
        points = self.points(length)
        if n in points:
            return points[n]
        parts = [math.ceil(n / width) * seconds for width, seconds in points.items() if width < n]
        return min(parts, default=None)

    def points(self, length: int) -> dict[int, float]:
        """Seconds by width at this length of the cache, for every width seen at any length."""
        here = length.bit_length()
        if here not in self._points:
            found: dict[int, float] = {}
            for kind in sorted(self._medians, key=lambda kind: abs(kind - here)):
                theirs = self._medians[kind]
                both = [found[n] / theirs[n] for n in theirs if n in found and theirs[n] > 0]
                scale = statistics.median(both) if both else 1.0
                for n, seconds in theirs.items():
                    found.setdefault(n, seconds * scale)
            self._points[here] = dict(sorted(found.items()))
        return self._points[here]

    def ratios(self, length: int) -> dict[int, float]:
        """The curve itself: the time of n tokens over that of one, for every width seen; empty without the latter."""
        points = self.points(length)
        return {n: seconds / points[1] for n, seconds in points.items()} if points.get(1) else {}


class DraftCost(CostCurve):
    """Seconds of making a draft by its length: most grow by the token, so beyond the lengths seen they go on growing.

    >>> cost = DraftCost()
    >>> cost.observe(2, 100, 1.0)
    >>> cost.seconds(6, 100)
    3.0
    """

    def _beyond(self, n: int, points: Mapping[int, float]) -> float:
        low, high = [0, *points][-2:]
        slope = (points[high] - points.get(low, 0.0)) / (high - low)
        return points[high] + max(slope, 0.0) * (n - high)


def expected_tokens(a: float, k: int) -> float:
    """Tokens of a step that checks k drafted ones, each right with probability a after right ones.

    (1 - a^(k+1)) / (1 - a): Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
    equation 1.

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 3)
    (1.75, 4.0)
    """
    return float(k + 1) if a == 1 else (1 - a ** (k + 1)) / (1 - a)


def walltime_improvement(a: float, k: int, c: float) -> float:
    """Their speed-up: (1 - a^(k+1)) / ((1 - a)(k c + 1)), theorem 3.8; c is the cost of a draft token.

    It counts a step of k + 1 tokens as one of 1, which is the upper bound of what a machine does.

    >>> walltime_improvement(0.5, 2, 0.125)
    1.4
    """
    return expected_tokens(a, k) / (k * c + 1)


def measured_improvement(kept: float, k: int, ratios: Mapping[int, float], draft: float) -> float:
    """The bound from the measured curve: 1 + `kept` tokens in a step of k + 1 and `draft`, in plain steps.

    >>> measured_improvement(1.0, 3, {1: 1.0, 4: 1.5}, 0.1)
    1.25
    """
    return (1 + kept) / (ratios[k + 1] + draft)
