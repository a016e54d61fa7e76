"""How exact rotary angles are, by position and number format: the table of this library, its rivals, and a peer's."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLAIM = Claim(
    title="Rotary angles keep their precision at any position",
    family="attention",
    paper=Paper(
        "Su et al.",
        2021,
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        "section 3.2.2, equation 15",
        "https://arxiv.org/abs/2104.09864",
    ),
    sentence="Θ = {θ_i = 10000^(-2(i-1)/d), i in [1, 2, ..., d/2]}, and f(x_m, m) turns by the angles mθ_i",
    measured_by="the largest |cos| error of a table against fp64, at positions up to a million: angles in fp64 cast "
    "last (nn.RotaryEmbedding), angles in fp32, frequencies in bf16, and transformers' module after .to(bfloat16)",
    summary="Where a rotary table is rounded decides whether long contexts see positions or noise.",
    summary_zh="旋转位置表在何处舍入，决定了长上下文看到的是位置还是噪声。",
    seconds={"quick": 15, "full": 15},
    parts=("nn.RotaryEmbedding", "functional.rope_frequencies"),
)

DIM, BASE = 128, 10000.0
PLACES = (2_000, 100_000, 1_000_000)
REACH = 64
"""Positions looked at before each of the places."""


def measure(budget: Budget) -> Measurement:
    """Tables of 64 positions at each place."""
    import torch

    findings: list[Finding] = []
    for place in PLACES:
        positions = torch.arange(place - REACH, place)
        exact = _exact(positions)
        for dtype, bound in ((torch.float32, 1e-7), (torch.bfloat16, 2.0**-8)):
            error = float((ours(positions, dtype).double() - exact).abs().max())
            name = str(dtype).removeprefix("torch.")
            findings.append(at_most(f"ours in {name}, before position {place:,}", error, bound))
        for what, table in (("angles in fp32", _in_fp32), ("frequencies in bf16", _stored_in_bf16)):
            error = float((table(positions).double() - exact).abs().max())
            findings.append(Finding(f"{what}, before position {place:,}", error))
    peers, notes = {"torch": str(torch.__version__)}, []
    found = _transformers(PLACES[0])
    if found is None:
        notes.append("transformers is not installed (pip install volvelle[peers]): its module was not measured")
    else:
        peers["transformers"] = importlib.metadata.version("transformers")
        findings.append(at_least(f"transformers after .to(bfloat16), before {PLACES[0]:,} (a lost table)", found, 0.5))
    return Measurement(findings, peers=peers, setting={"d": DIM, "base": BASE, "positions": PLACES}, notes=notes)


def _frequencies() -> Tensor:
    from volvelle.parts.position.rope import rope_frequencies

    return rope_frequencies(DIM, base=BASE)


def _exact(positions: Tensor) -> Tensor:
    return (positions.double()[:, None] * _frequencies()).cos()


def ours(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The cosines that nn.RotaryEmbedding turns by after .to(dtype)."""
    from volvelle.parts.position.rope import RotaryEmbedding

    rotation = RotaryEmbedding(DIM, base=BASE).to(dtype).rotation(positions, dtype)
    return rotation.cos.reshape(len(positions), -1)[:, : DIM // 2]


def _in_fp32(positions: Tensor) -> Tensor:
    return (positions.float()[:, None] * _frequencies().float()).cos()


def _stored_in_bf16(positions: Tensor) -> Tensor:
    return (positions.float()[:, None] * _frequencies().bfloat16().float()).cos()


def _transformers(place: int) -> float | None:
    """The error of Llama's rotary module once the model is cast, None without transformers."""
    import torch

    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    except ImportError:
        return None
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=1, head_dim=DIM, max_position_embeddings=place)
    module = LlamaRotaryEmbedding(config).to(torch.bfloat16)
    positions = torch.arange(place - REACH, place)
    cos, _ = module(torch.zeros(1, 1, DIM, dtype=torch.bfloat16), positions[None])
    return float((cos[0, :, : DIM // 2].double() - _exact(positions)).abs().max())
