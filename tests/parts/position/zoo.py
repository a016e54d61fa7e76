"""Every position encoding, ready to run in fp64, and one attention layer that uses all three hooks of the protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from volvelle.parts.attention.attention import attention
from volvelle.parts.position.alibi import ALiBi
from volvelle.parts.position.complex_order import ComplexPositions
from volvelle.parts.position.convolutional import ConvPositions
from volvelle.parts.position.deberta import DisentangledBias
from volvelle.parts.position.dynamic import DynamicBias
from volvelle.parts.position.encoding import PositionEncoding
from volvelle.parts.position.hierarchical import HierarchicalPositions
from volvelle.parts.position.learned import LearnedPositions
from volvelle.parts.position.multiplicative import MultiplicativePositions
from volvelle.parts.position.recurrent import RecurrentPositions
from volvelle.parts.position.rope import RotaryEmbedding
from volvelle.parts.position.shaw import ShawBias
from volvelle.parts.position.sinusoidal import SinusoidalPositions
from volvelle.parts.position.t5 import T5Bias
from volvelle.parts.position.transformer_xl import TransformerXLBias

HEADS, KV_HEADS, D, VOCABULARY = 4, 2, 6, 10
WIDTH = HEADS * D


def deberta(k: int, max_position: int | None = None, p2c: str = "released") -> DisentangledBias:
    key, query = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH)
    module = DisentangledBias(HEADS, key, query, k=k, max_position=max_position, p2c=p2c)  # type: ignore[arg-type]
    nn.init.normal_(module.table)
    return module


def transformer_xl() -> TransformerXLBias:
    module = TransformerXLBias(HEADS, D, width=8)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def t5(bidirectional: bool) -> T5Bias:
    module = T5Bias(HEADS, buckets=8, max_distance=12, bidirectional=bidirectional)
    nn.init.normal_(module.weight)
    return module


class Entry(NamedTuple):
    build: Callable[[], PositionEncoding]
    relative: bool
    """Attention does not change when all positions are shifted by the same number."""
    reach: int | None = None
    """The first position that raises, None: any position is served."""


ZOO: dict[str, Entry] = {
    "none": Entry(PositionEncoding, True),
    "sinusoidal": Entry(lambda: SinusoidalPositions(WIDTH), False),
    "learned": Entry(lambda: LearnedPositions(64, WIDTH), False, 64),
    "hierarchical": Entry(lambda: HierarchicalPositions(9, WIDTH), False, 81),
    "recurrent": Entry(lambda: RecurrentPositions(WIDTH, hidden=5), False),
    "multiplicative": Entry(lambda: MultiplicativePositions(64, WIDTH), False, 64),
    "complex": Entry(lambda: ComplexPositions(WIDTH, vocabulary=VOCABULARY), False),
    "cnn": Entry(lambda: ConvPositions(WIDTH, width=9, layers=3), False),
    "shaw": Entry(lambda: ShawBias(D, k=3, value_width=D), True),
    "shaw keys": Entry(lambda: ShawBias(D, k=4, right=1), True),
    "transformer-xl": Entry(transformer_xl, True),
    "t5": Entry(lambda: t5(True), True),
    "t5 causal": Entry(lambda: t5(False), True),
    "deberta v1": Entry(lambda: deberta(5), True),
    "deberta v2": Entry(lambda: deberta(6, 20), True),
    "deberta paper": Entry(lambda: deberta(5, p2c="paper"), True),
    "dynamic": Entry(lambda: DynamicBias(HEADS, width=5, log_distance=True), True),
    "alibi": Entry(lambda: ALiBi(HEADS), True),
    "alibi both sides": Entry(lambda: ALiBi(HEADS, right_slopes=(0.1, 0.2, 0.3, 0.4), learnable=True), True),
    "rope": Entry(lambda: RotaryEmbedding(D, base=100.0), True),
}


class Layer(nn.Module):
    """One attention layer in fp64 over ids (b, n), with grouped keys; positions and mask are given for every token."""

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.position = ZOO[name].build()
        for parameter in self.position.parameters():
            if parameter.dim() and not isinstance(self.position, ALiBi | ComplexPositions):
                nn.init.normal_(parameter, std=0.5)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * D)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * D)
        self.double()

    def heads(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.position.embed(self.tokens(ids), positions, ids)
        q = self.q(x).unflatten(-1, (HEADS, D)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * KV_HEADS, D)).transpose(1, 2).chunk(2, dim=1)
        return (*self.position.rotate(q, k, positions), v)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None = None, last: int = 0, backend: str = "reference"
    ) -> Tensor:
        """Return (b, h, n, d), for the `last` queries only when given, as a step with a cache does."""
        q, k, v = self.heads(ids, positions)
        q_positions, q = positions[..., -last:], q[:, :, -last:]
        mask = None if mask is None else mask[..., -last:, :]
        return attention(
            q,
            k,
            v,
            mask=mask,
            bias=self.position.bias(),
            q_positions=q_positions,
            k_positions=positions,
            backend=backend,
        )


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()
