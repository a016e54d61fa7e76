"""How much memory a training step of a decoder will take, from its configuration: a sum, not a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.systems.language.config import GatedMLP, LanguageConfig


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part; `total` is their sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "activations": self.activations,
        }
        # Shown from 10 MB up; an adapter's gradients are not worth a number.
        named = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value >= 10**7)
        return f"about {_size(self.total)}" + (f" ({named})" if named else "")


def estimate_memory(
    config: LanguageConfig,
    *,
    total: int,
    trainable: int,
    weight_bytes: int,
    tokens: int,
    activation_bytes: int = 4,
    checkpointing: bool = False,
) -> MemoryEstimate:
    """Weights, gradients and Adam's two moments (fp32), and what a block keeps for the backward pass a token.

    A block keeps about its input, its two norms, q, k, v before and after rotation, the attention output, and the
    MLP's inner features: (8 d + 4 d_kv + c w) numbers a token, with c = 4 for a gated MLP and 2 for a plain one. With
    checkpointing only each block's input stays, and one block is computed again at a time. `tokens` are those of one
    micro-batch, padding included; attention is taken not to keep its n x n scores.
    """
    kv = config.kv_heads * config.head_width
    inner = (4 if isinstance(config.mlp, GatedMLP) else 2) * config.mlp.width
    block = 8 * config.width + 4 * kv + inner
    kept = config.depth * config.width + block if checkpointing else config.depth * block
    return MemoryEstimate(
        weights=total * weight_bytes + trainable * (4 - weight_bytes),
        gradients=4 * trainable,
        optimizer=8 * trainable,
        activations=tokens * kept * activation_bytes,
    )


def _size(value: int) -> str:
    return f"{value / 10**9:.1f} GB" if value >= 10**9 else f"{value / 10**6:.0f} MB"
