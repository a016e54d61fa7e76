"""Function and Module: the Module holds the weights and calls the function, and that costs a few microseconds.

The tests compare all pairs; here are ten of different kinds, on inputs so small that the call itself is what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    import torch
    from torch import nn

CLAIM = Claim(
    title="Functions and their Modules",
    family="design",
    paper=Paper(
        "Paszke et al.",
        2019,
        "PyTorch: An Imperative Style, High-Performance Deep Learning Library",
        "section 4.1",
        "https://arxiv.org/abs/1912.01703",
    ),
    sentence="layers are typically expressed as Python classes whose constructors create and initialize their "
    "parameters, and whose forward methods process an input activation",
    measured_by="pairs of a Module and its function with the same weights, bit for bit in fp32 and fp64; the time of "
    "both on tiny inputs in interleaved rounds, torch's own pairs beside them",
    summary="The function is the technique; the Module only keeps its weights and options and calls it.",
    summary_zh="函数即技术本身；Module 只保存权重与选项并调用该函数。",
    seconds={"quick": 40, "full": 120},
)

BOUND = 20.0  # microseconds


class Pair(NamedTuple):
    """The same result in two ways."""

    name: str
    module: Callable[[], torch.Tensor]
    function: Callable[[], torch.Tensor]


def measure(budget: Budget) -> Measurement:
    """Values of all pairs, then the time that a Module adds (full: more rounds)."""
    import torch

    from volvelle.export import PUBLIC, import_parts

    import_parts()
    rounds, calls = (7, 200) if budget == "quick" else (21, 400)
    findings = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.float64):
            different = sum(not torch.equal(pair.module(), pair.function()) for pair in pairs(dtype))
            count = sum(1 for _ in pairs(dtype))
            findings.append(at_most(f"pairs of {count} that differ in a bit, {dtype}", different, 0))
        for pair in pairs(torch.float32):
            added, spread = extra(pair, rounds, calls)
            findings.append(at_most(f"added by {pair.name}", added, BOUND, "us a call", spread=spread))
        for pair in _torch_pairs():
            added, spread = extra(pair, rounds, calls)
            findings.append(Finding(f"added by {pair.name} to its function", added, "us a call", spread=spread))
    modules = [entry for entry in PUBLIC if entry.name.startswith("nn.")]
    shared = [entry for entry in modules if entry.twin is not None]
    findings.append(Finding("public Modules", len(modules)))
    findings.append(at_least("of them with a function that they call", len(shared), len(pairs_named())))
    setting = {"rounds": rounds, "calls a round": calls, "threads": torch.get_num_threads(), "mode": "inference"}
    return Measurement(findings, peers={"torch": torch.__version__}, setting=setting)


def extra(pair: Pair, rounds: int, calls: int) -> tuple[float, tuple[float, float]]:
    """Microseconds that a call of the Module takes longer: the median over rounds, and the range."""
    for _ in range(calls // 4):
        pair.module()
        pair.function()
    found = []
    for _ in range(rounds):
        # In turn, a few calls at a time, so that both meet the same load; of each the fastest few count.
        times: dict[str, list[float]] = {"module": [], "function": []}
        for _ in range(calls // 10):
            for kind in times:
                call = getattr(pair, kind)
                began = time.perf_counter()
                for _ in range(10):
                    call()
                times[kind].append((time.perf_counter() - began) / 10)
        module, function = (statistics.median(times[kind]) for kind in ("module", "function"))
        found.append(1e6 * (module - function))
    return statistics.median(found), (min(found), max(found))


def pairs_named() -> list[str]:
    """The public names of the Modules that are compared."""
    import torch

    return [pair.name for pair in pairs(torch.float32)]


def pairs(dtype: torch.dtype) -> Iterator[Pair]:
    """Modules of different kinds with random weights, and the calls of their functions."""
    import torch
    from torch import nn

    from volvelle.export import PUBLIC

    torch.manual_seed(0)

    def pair(name: str, layer: nn.Module, inputs: tuple[Any, ...], call: Callable[[Any], Any]) -> Pair:
        twin = PUBLIC[name].twin
        return Pair(name, lambda: _only(layer(*inputs)), lambda: _only(call(twin)))

    def made(name: str, *arguments: Any, **options: Any) -> Any:
        return PUBLIC[name].target(*arguments, **options).to(dtype)

    x = torch.randn(2, 4, 5, dtype=dtype)
    image = torch.randn(1, 4, 6, 6, dtype=dtype)
    q, k, v = torch.randn(3, 2, 2, 4, 8, dtype=dtype)
    at = torch.arange(4)
    lora = made("nn.LoRALinear", nn.Linear(5, 7, dtype=dtype), rank=3, alpha=6.0)
    nn.init.normal_(lora.b)
    weights = (lora.weight, lora.bias, lora.a, lora.b, 2.0)
    yield pair("nn.LoRALinear", lora, (x,), lambda f: f(x, *weights))
    yield pair("nn.Attention", made("nn.Attention", causal=True), (q, k, v), lambda f: f(q, k, v, causal=True))
    linear = made("nn.LinearAttention", causal=True, chunk=3)
    yield pair("nn.LinearAttention", linear, (q, k, v), lambda f: f(q, k, v, causal=True, chunk=3))
    yield pair("nn.RotaryEmbedding", made("nn.RotaryEmbedding", 8), (q, k, at), lambda f: f(q, k, at))
    table = made("nn.LearnedPositions", 7, 5)
    yield pair("nn.LearnedPositions", table, (at,), lambda f: f(at, table.weight))
    sines = made("nn.SinusoidalPositions", 6)
    yield pair("nn.SinusoidalPositions", sines, (at, dtype), lambda f: f(at, 6, dtype=dtype))
    same = made("nn.Conv2dSame", 4, 6, 3, stride=2)
    yield pair("nn.Conv2dSame", same, (image,), lambda f: f(image, same.weight, same.bias, 2))
    bottleneck = made("nn.BottleneckAdapter", 5, 3, activation="gelu")
    for parameter in bottleneck.parameters():
        nn.init.normal_(parameter)
    inner = (bottleneck.down, bottleneck.down_bias, bottleneck.up, bottleneck.up_bias)
    options = {"residual": x, "scale": 1.0, "activation": "gelu"}
    yield pair("nn.BottleneckAdapter", bottleneck, (x, x), lambda f: f(x, *inner, **options))


def _torch_pairs() -> Iterator[Pair]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    x, image = torch.randn(2, 4, 5), torch.randn(1, 4, 6, 6)
    linear, convolution = nn.Linear(5, 7), nn.Conv2d(4, 6, 3)
    yield Pair("torch.nn.Linear", lambda: linear(x), lambda: F.linear(x, linear.weight, linear.bias))
    yield Pair(
        "torch.nn.Conv2d",
        lambda: convolution(image),
        lambda: F.conv2d(image, convolution.weight, convolution.bias),
    )


def _only(result: Any) -> torch.Tensor:
    """The tensor, or the tensors of a pair behind each other."""
    import torch

    return result if isinstance(result, torch.Tensor) else torch.cat([part.flatten() for part in result])
