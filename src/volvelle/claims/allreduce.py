"""The ring all-reduce: exact bytes, the same sums, and its time against sending everything to one rank and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from volvelle.inspect.collectives import Case, Rounds

CLAIM = Claim(
    title="Bandwidth-optimal all-reduce on a ring",
    family="collectives",
    paper=Paper(
        "Patarasuk and Yuan",
        2009,
        "Bandwidth optimal all-reduce algorithms for clusters of workstations",
        "section 4; lower bound in section 3",
        "https://doi.org/10.1016/j.jpdc.2008.09.002",
    ),
    sentence="on a ring every rank sends 2 (p - 1) V / p bytes, the least possible, so the time to reduce a long "
    "vector hardly depends on the number of ranks",
    measured_by="processes over gloo on loopback: bytes counted at every send, sums compared with "
    "torch.distributed.all_reduce, and time against the naive way (all to one rank, and back) in interleaved rounds",
    summary="Adds up gradients over processes with the fewest bytes; what data-parallel training waits for.",
    summary_zh="以最少的通信字节在多个进程间求和梯度，即数据并行训练所等待的步骤。",
    seconds={"quick": 60, "full": 240},
)

LONG = 32 << 20


def measure(budget: Budget) -> Measurement:
    """Count, compare and time on 2 and 4 ranks (full: also 3, and more rounds)."""
    import torch

    from volvelle.inspect.collectives import Case, agreement, time_cases
    from volvelle.parts.collectives.model import work_of

    worlds = (2, 4) if budget == "quick" else (2, 3, 4)
    rounds = 5 if budget == "quick" else 11
    cases = [Case(name, LONG) for name in ("gloo", "ring", "star")]
    findings: list[Finding] = []
    for p in worlds:
        found = time_cases(p, cases, rounds=rounds)
        extra = abs(found[Case("ring", LONG)].sent - work_of("ring", p, LONG).total)
        findings.append(at_most(f"ring, {p} ranks: bytes sent by all, beside 2 (p - 1) V", extra, 0, "bytes"))
        checked = agreement(p)
        findings.append(at_most(f"ring, {p} ranks: largest relative difference from gloo", checked.error, 1e-6))
        findings.append(at_most(f"ring, {p} ranks: ranks whose result has other bits", checked.differing, 0))
        uneven = abs(checked.most_sent - checked.share)
        findings.append(at_most(f"ring, {p} ranks: bytes of the busiest rank, beside 2 (p - 1) V / p", uneven, 0))
        findings += _times(p, found)
    setting = {"dtype": "fp32", "bytes": LONG, "ranks": list(worlds), "rounds": rounds, "threads": 1}
    notes = (
        "All ranks share this machine's cores and memory, so both ways move the same 2 (p - 1) V bytes through it; "
        "the naive way's bottleneck, one rank's link, shows fully only where every rank has a link of its own.",
    )
    peers = {"torch.distributed.all_reduce (gloo)": torch.__version__}
    return Measurement(findings, peers=peers, setting=setting, notes=notes)


def _times(p: int, found: dict[Case, Rounds]) -> list[Finding]:
    """The naive way's time over the ring's, and the ring's over gloo's: median and range over the rounds."""
    import statistics

    wall = {case.algorithm: rounds.wall for case, rounds in found.items()}
    naive = [a / b for a, b in zip(wall["star"], wall["ring"], strict=True)]
    gloo = [a / b for a, b in zip(wall["ring"], wall["gloo"], strict=True)]
    middle = statistics.median(naive)
    spread = (min(naive), max(naive))
    what = f"naive time / ring time, {p} ranks"
    # Two ranks cannot tell them apart: the naive way has no third rank to wait for the first.
    first = at_least(what, middle, 1.0, "x", spread=spread) if p > 2 else Finding(what, middle, "x", spread=spread)
    ratio = Finding(f"ring time / gloo time, {p} ranks", statistics.median(gloo), "x", spread=(min(gloo), max(gloo)))
    return [first, ratio]
