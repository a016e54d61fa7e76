"""One sample for each Module with a function twin: a module with weights that matter, inputs, and the function's call.

A row is `public name -> build(dtype) -> Sample`. Random numbers come from torch's seeded default generator. Choose
weights that are not at their initial zeros, more than one batch row, and sizes that differ from each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import volvelle.functional as functional
import volvelle.nn as parts


class Sample(NamedTuple):
    """`module(*inputs)` must equal `function()` bit for bit."""

    module: nn.Module
    inputs: tuple[Any, ...]
    function: Callable[[], Any]


def lora_linear(dtype: torch.dtype) -> Sample:
    layer = parts.LoRALinear(nn.Linear(5, 7, dtype=dtype), rank=3, alpha=6.0)
    nn.init.normal_(layer.b)
    x = torch.randn(2, 4, 5, dtype=dtype)
    return Sample(layer, (x,), lambda: functional.lora_linear(x, layer.weight, layer.bias, layer.a, layer.b, 2.0))


def rotary_embedding(dtype: torch.dtype) -> Sample:
    q, k = torch.randn(2, 6, 5, 16, dtype=dtype), torch.randn(2, 2, 5, 16, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 3, 9, 100]])
    layer = parts.RotaryEmbedding(16, base=500.0, layout="interleaved")
    options = {"base": 500.0, "layout": "interleaved"}
    return Sample(layer, (q, k, positions), lambda: functional.apply_rope(q, k, positions, **options))


def attention(dtype: torch.dtype) -> Sample:
    q = torch.randn(2, 6, 5, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 7, 8, dtype=dtype)
    layer = parts.Attention(causal=True, scale=0.3)
    return Sample(layer, (q, k, v), lambda: functional.attention(q, k, v, causal=True, scale=0.3))


def sinusoidal_positions(dtype: torch.dtype) -> Sample:
    positions = torch.tensor([[0, 1, 2], [9, 4, 1000]])
    layer = parts.SinusoidalPositions(6, base=50.0, layout="half")
    options = {"base": 50.0, "layout": "half", "dtype": dtype}
    return Sample(layer, (positions, dtype), lambda: functional.sinusoidal_positions(positions, 6, **options))


def learned_positions(dtype: torch.dtype) -> Sample:
    positions = torch.tensor([[0, 1, 2], [6, 3, 3]])
    layer = parts.LearnedPositions(7, 5).to(dtype)
    return Sample(layer, (positions,), lambda: functional.learned_positions(positions, layer.weight))


SAMPLES: dict[str, Callable[[torch.dtype], Sample]] = {
    "nn.Attention": attention,
    "nn.LearnedPositions": learned_positions,
    "nn.LoRALinear": lora_linear,
    "nn.RotaryEmbedding": rotary_embedding,
    "nn.SinusoidalPositions": sinusoidal_positions,
}
