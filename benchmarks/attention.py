"""attention() against torch's scaled_dot_product_attention: time, extra memory, and how memory grows with length.

    python -m benchmarks.attention [--quick] [--threads 1 2] [--lengths 2048 4096] [--only plain "learnable bias" …]

fp32, batch 1, 8 heads of 64 features. A row is one kind of call at one length and number of threads: forward alone and
forward with backward. Of calls below a second the fastest of three counts in each round, and rounds are added for a
minute at most until enough of them were calm. Every row is written to results/attention.json as soon as it is there,
beside those of earlier runs with the same torch on the same kind of machine: lengths and threads may be measured one by
one (`--lengths 4096 --threads 1`). --quick takes short texts and prints only.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import protocol, tables
from volvelle.parts.attention.attention import attention
from volvelle.parts.position.encoding import DistanceBias

HEADS, WIDTH = 8, 64
KINDS: tuple[str, ...] = ("plain", "causal", "learnable bias", "dropout", "window 256", "8 texts packed")
GROWTH, AUTO = "memory growth", "auto"
SECONDS = 60.0
"""How long rounds are added to a kind of call, at most."""


class Relative(DistanceBias):
    """A trained number for each head and distance."""

    learnable = True

    def __init__(self, table: Tensor):
        self.table = table

    def tensors(self) -> tuple[Tensor, ...]:
        """The table."""
        return (self.table,)

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Look the distances up."""
        return self.table[:, distance + self.table.shape[1] // 2].to(dtype)


class Call(NamedTuple):
    """Both sides of one kind of call, and what gets gradients."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


def calls(n: int) -> dict[str, Callable[[], Call]]:
    """Every kind of call at n tokens, made when its turn comes."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3))
    fused = F.scaled_dot_product_attention

    def plain() -> Call:
        return Call(lambda: attention(q, k, v, backend="tiled"), lambda: fused(q, k, v), (q, k, v))

    def causal() -> Call:
        ours = partial(attention, q, k, v, causal=True, backend="tiled")
        return Call(ours, lambda: fused(q, k, v, is_causal=True), (q, k, v))

    def learnable() -> Call:
        table = torch.randn(HEADS, 2 * n + 1, requires_grad=True)
        place = torch.arange(n)
        gather = place[:, None] - place + n
        ours = partial(attention, q, k, v, bias=Relative(table))
        return Call(ours, lambda: fused(q, k, v, attn_mask=table[:, gather][None]), (q, k, v, table))

    def dropout() -> Call:
        return Call(lambda: attention(q, k, v, dropout=0.1), lambda: fused(q, k, v, dropout_p=0.1), (q, k, v))

    def window() -> Call:
        band = torch.ones(n, n, dtype=torch.bool).tril().triu(-255)
        ours = partial(attention, q, k, v, causal=True, window=(255, 0))
        return Call(ours, lambda: fused(q, k, v, attn_mask=band), (q, k, v))

    def packed() -> Call:
        segments = torch.arange(n)[None] * 8 // n
        mask = (segments[0, :, None] == segments[0]).tril()
        ours = partial(attention, q, k, v, causal=True, segments=segments)
        return Call(ours, lambda: fused(q, k, v, attn_mask=mask), (q, k, v))

    return {
        "plain": plain,
        "causal": causal,
        "learnable bias": learnable,
        "dropout": dropout,
        "window 256": window,
        "8 texts packed": packed,
    }


def main() -> None:
    options = _arguments()
    lengths = [256] if options.quick else options.lengths
    with protocol.alone():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for n in lengths:
                for name, make in calls(n).items():
                    if name in options.only:
                        row = measure(name, make(), n, threads, 2 if options.quick else options.rounds, options.quick)
                        keep(options.quick, row)
                        gc.collect()
        if GROWTH in options.only:
            growth = memory_growth((64, 128, 256) if options.quick else (512, 1024, 2048, 4096))
            print(f"memory grows as n^{growth['tiled']:.2f} (tiled) and n^{growth['reference']:.2f} (written out)")
            keep(options.quick, memory_exponent=growth)
        if AUTO in options.only:
            overhead = call_overhead()
            print(f"auto adds {overhead['added_us']:.1f} µs to {overhead['theirs_us']:.1f} µs; {overhead['kernel']}")
            keep(options.quick, auto=overhead)


def keep(quick: bool, row: dict[str, Any] | None = None, **facts: Any) -> None:
    """Add one row, or other facts, to the stored ones of the same machine and versions; not of a smoke run."""
    if quick:
        return
    machine = {name: fact for name, fact in protocol.machine(("torch",)).items() if name != "threads"}
    known = protocol.read("attention")
    if any(known.get("machine", {}).get(name) != machine[name] for name in ("cpu", "packages", "python")):
        known = {}
    rows = {_key(one): one for one in known.get("rows", [])}
    if row is not None:
        rows[_key(row)] = row | {"date": machine["date"], "load": machine["load_at_start"]}
    order = [rows[key] for key in sorted(rows, key=lambda key: (key[1:], [*KINDS].index(key[0])))]
    setting = {"dtype": "fp32", "batch": 1, "heads": HEADS, "width": WIDTH}
    record = known | {"machine": machine, "setting": setting, "rows": order} | facts
    protocol.write("attention", record)
    tables.write("attention")


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["what"], row["tokens"], row["threads"]


def measure(name: str, call: Call, n: int, threads: int, rounds: int, quick: bool) -> dict[str, Any]:
    """Time and extra memory of both sides."""

    def forward(one: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            one()

    def both(one: Callable[[], Tensor]) -> None:
        torch.autograd.grad(one().sum(), call.inputs)

    row: dict[str, Any] = {"what": name, "tokens": n, "threads": threads}
    for kind, run in (("forward", forward), ("forward and backward", both)):
        variants = {"ours": lambda run=run: run(call.ours), "sdpa": lambda run=run: run(call.theirs)}
        began = time.perf_counter()
        for one in variants.values():  # the warm-up, which tells how long a round takes
            one()
        seconds = time.perf_counter() - began
        best_of = 3 if seconds < 1 and not quick else 1
        most = 0 if quick else min(6 * rounds, int(SECONDS / (seconds * best_of)))
        series = protocol.interleave(variants, rounds=rounds, warmup=0, most=most, best_of=best_of)
        row[kind] = {
            "seconds": {who: one.summary() for who, one in series.items()},
            "speed": protocol.compare(series, "ours", "sdpa"),
        }
    row["memory"] = {
        who: protocol.tensor_peak(lambda one=one: both(one))
        for who, one in (("ours", call.ours), ("sdpa", call.theirs))
    }
    mib = {who: f"{size / 2**20:.0f}" for who, size in row["memory"].items()}
    print(
        f"{name:15} n {n} threads {threads}: forward {protocol.shown(row['forward']['speed'])}, with backward "
        f"{protocol.shown(row['forward and backward']['speed'])} of SDPA; MiB {mib}",
        flush=True,
    )
    return row


def memory_growth(lengths: tuple[int, ...]) -> dict[str, float]:
    """The exponent b of memory ~ n^b, fitted to forward and backward at these lengths."""
    found = {}
    for backend in ("tiled", "reference"):
        sizes = []
        for n in lengths:
            q, k, v = (torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3))

            def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, backend: str = backend) -> None:
                torch.autograd.grad(attention(q, k, v, backend=backend).sum(), (q, k, v))

            sizes.append(protocol.tensor_peak(work))
        # The last doubling: what does not grow (one tile) weighs least there.
        found[backend] = math.log(sizes[-1] / sizes[-2]) / math.log(lengths[-1] / lengths[-2])
    return found


def call_overhead() -> dict[str, Any]:
    """What attention() adds to a small call that SDPA serves, and the kernel that both end in."""
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, HEADS, 16, WIDTH) for _ in range(3))

    def ours() -> Tensor:
        return attention(q, k, v, causal=True)

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    times = {}
    with torch.no_grad():
        for name, one in (("theirs", theirs), ("ours", ours)):
            times[name] = min(timeit.repeat(one, number=200, repeat=15)) / 200 * 1e6
        kernels = {}
        for name, one in (("theirs", theirs), ("ours", ours)):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                one()
            kernels[name] = sorted(e.key for e in profile.key_averages() if "flash" in e.key or "attention" in e.key)
    same = "the same kernels" if kernels["ours"] == kernels["theirs"] else f"other kernels: {kernels}"
    return {"theirs_us": times["theirs"], "added_us": times["ours"] - times["theirs"], "kernel": same}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*KINDS, GROWTH, AUTO]
    parser.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for figures to publish")
    return parser.parse_args()


if __name__ == "__main__":
    main()
