"""Exact attention in memory linear in the length: the tiled back end against the formula, and what it keeps alive."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_most

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLAIM = Claim(
    title="FlashAttention: exact attention in linear memory",
    family="attention",
    paper=Paper(
        "Dao et al.",
        2022,
        "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
        "theorem 1",
        "https://arxiv.org/abs/2205.14135",
    ),
    sentence="Algorithm 1 returns O = softmax(QK^T)V with O(N²d) FLOPs and requires O(N) additional memory beyond "
    "inputs and output",
    measured_by="the tiled back end in fp64 against the written-out formula (values, gradients; causal, grouped, with "
    "a window); the largest tensor and the peak of live tensors in forward and backward, at doubling lengths",
    summary="Attention tile by tile with an online softmax: the same numbers without the table of all scores.",
    summary_zh="逐块计算注意力并在线更新 softmax：结果相同，却无需整张分数表。",
    seconds={"quick": 20, "full": 120},
    parts=("functional.attention",),
)

HEADS, WIDTH = 2, 32


def measure(budget: Budget) -> Measurement:
    """Check values and gradients, then memory up to 2048 tokens (full: 8192)."""
    lengths = (512, 1024, 2048) if budget == "quick" else (1024, 2048, 4096, 8192)
    findings = [at_most("largest error of outputs and gradients, fp64", _error(), 1e-12)]
    largest, peak = {}, {}
    for n in lengths:
        largest[n] = _largest(n, "tiled")
        peak[n] = {backend: _peak(n, backend) for backend in ("tiled", "reference")}
    last, before = lengths[-1], lengths[-2]
    grown = {
        backend: math.log(peak[last][backend] / peak[before][backend]) / math.log(last / before)
        for backend in ("tiled", "reference")
    }
    findings += [
        at_most(f"peak memory of tiles grows as n to the power of, {before} to {last} tokens", grown["tiled"], 1.2),
        Finding("the same, written out", grown["reference"]),
        at_most(
            f"largest tensor at {last} tokens, over the number of scores", largest[last] / (HEADS * last * last), 0.2
        ),
        Finding(f"memory of tiles over written out, {last} tokens", peak[last]["tiled"] / peak[last]["reference"]),
    ]
    setting = {"heads": HEADS, "width": WIDTH, "dtype": "fp32, causal; errors in fp64", "lengths": list(lengths)}
    notes = ("One tile is of fixed size, so short texts look better written out; the last doubling is judged.",)
    return Measurement(findings, peers={"formula": "written out in fp64"}, setting=setting, notes=notes)


def _inputs(n: int, dtype: torch.dtype, h_kv: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, h_kv, h_kv)
    q, k, v = (
        torch.randn(1, h, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for h in heads
    )
    return q, k, v


def _error() -> float:
    """The largest difference over several calls, lengths that no tile divides among them."""
    import torch

    from volvelle.parts.attention.attention import attention

    worst = 0.0
    calls: list[tuple[int, dict[str, Any]]] = [
        (700, {}),
        (513, {"causal": True}),
        (600, {"causal": True, "window": (100, 0)}),
    ]
    for n, options in calls:
        found = []
        for backend in ("tiled", "reference"):
            inputs = _inputs(n, torch.float64, h_kv=1)
            out = attention(*inputs, backend=backend, **options)
            found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(*found, strict=True)))
    return worst


def _step(n: int, backend: str) -> None:
    import torch

    from volvelle.parts.attention.attention import attention

    inputs = _inputs(n, torch.float32)
    torch.autograd.grad(attention(*inputs, causal=True, backend=backend).sum(), inputs)


def _largest(n: int, backend: str) -> int:
    """The most numbers that any single tensor holds."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            out = function(*args, **(kwargs or {}))
            found = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.largest = max(self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in found), 0)
            return out

    with Watch() as watch:
        _step(n, backend)
    return watch.largest


def _peak(n: int, backend: str) -> int:
    """Bytes of tensors alive at once."""
    import torch

    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _step(n, backend)
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    live = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak
