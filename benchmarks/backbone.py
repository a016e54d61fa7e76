"""Classifying pictures: norms folded, channels last, bf16 and compiled, against timm's eager fp32 at equal weights.

    python -m benchmarks.backbone [--quick] [--only b0 lite0] [--rounds 5] [--threads N]

EfficientNet-B0 and Lite0 at 224 pixels, one picture at a time and eight. How far the logits move is measured beside the
time, by the largest logit, and so is what compiling took. Writes results/backbone.json; --quick prints only.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support.timm_peer import load_timm
from volvelle.systems.backbone import CONFIGS, fold
from volvelle.systems.backbone.load import build

PARTS = {"b0": "efficientnet-b0", "lite0": "efficientnet-lite0"}
BASELINE = "timm, eager fp32"
BATCHES = (1, 8)
PICTURES = 16
"""Pictures of one variant in a round."""
Variants = dict[str, Callable[[Tensor], Tensor]]


def main() -> None:
    options = protocol.parser(__doc__, PARTS).parse_args()
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5)
    with protocol.alone(), torch.no_grad():
        facts = protocol.machine(("torch", "timm"))
        rows = protocol.read("backbone").get("rows", [])
        for part in options.only:
            peer, ours = networks(PARTS[part])
            for batch in BATCHES[:1] if options.quick else BATCHES:
                size = 64 if options.quick else CONFIGS[PARTS[part]].preprocessing.size
                x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
                rows = protocol.keep(
                    rows, measure(PARTS[part], peer, ours, x, rounds, quick=options.quick), ("what", "batch")
                )
                if not options.quick:
                    print(protocol.write("backbone", {"machine": facts, "rows": rows}))
                    tables.write("backbone")


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """The network of timm and ours with the same weights, random but with activations of size one."""
    torch.manual_seed(0)
    peer = load_timm().create_model(CONFIGS[name].timm, pretrained=False).eval()
    for module in peer.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
    ours = build(CONFIGS[name]).eval()
    ours.load_state_dict(peer.state_dict())
    return peer, ours


def measure(name: str, peer: nn.Module, ours: nn.Module, x: Tensor, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Every variant over the same pictures, several batches a round; the compilers run before the clock."""
    variants, compiled = ways(ours, quick=quick)
    variants = {BASELINE: peer, **variants}
    warmup = {who: _seconds(variants[who], x) for who in compiled}
    exact = peer(x)
    moved = {who: float((work(x).float() - exact).abs().max() / exact.abs().max()) for who, work in variants.items()}
    repeats = 2 if quick else max(1, PICTURES // len(x))
    series = protocol.interleave(
        {who: lambda work=work: [work(x) for _ in range(repeats)] for who, work in variants.items()},
        rounds=rounds,
        most=3 * rounds,
        passes=1 if quick else 2,
        steady=[BASELINE],
    )
    speed = {who: protocol.compare(series, who, BASELINE) for who in series if who != BASELINE}
    for who, found in speed.items():
        print(f"{name}, batch {len(x)}: {who}: {protocol.shown(found)}, logits move by {moved[who]:.1e}", flush=True)
    rate = {who: len(x) * repeats / one.summary()["wall_median"] for who, one in series.items()}
    return {
        "what": next(part for part, full in PARTS.items() if full == name), "name": name, "batch": len(x),
        "size": x.shape[-1], "images_per_second": rate, "speed": speed, "moved": moved, "warmup_seconds": warmup,
        "seconds": {who: one.summary() for who, one in series.items()},
    }  # fmt: skip


def ways(model: nn.Module, *, quick: bool) -> tuple[Variants, list[str]]:
    """The ways to run our network, and which of them compile at the first call. All take fp32 pictures."""
    folded = copy.deepcopy(model)
    fold(folded)
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    half = copy.deepcopy(last).to(torch.bfloat16)

    def laid(net: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x.to(dtype, memory_format=torch.channels_last))

    found: Variants = {
        "ours, eager fp32": model,
        "folded": folded,
        "folded, channels last": laid(last),
        "folded, channels last, bf16": laid(half, torch.bfloat16),
    }
    compiled: list[str] = []
    if not quick:  # takes minutes
        found["folded, channels last, compiled"] = laid(torch.compile(copy.deepcopy(last)))
        found["folded, channels last, bf16, compiled"] = laid(torch.compile(copy.deepcopy(half)), torch.bfloat16)
        compiled = [who for who in found if who.endswith("compiled")]
    return found, compiled


def _seconds(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of the first call."""
    before = time.perf_counter()
    work(x)
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
