"""The parts of a fresh decoder that a recipe names with one word, as configurations."""

from __future__ import annotations

from typing import Literal

from volvelle.systems.language import config as c

PositionName = Literal[
    "rope", "rope-linear", "rope-ntk", "rope-dynamic", "rope-yarn", "rope-longrope", "rope-llama3", "rope-proportional",
    "none", "learned", "hierarchical", "sinusoidal", "recurrent", "multiplicative", "complex", "convolutional",
    "shaw", "transformer-xl", "t5", "deberta", "dynamic", "alibi",
]  # fmt: skip
AttentionName = Literal["softmax", "linear"]

POSITIONS: dict[PositionName, c.Position] = {
    "rope": c.Rope(),
    "rope-linear": c.Rope(scaling=c.LinearScaling(4.0)),
    "rope-ntk": c.Rope(scaling=c.NtkScaling(4.0)),
    "rope-dynamic": c.Rope(scaling=c.DynamicScaling(4.0)),
    "rope-yarn": c.Rope(scaling=c.YarnScaling(4.0)),
    "rope-longrope": c.Rope(scaling=c.LongRopeScaling(factor=4.0)),
    "rope-llama3": c.Rope(scaling=c.Llama3Scaling(4.0)),
    "rope-proportional": c.Rope(scaling=c.ProportionalScaling(0.5)),
    "none": c.NoPosition(), "learned": c.Learned(), "hierarchical": c.Hierarchical(), "sinusoidal": c.Sinusoidal(),
    "recurrent": c.Recurrent(), "multiplicative": c.Multiplicative(), "complex": c.Complex(),
    "convolutional": c.Convolutional(), "shaw": c.Shaw(), "transformer-xl": c.TransformerXL(), "t5": c.T5(),
    "deberta": c.DeBERTa(), "dynamic": c.Dynamic(), "alibi": c.ALiBi(),
}  # fmt: skip
"""Scalings of RoPE stretch four times; those that wait for long texts do so beyond the model's context."""

ATTENTIONS: dict[AttentionName, c.Attention] = {"softmax": c.SoftmaxAttention(), "linear": c.LinearAttention()}


def embedding_scale(position: c.Position, width: int) -> float:
    """What token embeddings are multiplied by: as much as makes them as large as position vectors of size 1."""
    return width**0.5 if isinstance(position, c.Sinusoidal | c.Recurrent | c.Convolutional) else 1.0
