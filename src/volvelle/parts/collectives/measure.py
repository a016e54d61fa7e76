"""Timing collectives on this machine: ranks as processes over gloo on loopback, variants in turn, rounds interleaved.

`compare` times all-reduces against `torch.distributed.all_reduce`; `calibrate` fits model.py, checks it on sizes and
world sizes it has not seen, and only then extrapolates. A script that calls them needs the usual `__main__` guard.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from volvelle.parts.collectives.collectives import AlgorithmName, all_reduce
from volvelle.parts.collectives.model import Error, Fit, Timing, error_of, fit
from volvelle.parts.collectives.wire import Traffic

GLOO = "gloo"
"""The name under which torch.distributed's own all_reduce is timed."""
LIMIT = 600.0


class Case(NamedTuple):
    """One thing to time: an algorithm's name or `GLOO`, and the bytes of the fp32 vector."""

    algorithm: str
    size: int


class Rounds(NamedTuple):
    """Seconds of one case, a number a round: the slowest rank's mean; CPU seconds summed over ranks; bytes sent."""

    wall: list[float]
    cpu: list[float]
    sent: int


@dataclass(frozen=True)
class Calibration:
    """A fitted model, what it was fitted on, and its error on runs it had not seen.

    Held out were sizes, and a world size; `held_out_apart` is the error of `Fit.apart` on held-out sizes of runs with
    no more ranks than cores, the only ones that can check it here (NaN where there are none).
    """

    fit: Fit
    cores: int
    fitted: Error
    held_out_sizes: Error
    held_out_ranks: Error
    held_out_apart: Error
    timings: list[Timing]

    def extrapolate(self, ranks: Sequence[int], size: int, algorithms: Sequence[str]) -> list[dict[str, Any]]:
        """Seconds for more ranks, all on this machine and each on a core of its own, beside the held-out errors."""
        shared = max(self.held_out_sizes, self.held_out_ranks, key=lambda error: error.median)
        return [
            {
                "algorithm": algorithm,
                "ranks": p,
                "bytes": size,
                "shared": self.fit.seconds(algorithm, p, size),
                "shared_error": shared.median,
                "shared_worst": max(self.held_out_sizes.worst, self.held_out_ranks.worst),
                "apart": self.fit.apart(algorithm, p, size, cores=self.cores),
                "apart_error": self.held_out_apart.median,
                "apart_worst": self.held_out_apart.worst,
            }
            for p in ranks
            for algorithm in algorithms
        ]


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
    answers = _on_ranks(ranks, _agree, (count,), threads=1)
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


def time_cases(ranks: int, cases: Sequence[Case], *, rounds: int, threads: int = 1) -> dict[Case, Rounds]:
    """Time every case on `ranks` processes of `threads` threads, one warm-up, then `rounds` interleaved rounds.

    Raises:
        RuntimeError: a rank failed or did not answer; every process is ended first.
    """
    answers = _on_ranks(ranks, _time_all, (list(cases), rounds), threads=threads)
    return {
        case: Rounds(
            [max(seconds) for seconds in zip(*(answer[i].wall for answer in answers), strict=True)],
            [sum(seconds) for seconds in zip(*(answer[i].cpu for answer in answers), strict=True)],
            sum(answer[i].sent for answer in answers),
        )
        for i, case in enumerate(cases)
    }


def _on_ranks(ranks: int, program: Callable[..., Any], arguments: tuple, *, threads: int) -> list[Any]:
    """program(rank, *arguments) on every rank of a fresh gloo group; what each returned, in rank order."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and forked before any thread
    context.set_forkserver_preload(["volvelle.parts.collectives.measure"])
    pipes, processes = [], []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            place = (theirs, store.port, rank, ranks, threads)
            processes.append(context.Process(target=_rank, args=(place, program, arguments), daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        answers = [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(5)
    finally:
        for process in processes:
            process.kill()
            process.join(5)
    return answers


def _answer(pipe: Any, rank: int) -> Any:
    try:
        if pipe.poll(LIMIT):
            return pipe.recv()
    except EOFError:
        raise RuntimeError(f"collectives.measure: rank {rank} ended without a result") from None
    raise RuntimeError(f"collectives.measure: rank {rank} did not answer within {LIMIT:.0f} s")


def _rank(place: tuple[Any, int, int, int, int], program: Callable[..., Any], arguments: tuple) -> None:
    pipe, port, rank, ranks, threads = place
    torch.set_num_threads(threads)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    value = program(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    pipe.send(value)


def _time_all(rank: int, cases: list[Case], rounds: int) -> list[Rounds]:
    vectors = {case.size: torch.ones(max(case.size // 4, 1)) for case in cases}
    taken = [Rounds([], [], 0) for _ in cases]
    gc.disable()
    for number in range(-1, rounds):  # the first warms up
        for step in range(len(cases)):
            i = (step + max(number, 0)) % len(cases)
            wall, cpu, sent = _time(cases[i], vectors[cases[i].size])
            if number >= 0:
                taken[i].wall.append(wall)
                taken[i].cpu.append(cpu)
                taken[i] = taken[i]._replace(sent=sent)
    return taken


def _time(case: Case, x: torch.Tensor) -> tuple[float, float, int]:
    """Mean seconds, CPU seconds and bytes sent of one call; short ones are repeated."""
    repeats = max(1, min(200, (16 << 20) // max(case.size, 1)))
    traffic = Traffic()
    algorithm: Any = case.algorithm
    x.fill_(1.0)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        if algorithm == GLOO:
            dist.all_reduce(x)
        else:
            all_reduce(x, algorithm=algorithm, traffic=traffic)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / repeats, cpu / repeats, traffic.sent // repeats


def compare(
    ranks: int, sizes: Sequence[int], algorithms: Sequence[AlgorithmName], *, rounds: int = 7
) -> dict[Case, Rounds]:
    """Time the algorithms and torch.distributed's own all-reduce in one run, at every size."""
    names = [GLOO, *algorithms]
    return time_cases(ranks, [Case(name, size) for size in sizes for name in names], rounds=rounds)


def calibrate(
    *,
    ranks: Sequence[int] = (2, 4),
    sizes: Sequence[int] = (1 << 10, 16 << 10, 256 << 10, 4 << 20, 32 << 20),
    held_out_ranks: Sequence[int] = (3,),
    held_out_sizes: Sequence[int] = (4 << 10, 64 << 10, 1 << 20, 16 << 20),
    algorithms: Sequence[AlgorithmName] = ("ring", "halving-doubling", "recursive-doubling", "tree"),
    rounds: int = 5,
) -> Calibration:
    """Fit latency, bandwidth and contention on `ranks` x `sizes`; measure the error elsewhere."""
    cases = [Case(name, size) for size in sorted({*sizes, *held_out_sizes}) for name in algorithms]
    timings = []
    for p in (*ranks, *held_out_ranks):
        for case, found in time_cases(p, cases, rounds=rounds).items():
            timings.append(Timing(case.algorithm, p, case.size, statistics.median(found.wall)))
    seen = [t for t in timings if t.ranks in ranks and t.size in sizes]
    unseen = [t for t in timings if t.ranks in ranks and t.size in held_out_sizes]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = fit(seen)
    return Calibration(
        found,
        cores,
        error_of(found, seen),
        error_of(found, unseen),
        error_of(found, [t for t in timings if t.ranks in held_out_ranks]),
        error_of(found, [t for t in unseen if t.ranks <= cores], cores=cores),
        timings,
    )
