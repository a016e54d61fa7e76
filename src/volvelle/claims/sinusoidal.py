"""Sinusoidal positions: a step to the side is one linear map, the same at every position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Sinusoidal positions",
    family="position",
    paper=Paper(
        "Vaswani et al.",
        2017,
        "Attention Is All You Need",
        "section 3.5",
        "https://arxiv.org/abs/1706.03762",
    ),
    sentence="for any fixed offset k, PE(pos + k) can be represented as a linear function of PE(pos); the wavelengths "
    "form a geometric progression from 2π to 10000 · 2π",
    measured_by="tables in fp64 at positions below 10 million: for several offsets the linear map that fits half of "
    "them best, tried on the other half and on ones ten million further; the same for a random table; wavelengths from "
    "the angles of each pair; the paper's formula written out, number by number",
    summary="Sines and cosines of geometric wavelengths, added to the embeddings once: no parameters, any length.",
    summary_zh="波长成等比数列的正弦与余弦，一次性加到词嵌入上：没有参数，长度不限。",
    seconds={"quick": 20, "full": 60},
    parts=("functional.sinusoidal_positions", "nn.SinusoidalPositions"),
    recipe="volvelle train language data=book.txt position=sinusoidal",
)

OFFSETS = (1, 7, 100, 1000)
RANGE = FAR = 10_000_000
"""Positions that are drawn: some beats of the two slowest pairs, which on fewer cannot be told apart."""


def measure(budget: Budget) -> Measurement:
    """Width 64 (full: also 512)."""
    import torch

    from volvelle.parts.position import sinusoidal

    findings: list[Finding] = []
    for width in (64,) if budget == "quick" else (64, 512):
        draw = torch.Generator().manual_seed(0)
        at = torch.randint(RANGE, (4 * width,), generator=draw)
        tables = {k: sinusoidal.sinusoidal_positions(at + k, width, dtype=torch.float64) for k in (0, *OFFSETS)}
        far = {k: sinusoidal.sinusoidal_positions(at + k + FAR, width, dtype=torch.float64) for k in (0, *OFFSETS)}
        random = {k: torch.randn(len(at), width, dtype=torch.float64, generator=draw) for k in (0, *OFFSETS)}
        first = sinusoidal.sinusoidal_positions(torch.arange(200), width, dtype=torch.float64)
        products = (first[:100] * first[100:]).sum(1)
        findings += [
            at_most(f"width {width}: one linear map an offset, largest error elsewhere", _worst(tables), 1e-6),
            at_most(f"width {width}: the same map ten million positions further", _worst(tables, far), 1e-6),
            at_least(f"width {width}: a random table, largest error of its best map", _worst(random), 0.1),
            at_most(f"width {width}: inner products at distance 100, spread", float(products.std()), 1e-10),
            at_most(f"width {width}: difference from the formula written out", _formula(first, width), 1e-12),
            *_wavelengths(first[1], width),
        ]
    setting = {"dtype": "fp64", "offsets": list(OFFSETS), "positions": f"drawn below {RANGE:,}"}
    notes = [
        "The map turns each pair of features by k θ_i, so it is also orthogonal; here it is found by least squares."
    ]
    return Measurement(findings, peers={"the formula, written out in Python": ""}, setting=setting, notes=notes)


def _worst(tables: Mapping[int, Tensor], others: Mapping[int, Tensor] | None = None) -> float:
    """Over the offsets: the map that fits the first half of the rows best, its largest error on the others."""
    import torch

    half, worst = len(tables[0]) // 2, 0.0
    tried = {k: table[half:] for k, table in tables.items()} if others is None else others
    for offset in OFFSETS:
        best = torch.linalg.lstsq(tables[0][:half], tables[offset][:half]).solution
        worst = max(worst, float((tried[0] @ best - tried[offset]).abs().max()))
    return worst


def _formula(table: Tensor, width: int) -> float:
    """Largest difference from sin and cos of pos / 10000^(2i / d)."""
    worst = 0.0
    for m, row in enumerate(table.tolist()):
        for i in range(width // 2):
            angle = m / 10000 ** (2 * i / width)
            worst = max(worst, abs(row[2 * i] - math.sin(angle)), abs(row[2 * i + 1] - math.cos(angle)))
    return worst


def _wavelengths(row: Tensor, width: int) -> list[Finding]:
    """From the vector of position 1, whose pairs are turned by θ_i: 2π / θ_i."""
    import torch

    waves = 2 * math.pi / torch.atan2(row[::2], row[1::2])
    ratios = waves[1:] / waves[:-1]
    last = float(waves[-1]) / (2 * math.pi * 10000 ** ((width - 2) / width))
    return [
        at_most(f"width {width}: shortest wavelength, beside 2π", abs(float(waves[0]) / (2 * math.pi) - 1), 1e-12),
        at_most(f"width {width}: longest, beside 10000^((d - 2) / d) 2π", abs(last - 1), 1e-9),
        at_most(
            f"width {width}: ratios of neighbours, largest over least", float(ratios.max() / ratios.min()), 1 + 1e-9
        ),
        Finding(f"width {width}: longest wavelength", float(waves[-1]), "positions"),
    ]
