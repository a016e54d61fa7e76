"""Weight-decomposed low-rank adaptation: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", section 4.

W' = m · V / ‖V‖ with V = W + scale · B A: direction and magnitude of each output's weights are learnt apart. m starts
as ‖W‖, so at step 0 the layer is the pretrained one, bit for bit. The norm ‖V‖ is a constant when gradients are taken
(section 4.3), as in PEFT.

With f = m / ‖V‖ (d) the layer is W' x + bias = y + (f - 1) · V x, where y = V x + bias is LoRA's result: what differs
from 1 is multiplied on its own, which keeps its digits in bf16.

Shapes: x (..., k), weight W (d, k), bias (d), a = A (r, k), b = B (d, r), magnitude m (d), result (..., d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.lowrank.kinds import LINEAR
from volvelle.parts.lowrank.lora import Folded, LoRAUpdate, LowRank, check_factors, widened_matrix


@export("functional.dora_linear")
def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    norm: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer with DoRA: x (m · V / ‖V‖)ᵀ + bias with V = W + scale · B A, ‖·‖ over each output's weights.

    x (..., k); weight (d, k); bias (d) or None; a (r, k); b (d, r); magnitude (d). No gradient flows through the norm;
    `norm` (d) replaces it where it is known. `dropout` drops inputs of all that differs from the frozen layer, which
    takes a second product with W (as in the authors' code and in PEFT). Raises ValueError when the shapes do not fit.
    Liu et al. 2024, equations 5 and 6.

    >>> x, weight = torch.eye(2), torch.tensor([[3.0, 4.0]])
    >>> a, b = torch.zeros(1, 2), torch.zeros(1, 1)
    >>> dora_linear(x, weight, None, a, b, torch.tensor([10.0]), 1.0).T
    tensor([[6., 8.]])
    """
    check_factors("dora_linear", weight, a, b)
    if magnitude.shape != weight.shape[:1]:
        raise ValueError(f"dora_linear: magnitude must be ({weight.shape[0]},), got {tuple(magnitude.shape)}")
    if norm is None:
        norm = column_norm(weight, scale * (b.detach() @ a.detach()))
    low_input = F.dropout(x, dropout) if dropout else x
    frozen = F.linear(x, weight, bias)
    y = LINEAR.add(None, frozen, low_input, a, b, scale)
    v = y if bias is None else y - bias
    if dropout:
        v = LINEAR.add(None, F.linear(low_input, weight), low_input, a, b, scale)
    return torch.addcmul(y, (magnitude / norm - 1).to(y.dtype), v)


@torch.no_grad()
def column_norm(matrix: Tensor, delta: Tensor | None = None) -> Tensor:
    """‖W + Δ‖ of each output's weights, (d, k) -> (d), in fp32 at least.

    The paper stores Wᵀ and speaks of columns.
    """
    total = matrix if delta is None else matrix + delta
    norm = torch.linalg.vector_norm(total.to(torch.promote_types(total.dtype, torch.float32)), dim=1)
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)  # an output without weights has magnitude 0, and stays


class DoRAUpdate(LoRAUpdate):
    """DoRA as a change of a layer's result, for every kind of layer; `magnitude` (d) is trained beside a and b."""

    magnitude: nn.Parameter

    def begin(self, layer: Any) -> None:
        """The magnitudes start as ‖W‖."""
        self.magnitude = nn.Parameter(self.norm(layer))

    def norm(self, layer: Any) -> Tensor:
        """‖W + scale · B A‖ (d), without gradient."""
        return column_norm(widened_matrix(self, layer), self.delta(layer)).to(self.a.dtype)

    def update(self, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """The result (b, …) of `layer` on x, with the update."""
        kind, low_input = self.kind, self.dropped(x)
        y = kind.add(layer, result, low_input, self.a, self.b, self.scale)
        v = self._unbiased(layer, y)
        if self.drops(x):
            v = kind.add(layer, kind.plain(layer, low_input), low_input, self.a, self.b, self.scale)
        return torch.addcmul(y, kind.channels(self.change(layer)).to(y.dtype), v)

    def change(self, layer: Any) -> Tensor:
        """The factor on each output beyond 1: m / ‖V‖ - 1 (d)."""
        return self.magnitude / self.norm(layer) - 1

    @staticmethod
    def mixed(layer: Any, x: Tensor, result: Tensor, rows: Sequence[LowRank | None]) -> Tensor | None:
        """The same where every row has its own update or none; None where that is not one computation."""
        updates: list[Any] = [row for row in dict.fromkeys(rows) if row is not None]
        if any(each.drops(x) for each in updates):
            return None
        y = LoRAUpdate.mixed(layer, x, result, rows)  # type: ignore[arg-type]
        if y is None:
            return None
        factors = {id(each): each.change(layer) for each in updates}
        none = torch.zeros_like(next(iter(factors.values())))
        factor = torch.stack([factors.get(id(row), none) for row in rows]).to(y.dtype)  # (b, d)
        factor = factor.view(len(rows), *[1] * (y.dim() - 2), -1)
        return torch.addcmul(y, factor, updates[0]._unbiased(layer, y))

    @torch.no_grad()
    def merged(self, layer: Any) -> Folded:
        """V = W + scale · B A times m / ‖V‖, computed in fp32 and rounded once to W's dtype."""
        factor = (self.magnitude / self.norm(layer))[:, None]
        total = factor * (widened_matrix(self, layer) + self.delta(layer))
        return Folded(self.kind.layout(total, layer.weight).to(layer.weight.dtype), factor)

    def _unbiased(self, layer: Any, y: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        return y if bias is None else y - self.kind.channels(bias)
