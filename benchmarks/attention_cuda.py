"""The Triton kernels against torch's SDPA on a CUDA device, and against what the card can multiply at best.

    python -m benchmarks.attention_cuda [--quick] [--tokens 8192] [--only causal "learnable bias" …]

bf16, 128 features a head. The dense rate is that of torch's own product of two 8192 x 8192 matrices, measured in the
same minutes. "learnable bias" is a trained number for each head and distance: ours reads it by diagonal, SDPA gets it
written out. Writes results/attention_cuda.json; --quick prints only. Without a CUDA device nothing is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol
from benchmarks.attention import Relative
from volvelle.parts.attention.attention import attention

BATCH, HEADS, WIDTH, WINDOW = 2, 16, 128, 256
DENSE = 8192


class Call(NamedTuple):
    """Both sides of one kind of call, what gets gradients, and the share of all scores that is seen."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    seen: float


def calls(n: int) -> dict[str, Callable[[], Call]]:
    """Every kind of call at n tokens, made when its turn comes."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, HEADS, n, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    fused = F.scaled_dot_product_attention

    def ours(**options: Any) -> Tensor:
        return attention(q, k, v, backend="triton", **options)

    def causal() -> Call:
        seen = (n + 1) / (2 * n)
        return Call(lambda: ours(causal=True), lambda: fused(q, k, v, is_causal=True), (q, k, v), seen)

    def learnable() -> Call:
        table = torch.randn(HEADS, 2 * n + 1, device="cuda", requires_grad=True)
        place = torch.arange(n, device="cuda")
        gather = place[:, None] - place + n
        return Call(
            lambda: ours(bias=Relative(table)),
            lambda: fused(q, k, v, attn_mask=table[:, gather][None].to(q.dtype)),
            (q, k, v, table),
            1.0,
        )

    def window() -> Call:
        band = torch.ones(n, n, dtype=torch.bool, device="cuda").tril().triu(1 - WINDOW)
        seen = float(band.double().mean())
        return Call(
            lambda: ours(causal=True, window=(WINDOW - 1, 0)), lambda: fused(q, k, v, attn_mask=band), (q, k, v), seen
        )

    return {
        "plain": lambda: Call(ours, lambda: fused(q, k, v), (q, k, v), 1.0),
        "causal": causal,
        "learnable bias": learnable,
        "dropout": lambda: Call(lambda: ours(dropout=0.1), lambda: fused(q, k, v, dropout_p=0.1), (q, k, v), 1.0),
        f"window {WINDOW}": window,
    }


def finished(work: Callable[[], object]) -> Callable[[], None]:
    """The work, a few times over, until the device is done with it."""

    def run() -> None:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()

    return run


REPEATS = 10


def measure(name: str, call: Call, n: int, rounds: int) -> dict[str, Any]:
    """Forward, forward with backward, rates, and extra memory of one kind of call."""

    def both(one: Callable[[], Tensor]) -> None:
        torch.autograd.grad(one().sum(), call.inputs)

    @torch.no_grad()
    def forward(one: Callable[[], Tensor]) -> None:
        one()

    row: dict[str, Any] = {"what": name, "tokens": n}
    products = 4 * BATCH * HEADS * n * n * WIDTH * call.seen  # q k^T and the weights times v, multiply and add
    for kind, work, count in (("forward", forward, products), ("forward and backward", both, 3.5 * products)):
        variants = {
            who: finished(lambda one=one, work=work: work(one))
            for who, one in (("ours", call.ours), ("sdpa", call.theirs))
        }
        series = protocol.interleave(variants, rounds=rounds, warmup=2)
        row[kind] = {
            "seconds": {who: one.summary() for who, one in series.items()},
            "flops": {who: count * REPEATS / statistics.median(one.wall) for who, one in series.items()},
            "speed": protocol.compare(series, "ours", "sdpa"),
        }
    row["memory"] = {who: peak(lambda one=one: both(one)) for who, one in (("ours", call.ours), ("sdpa", call.theirs))}
    return row


def peak(work: Callable[[], object]) -> int:
    """Bytes on the device above what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def dense_rate(rounds: int) -> float:
    """Operations a second of a large bf16 product."""
    a, b = (torch.randn(DENSE, DENSE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    series = protocol.interleave({"dense": finished(lambda: a @ b)}, rounds=rounds, warmup=3)["dense"]
    return 2 * DENSE**3 * REPEATS / statistics.median(series.wall)


def shown(row: dict[str, Any], dense: float) -> str:
    share = row["forward"]["flops"]["ours"] / dense
    mib = {who: f"{size / 2**20:.0f}" for who, size in row["memory"].items()}
    return (
        f"{row['what']:15} n {row['tokens']}: forward {share:.0%} of the dense rate, "
        f"{protocol.shown(row['forward']['speed'])} of SDPA; with backward "
        f"{protocol.shown(row['forward and backward']['speed'])}; MiB {mib}"
    )


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        print("not measured: there is no CUDA device here")
        return
    rounds = 2 if options.quick else options.rounds
    with protocol.alone():
        facts = protocol.machine(("torch", "triton")) | {"device": torch.cuda.get_device_name()}
        dense, rows = dense_rate(rounds), []
        for n in [512] if options.quick else options.tokens:
            for name, make in calls(n).items():
                if not options.only or name in options.only:
                    rows.append(measure(name, make(), n, rounds))
                    print(shown(rows[-1], dense), flush=True)
    if not options.quick:
        setting = {"dtype": "bf16", "batch": BATCH, "heads": HEADS, "width": WIDTH}
        payload = {"machine": facts, "setting": setting, "dense_flops": dense, "rows": rows}
        print(protocol.write("attention_cuda", payload))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: little work, nothing written")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--only", nargs="+", default=[], help="kinds of call; all when left out")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for figures to publish")
    return parser.parse_args()


if __name__ == "__main__":
    main()
