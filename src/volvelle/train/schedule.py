"""Learning-rate schedules: pure functions from the number of finished updates to a factor of the peak rate.

A schedule has no state, so there is nothing to save: after a resume the step alone gives the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """f(s) = min(1, (s + 1) / warmup): a linear warm-up, then the peak rate for ever.

    >>> [constant(warmup=2)(step) for step in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    return lambda step: _warm(step, warmup)


def cosine(total: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """f(s) = floor + (1 - floor) (1 + cos(pi t)) / 2 with t the share of the steps after the warm-up that is done.

    Loshchilov & Hutter 2017, without restarts. `floor` is the factor at the end.

    >>> round(cosine(total=10)(5), 3)
    0.5
    """

    def factor(step: int) -> float:
        share = _share(step, total, warmup)
        return _warm(step, warmup) if step < warmup else floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return factor


def linear(total: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """f(s) = 1 - (1 - floor) t with t the share of the steps after the warm-up that is done.

    >>> [linear(total=4)(step) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(step: int) -> float:
        return _warm(step, warmup) if step < warmup else 1 - (1 - floor) * _share(step, total, warmup)

    return factor


def poly(total: int, *, warmup: int = 0, power: float = 0.9) -> Schedule:
    """f(s) = (1 - t)^power with t the share of the steps after the warm-up that is done.

    Chen et al. 2018 (DeepLab), section 4.1; usual for segmentation.

    >>> [round(poly(total=4)(step), 3) for step in range(5)]
    [1.0, 0.772, 0.536, 0.287, 0.0]
    """

    def factor(step: int) -> float:
        return _warm(step, warmup) if step < warmup else (1 - _share(step, total, warmup)) ** power

    return factor


def schedule(kind: Literal["cosine", "linear", "constant", "poly"], total: int, warmup: float = 0.0) -> Schedule:
    """The schedule that FitOptions describe; `warmup` below 1 is a share of `total`, else a number of steps.

    >>> schedule("constant", 100, warmup=0.1)(4)
    0.5
    """
    steps = round(warmup * total) if warmup < 1 else int(warmup)
    return {
        "cosine": lambda: cosine(total, warmup=steps),
        "linear": lambda: linear(total, warmup=steps),
        "constant": lambda: constant(steps),
        "poly": lambda: poly(total, warmup=steps),
    }[kind]()


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _share(step: int, total: int, warmup: int) -> float:
    return min(1.0, max(0, step - warmup) / max(1, total - warmup))
