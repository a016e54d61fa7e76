"""What `volvelle bench collectives` prints: times, exact bytes, the model and its error, then what follows from it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from volvelle.cli.console import duration, progress, say, table
from volvelle.errors import UsageError
from volvelle.inspect.collectives import (
    FITTED,
    GLOO,
    RESTLESS,
    SIZES,
    TWO_LEVEL,
    Calibration,
    Case,
    Rounds,
    Table,
    calibrate,
    time_cases,
    worlds,
)
from volvelle.parts.collectives import Topology, choose
from volvelle.parts.collectives.model import Error, work_of

ALGORITHMS = (*FITTED, "star", TWO_LEVEL)
MANY = (10, 100, 1000, 10_000)
EXTRAPOLATED = ("ring", "halving-doubling", "recursive-doubling", TWO_LEVEL)
PATIENCE = 60.0
"""Seconds after which no further restless size is timed again."""
SMOKE = 5
"""Repeats of a short vector in a smoke run."""
QUICK = (1 << 10, 64 << 10, 1 << 20, 4 << 20)


def run(ranks: int, sizes: Sequence[int], rounds: int, *, quick: bool = False) -> dict[str, Any]:
    """Measure, print, and return the record for --json."""
    sizes = list(sizes) or list(QUICK if quick else SIZES)
    held_out = sizes[1::2]
    if len(sizes) < 2:
        raise UsageError("bench collectives: needs two sizes: one to fit the model on and one to check it with")
    groups = worlds(ranks)
    shown = f"ranks {_words(groups)}, {short(sizes[0])} to {short(sizes[-1])}, {rounds} rounds"
    say(f"all-reduce of fp32 sums over loopback, one thread a rank; {shown}; torch {torch.__version__}")
    found = _measure(groups, ranks, sizes, rounds, SMOKE if quick else 200)
    record = {"ranks": ranks, "sizes": sizes, "rounds": rounds, "rows": _times(ranks, sizes, found[ranks])}
    record["bytes_exact"] = _bytes(found)
    model = calibrate(found, held_out_ranks=groups[-1:], held_out_sizes=held_out)
    record |= _model(model, groups, held_out, sizes[-1])
    record["selection"] = _selection(ranks, sizes, found[ranks])
    if quick:
        say("", "a smoke run: do not rely on these figures")
    return record


def _measure(groups: Sequence[int], ranks: int, sizes: Sequence[int], rounds: int, repeats: int) -> Table:
    """Time every number of ranks; a size in which gloo was restless once more by itself, until rounds are calm."""
    found: dict[int, dict[Case, Rounds]] = {}
    with progress("ranks", len(groups)) as bar:
        for p in groups:
            names = [name for name in (GLOO, *ALGORITHMS) if name in FITTED or (p == ranks and _fits(name, p))]
            cases = [Case(name, size) for size in sizes for name in names]
            found[p] = time_cases(p, cases, rounds=rounds, repeats=repeats)
            bar.advance(note=f"{p} ranks timed")
    names = {case.algorithm for case in found[ranks]}
    restless = [size for size in sizes if found[ranks][Case(GLOO, size)].drift > RESTLESS]
    end = time.monotonic() + PATIENCE
    with progress("again, restless sizes", len(restless)) as bar:
        for size in restless if repeats > SMOKE else ():
            if time.monotonic() > end:
                break  # a machine this busy does not become calm
            cases = [Case(name, size) for name in names]
            found[ranks] |= time_cases(ranks, cases, rounds=rounds, most=2 * rounds, repeats=repeats)
            bar.advance(note=short(size))
    return found


def _fits(algorithm: str, p: int) -> bool:
    """Two levels need two ranks in a node."""
    return algorithm != TWO_LEVEL or p > 2


def _times(ranks: int, sizes: Sequence[int], cases: Any) -> list[dict[str, Any]]:
    """Print the table of ratios; return a row an algorithm and size."""
    names = [name for name in ALGORITHMS if Case(name, sizes[0]) in cases]
    say("", f"time / gloo's time on {ranks} ranks, median over the rounds; below 1 is faster than torch.distributed")
    rows, lines = [], []
    for size in sizes:
        gloo = cases[Case(GLOO, size)]
        refused = gloo.drift > RESTLESS
        line: list[object] = [short(size), f"{statistics.median(gloo.wall) * 1e3:.3g}"]
        for name in names:
            ours = cases[Case(name, size)]
            ratios = [a / b for a, b in zip(ours.wall, gloo.wall, strict=True)]
            ratio = statistics.median(ratios)
            line.append("-" if refused else f"{ratio:.2f}")
            rows.append({
                "algorithm": name,
                "bytes": size,
                "seconds": statistics.median(ours.wall),
                "gloo_seconds": statistics.median(gloo.wall),
                "ratio": None if refused else ratio,
                "range": [min(ratios), max(ratios)],
                "gloo_drift": gloo.drift,
                "sent": ours.sent,
            })  # fmt: skip
        lines.append([*line, f"no ratio: gloo itself drifted by {gloo.drift:.0%}" if refused else ""])
    table(("bytes", "gloo ms", *names, ""), lines)
    return rows


def _bytes(found: Table) -> bool:
    """Compare every count with its formula, say what came out, and return whether all are equal."""
    wrong, right = [], 0
    for p, cases in found.items():
        for case, rounds in cases.items():
            nodes = 2 if case.algorithm == TWO_LEVEL else 1
            if case.algorithm == GLOO or p % nodes:
                continue
            expected = round(work_of(case.algorithm, p, case.size, nodes=nodes).total)
            right += rounds.sent == expected
            if rounds.sent != expected:
                wrong.append(f"{case.algorithm}, {p} ranks, {case.size} bytes: {rounds.sent}, formula {expected}")
    verdict = f"{len(wrong)} are not" if wrong else f"all {right} counts are exactly that (ring: 2 (p - 1) V)"
    say("", f"bytes sent by all ranks, counted at every send, beside the formulas: {verdict}", *wrong)
    return not wrong


def _model(model: Calibration, groups: Sequence[int], held_out: Sequence[int], size: int) -> dict[str, Any]:
    """Print the fit, its error, and only then what it says of more ranks."""
    fit, last = model.fit, groups[-1]
    say(
        "",
        "model: seconds = rounds alpha + path bytes beta + all messages alpha' + all bytes beta'",
        f"  alpha {fit.alpha * 1e6:.3g} us, beta {fit.beta * 1e9:.3g} ns/B; what ranks of one machine share: "
        f"alpha' {fit.alpha_shared * 1e6:.3g} us, beta' {fit.beta_shared * 1e9:.3g} ns/B",
        f"  fitted on ranks {_words(groups[:-1])} and every second size; its error, |predicted / measured - 1|:",
    )
    errors = {
        "on what it was fitted on": model.fitted,
        f"held-out sizes {_words(map(short, held_out))}": model.held_out_sizes,
        f"held-out ranks {last}": model.held_out_ranks,
        "held-out algorithm two-level": model.held_out_algorithm,
        f"held-out sizes, a core for each rank (up to {model.cores})": model.held_out_apart,
    }
    lines = [(what, percent(e.median), percent(e.worst), e.count) for what, e in errors.items() if e.count]
    table(("  error", "median", "worst", "of"), [(f"  {what}", *rest) for what, *rest in lines])
    many = [row for vector in (1 << 10, size) for row in model.extrapolate(MANY, vector, EXTRAPOLATED)]
    _extrapolated(many, "shared", "extrapolated, all ranks on this machine")
    _extrapolated(many, "apart", "extrapolated, each rank on a core and a link of its own; two-level: ten a node")
    say(
        f"  the errors were seen on up to {last} ranks: beyond that they are a lower bound of the doubt;",
        "  a core and link of its own has no network in it: every link is as fast as this machine's memory",
    )
    return {
        "fit": fit._asdict(),
        "fitted": model.fitted._asdict(),
        "held_out": {
            "sizes": _plain(model.held_out_sizes),
            "ranks": _plain(model.held_out_ranks),
            "algorithm": _plain(model.held_out_algorithm),
            "apart": _plain(model.held_out_apart),
        },
        "extrapolated": [{k: v if v == v else None for k, v in row.items()} for row in many],
    }


def _extrapolated(many: Sequence[dict[str, Any]], which: str, title: str) -> None:
    """Print predicted times, a line a number of ranks and size, each line with the error that belongs to it."""
    lines: dict[tuple[int, int], list[str]] = {}
    for row in many:
        lines.setdefault((row["ranks"], row["bytes"]), []).append(seconds(row[which]))
    error, worst = percent(many[0][f"{which}_error"]), percent(many[0][f"{which}_worst"])
    say("", title)
    table(
        ("ranks", "bytes", *EXTRAPOLATED, "held-out error"),
        [(ranks, short(size), *times, f"{error}, worst {worst}") for (ranks, size), times in lines.items()],
    )


def _selection(ranks: int, sizes: Sequence[int], cases: Any) -> list[dict[str, Any]]:
    """Print which algorithm is taken where, beside the fastest of this run."""
    topologies: dict[str, tuple[int, Topology | None]] = {
        f"{ranks} ranks": (ranks, None),
        "6 ranks": (6, None),
        "1024 ranks": (1024, None),
        "4 machines of 8": (32, Topology(tuple(tuple(range(i, i + 8)) for i in range(0, 32, 8)))),
    }
    rows = []
    for size in sizes:
        timed = [case for case in cases if case.size == size and case.algorithm not in {GLOO, TWO_LEVEL}]
        fastest = min(timed, key=lambda case: statistics.median(cases[case].wall)).algorithm
        chosen = {name: choose(size, p, topology) for name, (p, topology) in topologies.items()}
        rows.append({"bytes": size, **{name: one.algorithm for name, one in chosen.items()}, "fastest here": fastest})
    say("", 'selection (algorithm="auto"), by size and topology; last, the fastest flat one of this run')
    table(tuple(rows[0]), [(short(row["bytes"]), *list(row.values())[1:]) for row in rows])
    return rows


def short(size: int) -> str:
    """Bytes in the largest unit that divides them.

    >>> short(1024), short(64 << 20), short(1500)
    ('1K', '64M', '1500')
    """
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def seconds(value: float) -> str:
    """Seconds with a unit and three digits; long ones in minutes and hours.

    >>> seconds(3.2e-5), seconds(0.0123), seconds(75.0), seconds(7500.0)
    ('32 us', '12.3 ms', '75 s', '2 h 5 min')
    """
    if value >= 120:
        return duration(value)
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def percent(value: float) -> str:
    """A relative error; "none" where there was nothing to compare."""
    return f"{value:.0%}" if value == value else "none"


def _plain(error: Error) -> dict[str, Any]:
    return error._asdict() if error.count else {"median": None, "worst": None, "count": 0}


def _words(values: Any) -> str:
    return ", ".join(map(str, values))
