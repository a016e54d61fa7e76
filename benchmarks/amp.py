"""Training steps in fp32 against the same steps under bf16 and fp16 autocast: conv nets and a language model.

    python -m benchmarks.amp [--quick] [--only resnet50 smollm2] [--threads N]

A step is forward, backward and an SGD update with momentum, on the CPU (or CUDA where there is a device), fp16 with
dynamic loss scaling; of conv nets the fastest of three steps counts in each round. EfficientNet-B0 and ResNet-50 are
those of transformers, with random weights; SmolLM2-135M is ours. Target: >= 1.5x for bf16 on processors with AMX.
Writes results/amp.json; --quick is a smoke run and prints only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import protocol
from benchmarks.targets import AMP
from volvelle.nn import LossScaler

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A network, and a batch of `full` or `quick` samples for it."""

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    full: int
    quick: int
    best_of: int = 3  # steps a round, of which the fastest counts; fewer where rounds are long and calm spells short


def convolutional(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    """An image classifier of transformers."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(num_labels=1000, **values))

    return build


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 224, 224), torch.randint(1000, (count,))


def image_loss(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).logits.float(), targets)


def smollm2() -> nn.Module:
    from benchmarks.planner import decoder

    return decoder()


def tokens(count: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(49_000, (count, 256))
    return ids, ids.roll(-1, dims=1)


def language_loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    from volvelle.train.losses import linear_cross_entropy

    return linear_cross_entropy(model.hidden(ids).flatten(0, 1), model.output_weight, targets.flatten())


B0 = {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
CASES = {
    "efficientnet-b0": Case(
        "EfficientNet-B0 (transformers)",
        convolutional("EfficientNetForImageClassification", "EfficientNetConfig", **B0),
        images, image_loss, full=4, quick=1,
    ),
    "resnet50": Case(
        "ResNet-50 (transformers)",
        convolutional("ResNetForImageClassification", "ResNetConfig"),
        images, image_loss, full=8, quick=1,
    ),
    "smollm2": Case("SmolLM2-135M, 256 tokens a row", smollm2, tokens, language_loss, full=2, quick=1, best_of=1),
}  # fmt: skip


def step(case: Case, kind: str, count: int) -> Callable[[], float]:
    """One training step in that precision; each variant has a network and an optimiser of its own."""
    torch.manual_seed(0)
    model = case.build().train().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scaler = LossScaler().to(DEVICE) if kind == "fp16" else None
    x, targets = (part.to(DEVICE) for part in case.batch(count))
    dtype = DTYPES[kind]

    def run() -> float:
        context = torch.autocast(DEVICE.type, dtype) if dtype else contextlib.nullcontext()
        with context:
            loss = case.loss(model, x, targets)
        (scaler(loss) if scaler else loss).backward()
        found = False
        if scaler:
            found = bool(scaler.unscale([p.grad for p in model.parameters() if p.grad is not None]))
            scaler.update(found)
        if not found:
            optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # also waits for the device

    return run


def row_of(name: str, *, quick: bool) -> dict[str, Any]:
    """Times of the three precisions in interleaved rounds, and fp32's time over each."""
    case = CASES[name]
    count = case.quick if quick else case.full
    kinds = ("fp32", "bf16") if quick else tuple(DTYPES)
    variants = {kind: step(case, kind, count) for kind in kinds}
    rounds = {"rounds": 2, "most": 2} if quick else {"rounds": 5, "most": 60 // case.best_of, "best_of": case.best_of}
    series = protocol.interleave(variants, **rounds)
    speed = {kind: protocol.compare(series, kind, "fp32") for kind in kinds[1:]}
    row = {
        "case": name,
        "title": case.title,
        "batch": count,
        "seconds": {kind: one.summary() for kind, one in series.items()},
        "speed": speed,
        "best_of": 1 if quick else case.best_of,
    }
    times = ", ".join(f"{kind} {one['wall_median']:.3f} s" for kind, one in row["seconds"].items())
    shown = ", ".join(f"{kind} {protocol.shown(found)}" for kind, found in speed.items())
    print(f"{case.title:<32} batch {count:>2}: {times}; {shown}", flush=True)
    gc.collect()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one sample, nothing written")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with protocol.alone():
        machine = protocol.machine(("torch", "transformers")) | {"device": str(DEVICE), "amx": _amx()}
        rows = []
        for name in options.only:
            rows.append(row_of(name, quick=options.quick) | {"machine": machine})
            if not options.quick:  # after every row: a run that is cut keeps what it measured
                known = {row["case"]: row for row in protocol.read("amp").get("rows", [])}
                merged = known | {row["case"]: row for row in rows}
                print(protocol.write("amp", {"target": AMP, "machine": machine, "rows": list(merged.values())}))
    if options.quick:
        return 0
    ratios = {row["case"]: row["speed"]["bf16"]["ratio"] for row in rows}
    missed = [name for name, ratio in ratios.items() if ratio is None or ratio < AMP]
    print(f"target {AMP}x for bf16: {'held' if not missed else 'NOT held by ' + ', '.join(missed)}")
    return 1 if missed else 0


def _amx() -> bool:
    """Whether the processor multiplies bf16 in tiles."""
    return any("amx_bf16" in line for line in Path("/proc/cpuinfo").read_text().splitlines())


if __name__ == "__main__":
    raise SystemExit(main())
