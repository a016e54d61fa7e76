"""Beside the ring: doubling, halving, trees and two levels; their bytes and rounds, their sums, and who wins where."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from volvelle.inspect.collectives import Case, Rounds

CLAIM = Claim(
    title="Collectives by the length of the message",
    family="collectives",
    paper=Paper(
        "Thakur, Rabenseifner and Gropp",
        2005,
        "Optimization of Collective Communication Operations in MPICH",
        "abstract, sections 4.1 to 4.5",
        "https://doi.org/10.1177/1094342005051521",
    ),
    sentence="several algorithms for one operation, chosen by the length of the message: the fewest rounds for short "
    "ones (recursive doubling, log2 p), the fewest bytes for long ones (halving and doubling, 2 (p - 1) V / p a rank)",
    measured_by="processes over gloo on loopback, 2 to 8 of them, powers of two and not: bytes, messages and rounds of "
    "every all-reduce against the formulas, its sums against fp64 and its bits on every rank, and times of a short and "
    "a long vector in interleaved rounds",
    summary="Recursive doubling, Rabenseifner's halving and doubling, binomial trees and two levels: the ways to add "
    "up vectors that beat a ring where latency or the machine's borders count.",
    summary_zh="递归加倍、Rabenseifner 的减半加倍、二项树与两级算法：在延迟或跨机通信为主时胜过环形归约的求和方式。",
    seconds={"quick": 60, "full": 400},
)

FLAT = ("ring", "recursive-doubling", "halving-doubling", "tree")
TWO_LEVEL = "two-level"
COUNT = 8 * 840
"""Elements that every number of ranks up to 8 divides; few enough for one message a transfer."""
SHORT, LONG = 1 << 10, 16 << 20
COUNTED: Mapping[Budget, tuple[int, ...]] = {"quick": (3, 4, 6), "full": (2, 3, 4, 5, 6, 7, 8)}
"""Numbers of ranks on which messages are counted."""

Event = tuple[float, int, int]


class Seen(NamedTuple):
    """What one rank saw of one all-reduce: its messages in order, its relative error, and a checksum of its bits."""

    events: list[Event]
    error: float
    bits: int


def measure(budget: Budget) -> Measurement:
    """Count on 2 to 8 ranks (quick: 3, 4 and 6) and time on 4 (full: also 8)."""
    import torch

    from volvelle.inspect.collectives import Case, time_cases
    from volvelle.inspect.collectives_ranks import on_ranks

    counted_on = COUNTED[budget]
    timed_on, rounds = ((4,), 5) if budget == "quick" else ((4, 8), 9)
    found = {
        p: dict(zip(cases(p), zip(*on_ranks(p, counted, (cases(p),)), strict=True), strict=True)) for p in counted_on
    }
    findings = [finding for name in (*FLAT, TWO_LEVEL) for finding in _against_the_formulas(name, found)]
    for p in timed_on:
        sizes = [Case(name, size) for size in (SHORT, LONG) for name in (*FLAT, TWO_LEVEL)]
        findings += _times(p, time_cases(p, sizes, rounds=rounds))
    setting = {
        "dtype": "fp32",
        "bytes": {"counted": 4 * COUNT, "short": SHORT, "long": LONG},
        "ranks": {"counted": list(counted_on), "timed": list(timed_on)},
        "nodes of two-level": "two, or of 6 ranks also three",
        "rounds": rounds,
        "threads": 1,
    }
    notes = (
        "A round: every rank sends at most one message and receives at most one; counted by replaying the messages of "
        "all ranks in the order in which each sent and waited.",
        "All ranks share this machine's cores and memory, so a time follows the messages and bytes of all ranks "
        "together: the tree, and ranks that are folded, move as many bytes as the ring and look as fast for long "
        "vectors; on links of their own one rank's share would decide.",
    )
    peers = {"torch.distributed.all_reduce (gloo)": torch.__version__}
    return Measurement(findings, peers=peers, setting=setting, notes=notes)


def cases(p: int) -> list[tuple[str, int]]:
    """The algorithms with their number of nodes: 1 for those that take all ranks as equal."""
    return [(name, 1) for name in FLAT] + [(TWO_LEVEL, n) for n in (2, 3) if p % n == 0 and p // n > 1]


def counted(rank: int, chosen: Sequence[tuple[str, int]]) -> list[Seen]:
    """On one of several ranks: one all-reduce a case."""
    import zlib

    import torch
    import torch.distributed as dist

    from volvelle.inspect.collectives_trace import Log
    from volvelle.parts.collectives import Topology, all_reduce

    p = dist.get_world_size()
    parts = [torch.randn(COUNT, generator=torch.Generator().manual_seed(r)) for r in range(p)]
    whole = torch.stack(parts).double().sum(0)
    found = []
    for name, nodes in chosen:
        each = p // nodes
        topology = Topology(tuple(tuple(range(n * each, (n + 1) * each)) for n in range(nodes)))
        algorithm: Any = name
        log, x = Log(), parts[rank].clone()
        all_reduce(x, algorithm=algorithm, topology=topology if nodes > 1 else None, traffic=log)
        error = float((x.double() - whole).norm() / whole.norm())
        found.append(Seen(log.events, error, zlib.crc32(x.numpy().tobytes())))
        dist.barrier()
    return found


def rounds_of(logs: Sequence[Sequence[Event]]) -> int:
    """Rounds in which the messages can travel when a rank sends one and receives one at a time.

    `logs` has each rank's events in order, (time, peer, bytes), bytes negative for what it waited for.

    >>> rounds_of([[(0, 1, 8), (0, 1, -8)], [(0, 0, 8), (0, 0, -8)]])  # a swap
    1
    >>> rounds_of([[(0, 1, -8), (0, 2, -8)], [(0, 0, 8)], [(0, 0, 8)]])  # two to one
    2
    """
    from volvelle.inspect.collectives_trace import in_order

    p = len(logs)
    clock, sending, receiving = [0] * p, [0] * p, [0] * p
    sent: dict[tuple[int, int], list[int]] = {}
    for rank, peer, count, number in in_order(logs):
        if count > 0:
            sending[rank] = max(clock[rank], sending[rank]) + 1
            sent.setdefault((rank, peer), []).append(sending[rank])
        else:
            receiving[rank] = max(sent[peer, rank][number], receiving[rank] + 1)
            clock[rank] = max(clock[rank], receiving[rank])
    return max(*clock, *sending)


def _against_the_formulas(name: str, found: Mapping[int, Mapping[tuple[str, int], Sequence[Seen]]]) -> list[Finding]:
    """Bytes, messages and rounds on all numbers of ranks beside the formulas; sums and bits."""
    from volvelle.parts.collectives.model import work_of

    beside = {"bytes of all ranks": 0.0, "messages of all ranks": 0.0, "rounds": 0.0}
    errors, differing, tried = [], 0, []
    for p, runs in found.items():
        for (algorithm, nodes), seen in runs.items():
            if algorithm != name:
                continue
            work = work_of(name, p, 4 * COUNT, nodes=nodes)
            logs = [one.events for one in seen]
            sizes = [count for log in logs for _, _, count in log if count > 0]
            counts = (sum(sizes) - work.total, len(sizes) - work.messages, rounds_of(logs) - work.rounds)
            beside = {what: max(most, abs(c)) for (what, most), c in zip(beside.items(), counts, strict=True)}
            errors += [one.error for one in seen]
            differing += sum(one.bits != seen[0].bits for one in seen)
            tried.append(p)
    if not tried:
        return []
    on = f"{name}, {' '.join(map(str, sorted(set(tried))))} ranks"
    return [
        *(at_most(f"{on}: {what}, largest difference from the formula", worst, 0) for what, worst in beside.items()),
        at_most(f"{on}: largest relative error of the sum", max(errors), 1e-6),
        at_most(f"{on}: ranks whose result has other bits than rank 0's", differing, 0),
    ]


def _times(p: int, found: dict[Case, Rounds]) -> list[Finding]:
    """Time ratios with their range; bounds where the formulas differ in what all ranks send together."""
    walls = {(case.size, case.algorithm): rounds.wall for case, rounds in found.items()}

    def ratio(size: int, above: str, below: str) -> tuple[str, float, tuple[float, float]]:
        values = [a / b for a, b in zip(walls[size, above], walls[size, below], strict=True)]
        what = f"{p} ranks, {size:,} bytes: time of {above} / {below}"
        return what, statistics.median(values), (min(values), max(values))

    bounded = [
        (SHORT, "ring", "recursive-doubling"),
        (SHORT, "halving-doubling", "recursive-doubling"),
        (LONG, "recursive-doubling", "halving-doubling"),
        (LONG, "recursive-doubling", "ring"),
    ]
    shown = [(size, name, "ring") for size in (SHORT, LONG) for name in ("halving-doubling", "tree", TWO_LEVEL)]
    findings = []
    for case in bounded:
        what, middle, spread = ratio(*case)
        findings.append(at_least(what, middle, 1.0, "x", spread=spread))
    for case in shown:
        what, middle, spread = ratio(*case)
        findings.append(Finding(what, middle, "x", spread=spread))
    return findings
