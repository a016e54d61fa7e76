"""Timing collectives on this machine: ranks as processes over loopback, variants in turn, rounds interleaved.

`compare` times all-reduces against `torch.distributed.all_reduce`; `calibrate` fits parts/collectives/model.py, checks
it on sizes, ranks and an algorithm it has not seen, and only then extrapolates.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from volvelle.inspect.collectives_ranks import on_ranks
from volvelle.parts.collectives import Topology, Traffic, all_reduce
from volvelle.parts.collectives.model import Error, Fit, Timing, error_of, fit

GLOO = "gloo"
"""The name under which torch.distributed's own all_reduce is timed."""
TWO_LEVEL = "two-level"
FITTED = ("ring", "halving-doubling", "recursive-doubling", "tree")
"""The algorithms that a model is fitted on."""
RESTLESS = 0.15
"""Drift between rounds from which a machine counts as restless."""
STRETCHES = 10
"""Stretches of a round of short vectors."""
SIZES = tuple(1 << power for power in range(10, 27, 2))
"""Bytes of the vectors that a model is fitted on and checked with: 1 KB to 64 MB."""


class Case(NamedTuple):
    """One thing to time: an algorithm's name or `GLOO`, and the bytes of the fp32 vector."""

    algorithm: str
    size: int


class Rounds(NamedTuple):
    """Seconds of one case, a number a round: the slowest rank's mean; CPU seconds summed over ranks; bytes sent."""

    wall: list[float]
    cpu: list[float]
    sent: int

    @property
    def drift(self) -> float:
        """How far the slowest round lies above the fastest."""
        return max(self.wall) / min(self.wall) - 1


Table = Mapping[int, Mapping[Case, Rounds]]
"""Ranks -> case -> its rounds."""


@dataclass(frozen=True)
class Calibration:
    """A fitted model, what it was fitted on, and its error on runs it had not seen.

    Held out were sizes; the largest number of ranks; an algorithm, two-level. `held_out_apart` is the error of
    `Fit.apart` on held-out sizes of runs with no more ranks than cores, the only ones that can check it here. An error
    of no runs is NaN.
    """

    fit: Fit
    cores: int
    fitted: Error
    held_out_sizes: Error
    held_out_ranks: Error
    held_out_algorithm: Error
    held_out_apart: Error
    timings: list[Timing]

    def extrapolate(self, ranks: Sequence[int], size: int, algorithms: Sequence[str]) -> list[dict[str, Any]]:
        """Seconds for more ranks, all on this machine and each on a core of its own, beside the held-out errors.

        Two-level takes ten ranks as one node; `ranks` must then be multiples of ten.
        """
        errors = [e for e in (self.held_out_sizes, self.held_out_ranks, self.held_out_algorithm) if e.count]
        shared = max(errors, key=lambda error: error.median)
        return [
            {
                "algorithm": algorithm,
                "ranks": p,
                "bytes": size,
                "shared": self.fit.seconds(algorithm, p, size, nodes=_tens(algorithm, p)),
                "shared_error": shared.median,
                "shared_worst": max(error.worst for error in errors),
                "apart": self.fit.apart(algorithm, p, size, cores=self.cores, nodes=_tens(algorithm, p)),
                "apart_error": self.held_out_apart.median,
                "apart_worst": self.held_out_apart.worst,
            }
            for p in ranks
            for algorithm in algorithms
        ]


def _tens(algorithm: str, p: int) -> int:
    return p // 10 if algorithm == TWO_LEVEL else 1


class Agreement(NamedTuple):
    """A ring all-reduce beside gloo's: largest relative difference, ranks with other bits than rank 0, bytes.

    `share` is what the formula says of each rank, 2 (p - 1) V / p, `most_sent` what the busiest rank sent.
    """

    error: float
    differing: int
    share: int
    most_sent: int


def agreement(ranks: int, *, count: int = 120_000) -> Agreement:
    """Reduce normal numbers, `count` a rank (a multiple of the ranks), by ring and by torch.distributed."""
    answers = on_ranks(ranks, _agree, (count,))
    theirs = torch.tensor(answers[0][1], dtype=torch.float64)
    results = [torch.tensor(ours, dtype=torch.float64) for ours, _, _ in answers]
    error = max(float((ours - theirs).norm() / theirs.norm()) for ours in results)
    differing = sum(not torch.equal(ours, results[0]) for ours in results)
    return Agreement(error, differing, 2 * (ranks - 1) * 4 * count // ranks, max(sent for _, _, sent in answers))


def _agree(rank: int, count: int) -> tuple[list[float], list[float], int]:
    ours = torch.randn(count, generator=torch.Generator().manual_seed(rank))
    theirs, traffic = ours.clone(), Traffic()
    all_reduce(ours, algorithm="ring", traffic=traffic)
    dist.all_reduce(theirs)
    return ours.tolist(), theirs.tolist(), traffic.sent  # a tensor would have to outlive its process


def time_cases(
    ranks: int, cases: Sequence[Case], *, rounds: int, most: int = 0, threads: int = 1, repeats: int = 200
) -> dict[Case, Rounds]:
    """Time every case on `ranks` processes of `threads` threads, one warm-up, then `rounds` interleaved rounds.

    In a round a short vector is reduced several times, at most `repeats`, in up to `STRETCHES` stretches, and the
    median of their means taken: with more ranks than cores one late wake-up would else be most of a round. With `most`
    above `rounds`, rounds are added, up to `most`, until the last `rounds` of every case lie within `RESTLESS` of each
    other; they are the ones returned. Two-level takes the first and the second half of the ranks as two nodes.
    VolvelleError when a rank failed.
    """
    work = (list(cases), rounds, max(rounds, most), repeats)
    answers = on_ranks(ranks, _time_all, work, threads=threads, limit=3600.0)  # a machine may be slow; see SILENCE
    return {
        case: Rounds(
            [max(seconds) for seconds in zip(*(answer[i].wall for answer in answers), strict=True)],
            [sum(seconds) for seconds in zip(*(answer[i].cpu for answer in answers), strict=True)],
            sum(answer[i].sent for answer in answers),
        )
        for i, case in enumerate(cases)
    }


def _time_all(rank: int, cases: list[Case], rounds: int, most: int, repeats: int) -> list[Rounds]:
    vectors = {case.size: torch.ones(max(case.size // 4, 1)) for case in cases}
    taken = [Rounds([], [], 0) for _ in cases]
    gc.disable()
    for number in range(-1, most):  # the first warms up
        for step in range(len(cases)):
            i = (step + max(number, 0)) % len(cases)
            wall, cpu, sent = _time(cases[i], vectors[cases[i].size], repeats)
            if number >= 0:
                taken[i].wall.append(wall)
                taken[i].cpu.append(cpu)
                taken[i] = taken[i]._replace(sent=sent)
        if number + 1 >= rounds and (number + 1 == most or _calm(taken, rounds)):
            break
    return [Rounds(one.wall[-rounds:], one.cpu[-rounds:], one.sent) for one in taken]


def _calm(taken: list[Rounds], rounds: int) -> bool:
    """Whether the last rounds of every case were alike; all ranks get the same answer, that of the slowest of each."""
    walls = torch.tensor([one.wall[-rounds:] for one in taken], dtype=torch.float64)
    dist.all_reduce(walls, dist.ReduceOp.MAX)
    return bool((walls.amax(1) / walls.amin(1) - 1 <= RESTLESS).all())


def _time(case: Case, x: torch.Tensor, most: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes sent of one call; short ones are repeated."""
    repeats = max(1, min(most, (16 << 20) // max(case.size, 1)))
    stretches = min(STRETCHES, repeats)
    each = repeats // stretches
    traffic, p = Traffic(), dist.get_world_size()
    halves = Topology((tuple(range(p // 2)), tuple(range(p // 2, p)))) if case.algorithm == TWO_LEVEL else None
    algorithm: Any = case.algorithm
    x.fill_(1.0)
    dist.barrier()
    walls, cpu = [], time.process_time()
    for _ in range(stretches):
        wall = time.perf_counter()
        for _ in range(each):
            if algorithm == GLOO:
                dist.all_reduce(x)
            else:
                all_reduce(x, algorithm=algorithm, topology=halves, traffic=traffic)
        walls.append((time.perf_counter() - wall) / each)
    calls = stretches * each
    return statistics.median(walls), (time.process_time() - cpu) / calls, traffic.sent // calls


def compare(
    ranks: int, sizes: Sequence[int], algorithms: Sequence[str], *, rounds: int = 7, most: int = 0
) -> dict[Case, Rounds]:
    """Time the algorithms and torch.distributed's own all-reduce in one run, at every size."""
    names = [GLOO, *algorithms]
    return time_cases(ranks, [Case(name, size) for size in sizes for name in names], rounds=rounds, most=most)


def worlds(ranks: int) -> tuple[int, ...]:
    """The numbers of ranks that a model for up to `ranks` is made of; the last is held out.

    >>> worlds(4), worlds(2), worlds(8)
    ((2, 3, 4), (2, 3), (2, 3, 4, 8))
    """
    return tuple(sorted({2, 3, *[p for p in (4, 8, 16) if p < ranks], max(ranks, 3)}))


def calibrate(found: Table, *, held_out_ranks: Iterable[int], held_out_sizes: Iterable[int]) -> Calibration:
    """Fit latency, bandwidth and contention on what was timed and is not held out; measure the error on what is.

    Only the algorithms in `FITTED` are fitted, and two-level (of an even number of ranks) is predicted from them.
    ValueError when fewer than four timings are left to fit.
    """
    apart, later = set(held_out_sizes), set(held_out_ranks)
    timings = [
        Timing(case.algorithm, p, case.size, statistics.median(rounds.wall), 2 if case.algorithm == TWO_LEVEL else 1)
        for p, cases in found.items()
        for case, rounds in cases.items()
        if case.algorithm in FITTED or (case.algorithm == TWO_LEVEL and p > 2 and p % 2 == 0)
    ]
    known = [t for t in timings if t.algorithm in FITTED]
    seen = [t for t in known if t.ranks not in later and t.size not in apart]
    unseen = [t for t in known if t.ranks not in later and t.size in apart]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = fit(seen)
    return Calibration(
        model,
        cores,
        error_of(model, seen),
        error_of(model, unseen),
        error_of(model, [t for t in known if t.ranks in later]),
        error_of(model, [t for t in timings if t.algorithm == TWO_LEVEL]),
        error_of(model, [t for t in unseen if t.ranks <= cores], cores=cores),
        timings,
    )
