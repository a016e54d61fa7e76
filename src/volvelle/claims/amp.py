"""Mixed precision: speed, memory for the backward pass, equal accuracy, and gradients saved by loss scaling.

Everything is measured on a byte-level Llama decoder that learns Python's own manual (the text ships with Python).
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most
from volvelle.processor import flags

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CLAIM = Claim(
    title="Mixed precision training with loss scaling and FP32 master weights",
    family="precision",
    paper=Paper(
        "Micikevicius et al.",
        2018,
        "Mixed Precision Training",
        "abstract; sections 3.1 and 3.2; figure 3",
        "https://arxiv.org/abs/1710.03740",
    ),
    sentence="networks train in half precision without losing accuracy, faster and with about half of the memory, when "
    "a master copy of the weights is kept in fp32 and the loss is scaled so that small gradients do not become zero",
    measured_by="held-out loss after the same steps in fp32, bf16 and fp16; bytes that autograd keeps for the backward "
    "pass; gradients of one step with and without scaling, entry by entry; steps timed in interleaved rounds; the "
    "scaler against torch.amp.GradScaler",
    summary="Computes in 16 bits and keeps what needs 32: half the activations, and fast where the hardware has it.",
    summary_zh="以 16 位计算，仅在必要处保留 32 位：激活内存约减半，在有硬件支持时更快，精度不变。",
    seconds={"quick": 60, "full": 600},
    parts=(
        "functional.update_loss_scale",
        "functional.unscale_gradients",
        "functional.master_weight_update",
        "functional.number_format",
        "nn.LossScaler",
        "nn.MasterWeights",
    ),
    recipe="volvelle train language data=… precision=fp16",
)

LENGTH, BATCH = 128, 16
SIXTEEN_BITS = {"amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16"}
"""Instructions for products in bf16 and fp16."""


def measure(budget: Budget) -> Measurement:
    """Train, count, look at the gradients, time."""
    import torch

    quick = budget == "quick"
    steps, seeds = (50, (0,)) if quick else (300, (0, 1))
    train, held = _bytes()
    runs = {kind: [_trained(train, held, kind, steps, seed) for seed in seeds] for kind in ("fp32", "bf16", "fp16")}
    losses = {kind: [loss for loss, _ in found] for kind, found in runs.items()}
    model = runs["fp32"][0][1]
    batch = _batch(train, BATCH if quick else 4 * BATCH)
    findings = [*_accuracy(losses), *_memory(model, batch)]
    survival, histogram = _gradients(model, batch)
    findings += [*survival, _lost_updates(model, batch), _against_gradscaler()]
    speed, notes = _speed(3 if quick else 9, BATCH // 2 if quick else BATCH)
    findings += speed
    formats, layouts = _formats()
    findings += formats
    setting = {
        "network": "Llama, 3 layers x 128, bytes; timed: 4 layers x 512",
        "text": "Python's manual (pydoc_data.topics)",
        "steps": steps,
        "seeds": len(seeds),
        "tokens a step": BATCH * LENGTH,
        "threads": torch.get_num_threads(),
    }
    peers = {"torch.amp": torch.__version__}
    pictures = {"gradients": histogram, "formats": layouts}
    return Measurement(findings, peers=peers, setting=setting, pictures=pictures, notes=notes)


def _bytes() -> tuple[Tensor, Tensor]:
    """A long English text that every Python has, as bytes: for learning, and held out."""
    from pydoc_data import topics

    import torch

    text = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    tokens = torch.tensor(list(text), dtype=torch.int32)
    cut = int(0.95 * len(tokens))
    return tokens[:cut], tokens[cut:]


def _model(seed: int, width: int = 128, depth: int = 3) -> Any:
    import torch

    from volvelle.systems.language.config import GatedMLP, Head, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder

    torch.manual_seed(seed)
    return Decoder(
        LanguageConfig(
            family="llama", vocabulary=256, width=width, depth=depth, heads=4, kv_heads=4, context=LENGTH,
            norm=RMSNorm(1e-5), mlp=GatedMLP(3 * width), position=Rope(), head=Head(tied=True),
        )
    )  # fmt: skip


def _trained(train: Tensor, held: Tensor, kind: Any, steps: int, seed: int) -> tuple[float, Any]:
    """Held-out loss after the steps, and the model."""
    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.train import FitOptions, LanguageObjective, fit
    from volvelle.train.observer import Quiet

    model = _model(seed)
    options = FitOptions(steps=steps, batch=BATCH, learning_rate=3e-3, precision=kind, seed=seed, evaluate_every=None)
    batches = Loader(Windows(train, LENGTH), BATCH, seed=seed, collate=collate_windows)
    measured = Loader(Windows(held[: 64 * LENGTH], LENGTH), BATCH, seed=0, collate=collate_windows, shuffle=False)
    result = fit(LanguageObjective(model, options, held_out=measured), batches, options=options, observer=Quiet())
    return result.held_out["loss"], model


def _batch(tokens: Tensor, rows: int) -> dict[str, Tensor]:
    from volvelle.data.packing import Windows, collate_windows

    windows = Windows(tokens, LENGTH)
    return collate_windows([windows[i * (len(windows) // rows)] for i in range(rows)])


def _accuracy(losses: dict[str, list[float]]) -> list[Finding]:
    findings = [Finding("held-out loss, fp32", statistics.mean(losses["fp32"]), "nats a byte")]
    for kind in ("bf16", "fp16"):
        ratios = [a / b - 1 for a, b in zip(losses[kind], losses["fp32"], strict=True)]
        what = f"held-out loss, {kind} above fp32, relative"
        findings.append(at_most(what, statistics.mean(ratios), 0.01, spread=(min(ratios), max(ratios))))
    return findings


def _loss(model: Any, batch: Any, dtype: torch.dtype | None) -> Tensor:
    """Cross-entropy of the next byte, with or without autocast."""
    import torch
    from torch.nn import functional as F

    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(batch["ids"]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten())


def _convolutions() -> nn.Module:
    from torch import nn

    def block(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

    stages = [block(3, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _kept(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, each memory once, parameters not counted."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def _memory(model: Any, batch: Any) -> list[Finding]:
    import torch

    net, images = _convolutions(), torch.randn(16, 3, 32, 32)

    def convolve(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = net(images)
        return out.float().square().mean()

    runs: dict[str, tuple[Any, Callable]] = {
        "decoder": (model, lambda dtype: _loss(model, batch, dtype)),
        "conv net": (net, convolve),
    }
    findings = []
    for name, (module, run) in runs.items():
        full = _kept(module, lambda run=run: run(None))
        for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            half = _kept(module, lambda run=run, dtype=dtype: run(dtype))
            findings.append(at_least(f"{name}: kept for backward, fp32 over {kind}", full / half, 1.4, "x"))
    return findings


def _output_gradients(model: Any, batch: Any, dtype: torch.dtype | None, scale: float) -> tuple[list[Tensor], Tensor]:
    """Gradients of the loss, times `scale`, at the output of every linear layer, and one of the weights."""
    from torch import nn

    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_: Any, __: Any, out: Tensor) -> None:
            out.register_hook(lambda gradient: found.update({name: gradient}))

        return look

    parts = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    hooks = [part.register_forward_hook(watch(name)) for name, part in parts.items()]
    model.zero_grad()
    (_loss(model, batch, dtype) * scale).backward()
    for hook in hooks:
        hook.remove()
    weight = next(p.grad for name, p in model.named_parameters() if name.endswith("0.self_attn.v_proj.weight"))
    return [found[name] for name in sorted(found)], weight.clone()


def _gradients(model: Any, batch: Any) -> tuple[list[Finding], str]:
    """What fp16 loses of one step's gradients, unscaled and at the scale that dynamic scaling finds."""
    import torch

    from volvelle.claims.amp_drawing import histogram
    from volvelle.parts.precision.loss_scale import LossScaler

    exact, exact_weight = _output_gradients(model, batch, None, 1.0)
    scaler = LossScaler(initial=2.0**32)
    while True:
        scale = float(scaler.scale)
        scaled, weight = _output_gradients(model, batch, torch.float16, scale)
        overflow = not all(bool(g.isfinite().all()) for g in [*scaled, weight])
        if not overflow:
            break
        scaler.update(overflow)
    plain, plain_weight = _output_gradients(model, batch, torch.float16, 1.0)

    def lost(gradients: list[Tensor]) -> float:
        gone = sum(int(((g == 0) & (e != 0)).sum()) for g, e in zip(gradients, exact, strict=True))
        return gone / sum(int((e != 0).sum()) for e in exact)

    def error(found: Tensor) -> float:
        return float((found - exact_weight).norm() / exact_weight.norm())

    findings = [
        at_least("gradient entries that become zero in fp16, unscaled", lost(plain), 0.05),
        at_most("gradient entries that become zero in fp16, scaled", lost(scaled), 0.005),
        Finding("loss scale found", f"2^{int(math.log2(scale))}"),
        Finding("first value weights: gradient error in fp16, unscaled", error(plain_weight)),
        at_most("first value weights: gradient error in fp16, scaled", error(weight / scale), 0.02),
    ]
    panels = [("fp32 gradients at the linear layers' outputs", _shares(exact, 1.0))]
    panels.append((f"the same, with the loss scaled by 2^{int(math.log2(scale))}", _shares(exact, scale)))
    return findings, histogram(panels)


def _shares(gradients: list[Tensor], scale: float) -> dict[int, float]:
    """Share of the non-zero entries in each power of two."""
    import torch

    flat = torch.cat([g.flatten() for g in gradients]).double().abs() * scale
    powers = flat[flat > 0].log2().floor().long()
    values, counts = powers.unique(return_counts=True)
    return {int(v): int(c) / len(powers) for v, c in zip(values, counts, strict=True)}


def _lost_updates(model: Any, batch: Any) -> Finding:
    """Share of an Adam step's updates that fp16 weights without a master copy round away."""
    import copy

    import torch

    twin = copy.deepcopy(model)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-5)
    before = [p.detach().clone() for p in twin.parameters()]
    _loss(twin, batch, None).backward()
    adam.step()
    gone = total = 0
    for w, now in zip(before, twin.parameters(), strict=True):
        moved = now.detach() != w
        stays = (w.half() + (now.detach() - w).half()) == w.half()
        gone, total = gone + int((stays & moved).sum()), total + int(moved.sum())
    return at_least("Adam updates (rate 1e-5) lost by fp16 weights without masters", gone / total, 0.05)


def _against_gradscaler() -> Finding:
    """Our scaler and torch's on the same gradients, every seventh of them infinite: the largest difference in scale."""
    import torch

    from volvelle.parts.precision.loss_scale import LossScaler

    ours, theirs = LossScaler(growth_interval=5), torch.amp.GradScaler("cpu", growth_interval=5)
    w = torch.zeros(2, requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.0)
    worst = 0.0
    for step in range(60):
        poison = torch.tensor([1.0, math.inf if step % 7 == 6 else 2.0])
        gradient = ours(poison)
        ours.update(ours.unscale([gradient]))
        theirs.scale(torch.zeros(()))
        w.grad = poison * theirs.get_scale()
        theirs.step(sgd)
        theirs.update()
        worst = max(worst, abs(float(ours.scale) - theirs.get_scale()))
    return at_most("scale after each of 60 updates, difference from GradScaler", worst, 0)


def _speed(rounds: int, rows: int) -> tuple[list[Finding], list[str]]:
    """Time of an fp32 step over that of a bf16 and of an fp16 step, in interleaved rounds, of fp16 three at most.

    Without instructions for it a step in fp16 takes dozens of times as long.
    """
    import torch

    model = _model(0, width=512, depth=4)
    batch = _batch(torch.randint(256, (64 * LENGTH,), dtype=torch.int32), rows)
    kinds = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, dtype in kinds.items():
            if kind == "fp16" and number > 3:
                continue
            began = time.perf_counter()
            model.zero_grad()
            _loss(model, batch, dtype).backward()
            if number:
                seconds[kind].append(time.perf_counter() - began)
    has = flags() & SIXTEEN_BITS
    quiet = os.getloadavg()[0] <= (os.cpu_count() or 1)
    findings = []
    for kind in ("bf16", "fp16"):
        ratios = [a / b for a, b in zip(seconds["fp32"], seconds[kind], strict=False)]
        what, middle, spread = (
            f"time of a step, fp32 over {kind}",
            statistics.median(ratios),
            (min(ratios), max(ratios)),
        )
        judged = quiet and kind == "bf16" and "amx_bf16" in has
        make = at_least(what, middle, 1.2, "x", spread=spread) if judged else Finding(what, middle, "x", spread=spread)
        findings.append(make)
    notes = [f"instructions for 16-bit products here: {', '.join(sorted(has)) or 'none'}; bf16 is judged with amx_bf16"]
    notes += [] if quiet else ["the machine was busy: times are reported, not judged"]
    return findings, notes


def _formats() -> tuple[list[Finding], str]:
    """Layouts, ranges and steps; every 16-bit pattern decoded by the formula and read by the machine."""
    import torch

    from volvelle.claims.amp_drawing import layouts
    from volvelle.parts.precision.formats import BF16, FORMATS, FP16

    findings, rows = [], []
    for f in FORMATS:
        about = (
            f"1 + {f.exponent_bits} + {f.fraction_bits} bits; largest {f.largest:.5g}, smallest normal "
            f"{f.smallest_normal:.3g}, smallest {f.smallest_subnormal:.3g}, step at 1 {f.epsilon:.3g}"
        )
        findings.append(Finding(f.name, about))
        rows.append((f.name, f.layout(math.pi), f"pi; {about}"))
    wrong = 0
    for f in (FP16, BF16):
        machine = torch.arange(-(2**15), 2**15).to(torch.int16).view(f.dtype).double().tolist()
        found = [f.decode(pattern % 2**16) for pattern in range(-(2**15), 2**15)]
        wrong += sum(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(found, machine, strict=True))
    findings.append(at_most("16-bit patterns that the formula and the machine read differently", wrong, 0))
    return findings, layouts(rows)
