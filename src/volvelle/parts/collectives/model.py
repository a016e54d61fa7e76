"""Seconds of an all-reduce from latency, bandwidth and contention, fitted on one machine and checked on held-out runs.

Thakur, Rabenseifner and Gropp 2005, section 3, have T = a alpha + b beta + c gamma along the critical path. Ranks that
share cores and memory also wait for each other's work, which the path does not see, so two terms of the total are
added: T = rounds alpha + path beta + messages alpha_c + total beta_c, all coefficients >= 0. (gamma goes into beta.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from volvelle.parts.collectives.selection import choose


class Work(NamedTuple):
    """What an all-reduce does: messages and bytes along the longest path, and messages and bytes of all ranks."""

    rounds: float
    path: float
    messages: float
    total: float


class Timing(NamedTuple):
    """One measured all-reduce: algorithm, ranks, bytes of the vector, seconds; `nodes` of two-level."""

    algorithm: str
    ranks: int
    size: int
    seconds: float
    nodes: int = 1


class Fit(NamedTuple):
    """The coefficients, in seconds a message and seconds a byte: own path, and what all ranks share."""

    alpha: float
    beta: float
    alpha_shared: float
    beta_shared: float

    def seconds(self, algorithm: str, p: int, size: int, *, nodes: int = 1) -> float:
        """Predicted seconds with all ranks on the machine that was measured."""
        work = work_of(algorithm, p, size, nodes=nodes)
        own = self.alpha * work.rounds + self.beta * work.path
        return own + self.alpha_shared * work.messages + self.beta_shared * work.total

    def apart(self, algorithm: str, p: int, size: int, *, cores: int, nodes: int = 1) -> float:
        """Predicted seconds if every rank had a core of that machine, and as fast a link, to itself.

        The shared terms are work that `cores` cores do side by side, so on one core a message costs alpha + cores
        alpha_shared and a byte beta + cores beta_shared, along the path alone. A cluster's network is not in it.
        """
        work = work_of(algorithm, p, size, nodes=nodes)
        message, byte = self.alpha + cores * self.alpha_shared, self.beta + cores * self.beta_shared
        return message * work.rounds + byte * work.path


class Error(NamedTuple):
    """Relative error of predictions, |predicted - measured| / measured: median and worst."""

    median: float
    worst: float
    count: int


def work_of(algorithm: str, p: int, size: float, *, nodes: int = 1) -> Work:
    """The formulas at the heads of the algorithms' files, for an all-reduce of `size` bytes on p ranks.

    Two-level needs `nodes`, each of p / nodes ranks.

    Raises:
        ValueError: an algorithm without a formula, or nodes that do not divide p.

    >>> work_of("ring", 4, 1024)
    Work(rounds=6, path=1536.0, messages=24, total=6144)
    >>> work_of("recursive-doubling", 4, 1024)
    Work(rounds=2, path=2048, messages=8, total=8192)
    """
    if p % nodes:
        raise ValueError(f"work_of: nodes must divide p, got {nodes} nodes and {p} ranks")
    power = 1 << (p.bit_length() - 1)
    levels, folded = power.bit_length() - 1, p - power
    edge = 2 if folded else 0  # one message in, one back
    match algorithm:
        case "ring":
            return Work(2 * (p - 1), 2 * (p - 1) / p * size, 2 * p * (p - 1), 2 * (p - 1) * size)
        case "halving-doubling":
            path = 2 * (power - 1) / power * size + edge * size
            return Work(2 * levels + edge, path, 2 * levels * power + 2 * folded, 2 * (p - 1) * size)
        case "recursive-doubling":
            total = (levels * power + 2 * folded) * size
            return Work(levels + edge, (levels + edge) * size, levels * power + 2 * folded, total)
        case "tree":
            depth = math.ceil(math.log2(p)) if p > 1 else 0
            return Work(2 * depth, 2 * depth * size, 2 * (p - 1), 2 * (p - 1) * size)
        case "star":
            return Work(2 * (p - 1), 2 * (p - 1) * size, 2 * (p - 1), 2 * (p - 1) * size)
        case "two-level":
            each = p // nodes
            inside, share = work_of("ring", each, size), size / each
            between = work_of(choose(int(share), nodes).algorithm, nodes, share)
            return Work(
                inside.rounds + between.rounds,
                inside.path + between.path,
                nodes * inside.messages + each * between.messages,
                nodes * inside.total + each * between.total,
            )
    raise ValueError(f"work_of: algorithm has no formula: {algorithm!r}")


def fit(timings: Sequence[Timing]) -> Fit:
    """Non-negative least squares of the relative error, exact: the best over all subsets of coefficients.

    >>> truth = Fit(2e-5, 1e-9, 1e-6, 3e-10)
    >>> runs = [Timing(a, p, n, truth.seconds(a, p, n))
    ...         for a in ("ring", "tree", "star") for p in (2, 3, 4) for n in (100, 10**5, 10**7)]
    >>> found = fit(runs)
    >>> all(abs(x - y) <= 1e-6 * y for x, y in zip(found, truth))
    True

    Raises:
        ValueError: fewer timings than coefficients.
    """
    if len(timings) < len(Fit._fields):
        raise ValueError(f"fit: needs at least {len(Fit._fields)} timings, got {len(timings)}")
    measured = torch.tensor([t.seconds for t in timings], dtype=torch.float64)
    works = [work_of(t.algorithm, t.ranks, t.size, nodes=t.nodes) for t in timings]
    rows = torch.tensor(works, dtype=torch.float64) / measured[:, None]
    ones = torch.ones(len(timings), 1, dtype=torch.float64)
    best, least = torch.zeros(rows.shape[1], dtype=torch.float64), math.inf
    for count in range(1, rows.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(rows.shape[1]), count)):
            scale = rows[:, chosen].norm(dim=0).clamp_min(1e-300)
            solution = torch.linalg.lstsq(rows[:, chosen] / scale, ones, driver="gelsd").solution[:, 0] / scale
            error = float((rows[:, chosen] @ solution - 1).square().sum())
            if bool((solution >= 0).all()) and error < least:
                best = torch.zeros_like(best)
                best[chosen] = solution
                least = error
    return Fit(*best.tolist())


def error_of(found: Fit, timings: Sequence[Timing], *, cores: int | None = None) -> Error:
    """How far the predictions are from timings that the fit has, or better has not, seen.

    With `cores`, those of `Fit.apart`, whose timings need ranks <= cores.
    """

    def predict(t: Timing) -> float:
        if cores is None:
            return found.seconds(t.algorithm, t.ranks, t.size, nodes=t.nodes)
        return found.apart(t.algorithm, t.ranks, t.size, cores=cores, nodes=t.nodes)

    errors = sorted(abs(predict(t) / t.seconds - 1) for t in timings)
    if not errors:
        return Error(math.nan, math.nan, 0)
    return Error(errors[len(errors) // 2], errors[-1], len(errors))
