"""Our collectives against gloo's own all-reduce, and a model of latency, bandwidth and contention with its error.

    python -m benchmarks.collectives            # the table and the model, benchmarks/results/collectives.json
    python -m benchmarks.collectives --ranks 4 --sizes 1024     # these rows again, the others and the model stay
    python -m benchmarks.collectives --quick    # a smoke run, nothing written

Ranks are processes on loopback, one thread each; a round times every variant once, in turning order; a time is that of
the slowest rank. Short vectors are reduced many times in a row. Time ratios are ours / gloo: below 1 is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

from benchmarks import protocol
from benchmarks.targets import ALL_REDUCE
from volvelle.inspect import collectives
from volvelle.inspect.collectives import FITTED, GLOO, TWO_LEVEL, Calibration, Case, Rounds, compare, time_cases
from volvelle.parts.collectives.selection import choose

ALGORITHMS = (*FITTED, "star", TWO_LEVEL)
EXTRAPOLATED = (*FITTED[:3], TWO_LEVEL)
SIZES = (1 << 10, 16 << 10, 128 << 10, 1 << 20, 8 << 20, 64 << 20)
CALM = 6
"""Times the rounds that are waited for calm ones."""
MANY = (10, 100, 1000, 10_000)


def main() -> None:
    options = _arguments()
    sizes = tuple(options.sizes or ((1 << 10, 1 << 20) if options.quick else SIZES))
    rounds = 2 if options.quick else options.rounds
    with protocol.alone():
        machine = protocol.machine(["torch"]) | {"threads": 1, "scheduler": _scheduler()}
        rows = [row for p in options.ranks for row in _table(p, sizes, rounds)]
        print(_shown(rows), flush=True)
        if options.quick:
            return
        # The rows first: a run that is cut keeps what it measured.
        before = protocol.read("collectives")
        known = {(row["ranks"], row["bytes"], row["algorithm"]): row for row in before.get("rows", [])}
        known |= {(row["ranks"], row["bytes"], row["algorithm"]): row | {"machine": machine} for row in rows}
        payload = {
            "machine": machine,
            "peer": "torch.distributed.all_reduce over gloo",
            "setting": {"dtype": "fp32", "op": "sum", "transport": "loopback", "rounds": rounds},
            "rows": list(known.values()),
        } | ({"model": before["model"]} if "model" in before else {})
        print(f"wrote {protocol.write('collectives', payload)}")
        if options.sizes:
            return
        model = _calibrate(rounds)
    print(_model_text(model))
    print(f"wrote {protocol.write('collectives', payload | {'model': _model_record(model)})}")


def _table(p: int, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One row an algorithm and size; rounds are added until they are calm."""
    found: dict[Case, Rounds] = {}
    for size in sizes:
        found |= compare(p, [size], _of(p), rounds=rounds, most=CALM * rounds)
    rows = []
    for case, ours in found.items():
        if case.algorithm == GLOO:
            continue
        row = _row(p, case, ours, found[Case(GLOO, case.size)])
        fastest = min(_of(p), key=lambda name: statistics.median(found[Case(name, case.size)].wall))
        chosen = choose(case.size, p).algorithm == case.algorithm
        rows.append(row | {"chosen": chosen, "fastest": fastest})
    return rows


def _of(p: int) -> tuple[str, ...]:
    """The algorithms on p ranks: two levels need two ranks in a node."""
    return ALGORITHMS if p > 2 else ALGORITHMS[:-1]


def _calibrate(rounds: int) -> Calibration:
    """Time two to four ranks, fit on two and three and on every second size, hold out the rest."""
    groups, sizes = collectives.worlds(4), collectives.SIZES
    names = (*FITTED, TWO_LEVEL)
    found = {
        p: time_cases(p, [Case(name, size) for size in sizes for name in names if name in _of(p)], rounds=rounds)
        for p in groups
    }
    return collectives.calibrate(found, held_out_ranks=groups[-1:], held_out_sizes=sizes[1::2])


def _row(p: int, case: Case, ours: Rounds, gloo: Rounds) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(ours.wall, gloo.wall, strict=True)]
    drift = gloo.drift
    ratio = statistics.median(ratios)
    target = ALL_REDUCE.get((case.algorithm, p, case.size))
    return {
        "algorithm": case.algorithm,
        "ranks": p,
        "bytes": case.size,
        "seconds": statistics.median(ours.wall),
        "gloo_seconds": statistics.median(gloo.wall),
        "cpu_seconds": statistics.median(ours.cpu),
        "gloo_cpu_seconds": statistics.median(gloo.cpu),
        "time_ratio": ratio if drift <= collectives.RESTLESS else None,
        "range": [min(ratios), max(ratios)],
        "unfiltered_ratio": ratio,
        "gloo_drift": drift,
        "sent": ours.sent,
        "target": target,
        "met": None if target is None or drift > collectives.RESTLESS else ratio <= target,
    }


def _shown(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'ranks':>5} {'bytes':>10} {'algorithm':<19}{'ms':>9} {'/ gloo':>7}  range          sent by all"]
    for row in rows:
        ratio = f"{row['time_ratio']:.2f}" if row["time_ratio"] is not None else "none"
        low, high = row["range"]
        note = f"  target <= {row['target']}: {_verdict(row)}" if row["target"] else ""
        note += "  (selected)" if row["chosen"] else ""
        note += f"  no ratio: gloo drifted by {row['gloo_drift']:.0%}" if row["time_ratio"] is None else ""
        lines.append(
            f"{row['ranks']:>5} {row['bytes']:>10} {row['algorithm']:<19}{row['seconds'] * 1e3:>9.3f} {ratio:>7}  "
            f"{low:.2f} to {high:.2f}  {row['sent']:>11}{note}"
        )
    return "\n".join(lines)


def _verdict(row: dict[str, Any]) -> str:
    return {True: "met", False: "missed", None: "refused"}[row["met"]]


def _model_text(model: Calibration) -> str:
    fit = model.fit
    lines = [
        f"model: alpha {fit.alpha * 1e6:.1f} us, beta {fit.beta * 1e9:.3f} ns/B, shared: "
        f"{fit.alpha_shared * 1e6:.1f} us a message, {fit.beta_shared * 1e9:.3f} ns/B"
    ]
    errors = {
        "fitted": model.fitted,
        "held-out sizes": model.held_out_sizes,
        "held-out ranks": model.held_out_ranks,
        "held-out algorithm (two-level)": model.held_out_algorithm,
        f"held-out sizes, apart (up to {model.cores} ranks)": model.held_out_apart,
    }
    lines += [f"  {name}: error {e.median:.0%} median, {e.worst:.0%} worst of {e.count}" for name, e in errors.items()]
    lines.append(
        "extrapolated, 64 MB: all ranks on this machine; each on a core with such a link to itself (no network)"
    )
    for row in model.extrapolate(MANY, 64 << 20, EXTRAPOLATED):
        lines.append(
            f"  {row['ranks']:>6} {row['algorithm']:<19} shared {row['shared']:>9.3g} s +- {row['shared_error']:.0%} "
            f"(worst {row['shared_worst']:.0%})   apart {row['apart']:>9.3g} s +- {row['apart_error']:.0%} "
            f"(worst {row['apart_worst']:.0%})"
        )
    lines.append("  the errors were seen on up to 4 ranks; so far beyond them they are a lower bound of the doubt")
    return "\n".join(lines)


def _model_record(model: Calibration) -> dict[str, Any]:
    return {
        "fit": model.fit._asdict(),
        "cores": model.cores,
        "fitted": model.fitted._asdict(),
        "held_out_sizes": model.held_out_sizes._asdict(),
        "held_out_ranks": model.held_out_ranks._asdict(),
        "held_out_algorithm": model.held_out_algorithm._asdict(),
        "held_out_apart": model.held_out_apart._asdict(),
        "extrapolated": [row for size in (1 << 10, 64 << 20) for row in model.extrapolate(MANY, size, EXTRAPOLATED)],
        "timings": [timing._asdict() for timing in model.timings],
    }


def _scheduler() -> str:
    """The scheduling class: under a real-time one (chrt) other work on the machine cannot get between."""
    return {0: "other", 1: "fifo", 2: "round robin"}.get(os.sched_getscheduler(0), "unknown")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", help="bytes of the vectors; without the model")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for figures to publish")
    return parser.parse_args()


if __name__ == "__main__":
    main()
