"""Segmenting pictures: norms folded, channels last and bf16 against the same network in eager fp32, as peers run it.

    python -m benchmarks.segmentation [--quick] [--only batch1 batch8] [--rounds 5] [--threads N]

GCN on EfficientNet-Lite0 at CamVid's 360 x 480 pixels, from normalised pictures to scores in full size. How far the
scores and the chosen classes move is measured beside the time. Where timm is installed, its own encoder with our
decoder and the same weights runs too. Writes results/segmentation.json; --quick prints only.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol, tables
from benchmarks.support.timm_peer import load_timm
from volvelle.systems.segmentation import GCN, Segmenter, segmenter
from volvelle.systems.segmentation.inference import ready

PARTS = {"batch1": 1, "batch8": 8}
SIZE = (360, 480)
BASELINE = "eager fp32"


def main() -> None:
    options = protocol.parser(__doc__, PARTS).parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rounds = options.rounds or (2 if options.quick else 5)
    model = segmenter(GCN(width=48, detail=24), 11, weights="imagenet").eval()
    with protocol.alone(), torch.no_grad():
        packages = ("torch", "timm") if find_spec("timm") else ("torch",)
        facts = protocol.machine(packages)
        rows = protocol.read("segmentation").get("rows", [])
        for name in options.only:
            rows = protocol.keep(rows, measure(name, PARTS[name], model, rounds, (96, 128) if options.quick else SIZE))
            if not options.quick:
                record = {"size": SIZE, "machine": facts, "rows": rows}
                print(protocol.write("segmentation", record))
                tables.write("segmentation")


def measure(name: str, batch: int, model: Segmenter, rounds: int, size: tuple[int, int]) -> dict[str, Any]:
    """Every variant over the same pictures, several batches a round."""
    x = torch.randn(batch, 3, *size)
    variants, repeats = _variants(model, x), max(1, 16 // batch)
    exact = variants[BASELINE]()
    moved = {who: _moved(work(), exact) for who, work in variants.items()}
    series = protocol.interleave(
        {who: lambda work=work: [work() for _ in range(repeats)] for who, work in variants.items()},
        rounds=rounds,
        most=3 * rounds,
        passes=2,
        steady=[BASELINE],
    )
    baseline = "timm, eager fp32" if "timm, eager fp32" in series else BASELINE
    speed = {who: protocol.compare(series, who, baseline) for who in series if who != baseline}
    for who, found in speed.items():
        print(f"{name}: {who}: {protocol.shown(found)} of {baseline}", flush=True)
    rate = {who: batch * repeats / one.summary()["wall_median"] for who, one in series.items()}
    return {
        "what": name, "batch": batch, "images_per_second": rate, "speed": speed, "baseline": baseline, "moved": moved,
        "seconds": {who: one.summary() for who, one in series.items()},
    }  # fmt: skip


def _variants(model: Segmenter, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    folded = ready(copy.deepcopy(model))
    half = ready(copy.deepcopy(model), torch.bfloat16)
    last = x.contiguous(memory_format=torch.channels_last)
    small = last.bfloat16()
    found: dict[str, Callable[[], Tensor]] = {
        BASELINE: lambda: model(x),
        "folded, channels last": lambda: folded(last),
        "folded, channels last, bf16": lambda: half(small),
    }
    peer = _timm(model)
    if peer is not None:
        found["timm, eager fp32"] = lambda: peer(x)
    return found


class _Peer(nn.Module):
    """timm's encoder under our decoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor) -> Tensor:
        """Scores in full size."""
        return F.interpolate(self.decoder(self.encoder(x), x), size=x.shape[-2:], mode="bilinear")


def _timm(model: Segmenter) -> nn.Module | None:
    """The same network with timm's layers; None where timm is not installed."""
    if not find_spec("timm"):
        return None
    encoder = load_timm().create_model(
        "tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4), pretrained=False
    )
    ours, theirs = model.encoder.state_dict(), encoder.state_dict()
    encoder.load_state_dict({name: ours[name] for name in theirs})
    return _Peer(encoder, model.decoder).eval()


def _moved(scores: Tensor, exact: Tensor) -> dict[str, float]:
    """The largest change of a score, by the largest score, and the share of pixels whose class changed."""
    change = (scores.float() - exact).abs().max() / exact.abs().max()
    return {"scores": float(change), "classes": float((scores.argmax(1) != exact.argmax(1)).double().mean())}


if __name__ == "__main__":
    main()
