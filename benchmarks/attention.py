"""attention() against torch's scaled_dot_product_attention: time, extra memory, and how memory grows with length.

    python -m benchmarks.attention [--quick] [--threads 1 2] [--lengths 2048 4096] [--only bias dropout …]

fp32, batch 1, 8 heads of 64 features. A row is one kind of call at one length and number of threads: forward alone and
forward with backward. Writes results/attention.json; --quick takes short texts and prints only.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import timeit
from collections.abc import Callable
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
TARGETS = {  # time of ours / time of SDPA, forward and backward; extra memory of ours / SDPA's
    "plain": (1.4, None),
    "learnable bias": (0.5, 0.1),
    "dropout": (0.5, None),
    "window 256": (0.45, None),
}


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


def calls(n: int) -> dict[str, Call]:
    """Every kind of call at n tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH, requires_grad=True) for _ in range(3))
    table = torch.randn(HEADS, 2 * n + 1, requires_grad=True)
    place = torch.arange(n)
    gather = place[:, None] - place + n
    band = torch.ones(n, n, dtype=torch.bool).tril().triu(-255)
    fused = F.scaled_dot_product_attention
    return {
        "plain": Call(lambda: attention(q, k, v, backend="tiled"), lambda: fused(q, k, v), (q, k, v)),
        "causal": Call(
            lambda: attention(q, k, v, causal=True, backend="tiled"), lambda: fused(q, k, v, is_causal=True), (q, k, v)
        ),
        "learnable bias": Call(
            lambda: attention(q, k, v, bias=Relative(table)),
            lambda: fused(q, k, v, attn_mask=table[:, gather][None]),
            (q, k, v, table),
        ),
        "dropout": Call(lambda: attention(q, k, v, dropout=0.1), lambda: fused(q, k, v, dropout_p=0.1), (q, k, v)),
        "window 256": Call(
            lambda: attention(q, k, v, causal=True, window=(255, 0)), lambda: fused(q, k, v, attn_mask=band), (q, k, v)
        ),
    }


def main() -> None:
    options = _arguments()
    lengths = [256] if options.quick else options.lengths
    rounds, most = (2, 2) if options.quick else (options.rounds, 4 * options.rounds)
    with protocol.alone():
        facts, rows = protocol.machine(("torch",)), []
        for threads in options.threads:
            torch.set_num_threads(threads)
            for n in lengths:
                for name, call in calls(n).items():
                    if name in options.only:
                        rows.append(measure(name, call, n, threads, rounds, most))
                    gc.collect()
        growth = memory_growth((64, 128, 256) if options.quick else (512, 1024, 2048, 4096))
        overhead = call_overhead()
    print(f"memory grows as n^{growth['tiled']:.2f} (tiled) and n^{growth['reference']:.2f} (written out)")
    print(f"auto adds {overhead['added_us']:.1f} µs to a call of {overhead['theirs_us']:.1f} µs; {overhead['kernel']}")
    if not options.quick:
        setting = {"dtype": "fp32", "batch": 1, "heads": HEADS, "width": WIDTH}
        payload = {"machine": facts, "setting": setting, "rows": rows, "memory_exponent": growth, "auto": overhead}
        print(protocol.write("attention", payload))
        tables.write("attention")


def measure(name: str, call: Call, n: int, threads: int, rounds: int, most: int) -> dict[str, Any]:
    """Time and extra memory of both sides."""

    def forward(one: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            one()

    def both(one: Callable[[], Tensor]) -> None:
        torch.autograd.grad(one().sum(), call.inputs)

    row: dict[str, Any] = {"what": name, "tokens": n, "threads": threads, "target": TARGETS.get(name)}
    for kind, run in (("forward", forward), ("forward and backward", both)):
        variants = {"ours": lambda run=run: run(call.ours), "sdpa": lambda run=run: run(call.theirs)}
        series = protocol.interleave(variants, rounds=rounds, most=most)
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
    names = ["plain", "causal", "learnable bias", "dropout", "window 256"]
    parser.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for figures to publish")
    return parser.parse_args()


if __name__ == "__main__":
    main()
