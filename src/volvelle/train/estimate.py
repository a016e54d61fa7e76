"""How much memory a training step of a decoder will take, from its configuration: a sum, not a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.systems.language.config import GatedMLP, LanguageConfig
from volvelle.train.losses import CHUNK_BYTES


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
    average: bool = False,
) -> MemoryEstimate:
    """Weights, gradients and Adam's two moments (fp32), and what a block keeps for the backward pass a token.

    A block keeps about its input, its two norms, q, k, v, the attention output, and the MLP's inner features: where all
    weights are trained 8 d + 4 d_kv + 4 w numbers a token (w the MLP's width; half the last term without a gate), under
    a frozen base, whose linear layers need not remember their inputs, 6 d + 2 d_kv + 3 w. Measured peaks of a
    135M model lie within a tenth of this. With checkpointing only each block's input stays, and one block is computed
    again at a time. The loss adds two chunks of logits. `tokens` are those of one micro-batch, padding included;
    attention is taken not to keep its n x n scores. An `average` of the weights is counted with the optimiser.
    """
    kv, d, w = config.kv_heads * config.head_width, config.width, config.mlp.width
    inner = w if isinstance(config.mlp, GatedMLP) else w // 2
    frozen = trainable < total // 2
    block = 6 * d + 2 * kv + 3 * inner if frozen else 8 * d + 4 * kv + 4 * inner
    kept = config.depth * d + block if checkpointing else config.depth * block
    head = 2 * CHUNK_BYTES + (0 if frozen else 4 * config.vocabulary * d)
    return MemoryEstimate(
        weights=total * weight_bytes + trainable * (4 - weight_bytes),
        gradients=4 * trainable,
        optimizer=(12 if average else 8) * trainable,
        activations=tokens * kept * activation_bytes + head,
    )


def _size(value: int) -> str:
    return f"{value / 10**9:.1f} GB" if value >= 10**9 else f"{value / 10**6:.0f} MB"
