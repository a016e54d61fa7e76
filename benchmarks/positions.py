"""Facts of every position encoding that follow from running it once: python -m benchmarks.positions

What it trains, how far it reaches, what it tells apart, what a shift of all positions does, what fp32 loses far out;
and how much position convolutions leak with each kind of padding. No timings: the figures do not depend on the
machine's load. Writes results/positions.json.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import volvelle.nn as parts
from benchmarks import protocol
from volvelle.functional import attention, position_readout, recurrent_positions
from volvelle.parts.position.encoding import PositionEncoding

WIDTH, HEADS, LENGTH, SPAN, FAR, SHIFT, VOCABULARY = 512, 8, 512, 4096, 1_000_000, 1000, 1000
D = WIDTH // HEADS


def _deberta(k: int, max_position: int | None = None) -> PositionEncoding:
    return parts.DisentangledBias(
        HEADS, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), k=k, max_position=max_position
    )


class Row(NamedTuple):
    """A name, how to build the encoding, and the first position it refuses (None: none)."""

    name: str
    build: Callable[[], PositionEncoding]
    limit: int | None = None


ENCODINGS = [
    Row("sinusoidal", lambda: parts.SinusoidalPositions(WIDTH)),
    Row("learned", lambda: parts.LearnedPositions(LENGTH, WIDTH), LENGTH),
    Row("hierarchical", lambda: parts.HierarchicalPositions(LENGTH, WIDTH), LENGTH**2),
    Row("recurrent (FLOATER)", lambda: parts.RecurrentPositions(WIDTH)),
    Row("multiplicative", lambda: parts.MultiplicativePositions(LENGTH, WIDTH), LENGTH),
    Row("complex, per word", lambda: parts.ComplexPositions(WIDTH, vocabulary=VOCABULARY)),
    Row("CNN-induced", lambda: parts.ConvPositions(WIDTH)),
    Row("Shaw, k = 16", lambda: parts.ShawBias(D, k=16, value_width=D)),
    Row("Transformer-XL", lambda: parts.TransformerXLBias(HEADS, D, width=WIDTH)),
    Row("T5", lambda: parts.T5Bias(HEADS)),
    Row("dynamic, log-spaced", lambda: parts.DynamicBias(HEADS, log_distance=True)),
    Row("DeBERTa v1, k = 512", lambda: _deberta(512)),
    Row("DeBERTa v2, 256 buckets", lambda: _deberta(256, 512)),
    Row("ALiBi", lambda: parts.ALiBi(HEADS)),
    Row("RoPE", lambda: parts.RotaryEmbedding(D)),
]


def _built(row: Row) -> PositionEncoding:
    """The encoding with fp32 weights that matter."""
    torch.manual_seed(0)
    module = row.build()
    if isinstance(module, parts.T5Bias | parts.TransformerXLBias | parts.DisentangledBias):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    return module


def _attend(module: PositionEncoding, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """One attention layer over fixed inputs; the encoding keeps its fp32 weights, widened for fp64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, len(positions), WIDTH, generator=generator).to(dtype)
    w = (torch.randn(WIDTH, 3 * WIDTH, generator=generator) / math.sqrt(WIDTH)).to(dtype)
    ids = torch.arange(len(positions))[None] % VOCABULARY
    module = module.to(dtype)
    q, k, v = (module.embed(x, positions, ids) @ w).unflatten(-1, (3 * HEADS, D)).transpose(1, 2).chunk(3, dim=1)
    q, k = module.rotate(q, k, positions)
    bias = module.bias()
    options: dict[str, Any] = {"q_positions": positions, "k_positions": positions, "backend": "reference"}
    return attention(q, k, v, bias=bias, scale=None if bias is None else bias.scale, **options).detach()


def _difference(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).abs().max() / exact.abs().max())


def told_apart(module: PositionEncoding, limit: int | None) -> int:
    """How many of SPAN positions (of embeddings) or distances (of scores) get values of their own, in fp64."""
    module, n = module.double(), min(SPAN, limit or SPAN)
    positions = torch.arange(n)
    if module.bias() is None and module.rotation(positions, torch.float64) is None:
        rows = module.embed(torch.ones(1, n, WIDTH).double(), positions, torch.zeros(1, n, dtype=torch.int64))[0]
    else:
        torch.manual_seed(2)
        q = torch.randn(1, HEADS, 1, D, dtype=torch.float64)
        k = torch.randn(1, HEADS, 1, D, dtype=torch.float64).expand(1, HEADS, n, D)
        bias, last = module.bias(), positions[-1:]
        if bias is not None:
            rows = bias.tile(q, k, last, positions)[0, :, 0].T
        else:
            turned, _ = module.rotate(q, q, last)
            rows = (turned @ module.rotate(k, k, positions)[1].mT)[0, :, 0].T
    return len(torch.unique((rows.detach() * 1e9).round(), dim=0))


def facts(row: Row) -> dict[str, Any]:
    """One line of the table."""
    near, module = torch.arange(64), _built(row)
    exact = _attend(_built(row), near, torch.float64)
    sequential = isinstance(module, parts.RecurrentPositions)  # a million steps say nothing more than these
    far = FAR if row.limit is None else row.limit - len(near)
    far = SPAN if sequential else far
    return {
        "name": row.name,
        "trained": sum(parameter.numel() for parameter in module.parameters()),
        "limit": row.limit,
        "told_apart": told_apart(_built(row), row.limit),
        "shift": _difference(_attend(_built(row), near + min(SHIFT, far), torch.float64), exact),
        "far": far,
        "error_near": _difference(_attend(_built(row), near, torch.float32), exact),
        "error_far": _difference(
            _attend(_built(row), near + far, torch.float32), _attend(_built(row), near + far, torch.float64)
        ),
    }


def leak(padding: str, layers: int) -> float:
    """How much position a linear readout finds behind untrained convolutions over random tokens (R², new rows)."""
    torch.manual_seed(0)
    n, dim = 48, 64
    stack = [nn.Conv1d(dim, dim, 7, padding=3, padding_mode=padding) for _ in range(layers)]
    net = nn.Sequential(*(part for layer in stack for part in (layer, nn.ReLU())))
    with torch.no_grad():
        features = net(torch.randn(512, dim, n)).transpose(1, 2)
    return position_readout(features, torch.arange(n))


def solver_error(solver: Any, delta: float) -> float:
    """How far the recurrence is from the solution after time 6.4, relative to the largest vector."""
    torch.manual_seed(0)
    module = parts.RecurrentPositions(64).double()

    def state(solver: Any, delta: float) -> Tensor:
        last = torch.tensor([round(6.4 / delta)])
        return recurrent_positions(last, module.start, module.dynamics, delta=delta, solver=solver).detach()

    return _difference(state(solver, delta), state("rk4", 0.1 / 32))


def main() -> None:
    """Measure everything, store it, print it."""
    torch.set_num_threads(1)
    record = {
        "machine": protocol.machine(["torch"]),
        "size": {"width": WIDTH, "heads": HEADS, "length": LENGTH, "span": SPAN, "shift": SHIFT},
        "rows": [facts(row) for row in ENCODINGS],
        "leaks": [
            {"padding": padding, "layers": {str(n): leak(padding, n) for n in (1, 2, 4, 8)}}
            for padding in ("zeros", "circular", "reflect", "replicate")
        ],
        "solvers": [
            {"solver": solver, "delta": delta, "error": solver_error(solver, delta)}
            for solver in ("euler", "rk4")
            for delta in (0.1, 0.05)
        ],
    }
    print(f"wrote {protocol.write('positions', record)}")
    for row in [*record["rows"], *record["leaks"], *record["solvers"]]:
        print(row)


if __name__ == "__main__":
    main()
