"""FP32 master weights: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1.

A model whose weights are stored in fp16 (or bf16) cannot take small steps: with 10 fraction bits, w + u rounds to w
when |u| < |w| / 2048, and an update below 2^-24 is zero altogether. So a copy of the weights in fp32 takes the steps,
and the forward and backward passes see it rounded:

    g = fp32(dL/dw16) / s        w32 ← step(w32, g)        w16 ← round(w32)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.export import export

SMALL = frozenset({torch.float16, torch.bfloat16})
"""The dtypes that need a master copy."""


@export("functional.master_weight_update")
@torch.no_grad()
def master_weight_update(
    weights: Sequence[Tensor], masters: Sequence[Tensor], step: Callable[[], Any], *, scale: float | Tensor = 1.0
) -> None:
    """One update through fp32 copies: masters.grad = fp32(weights.grad) / scale; step(); weights = round(masters).

    `weights` are fp16 or bf16 leaves with their gradients, `masters` fp32 leaves of the same shapes in the same order;
    `step` is a closure over the masters (clip, then an optimiser's step). The weights' gradients are left. A weight
    without gradient gives its master none. Raises ValueError when the two do not fit. Micikevicius et al. 2018, 3.1.

    >>> w = torch.tensor([1.0], dtype=torch.float16).requires_grad_()
    >>> master = w.detach().float().requires_grad_()
    >>> sgd = torch.optim.SGD([master], lr=2.0**-12)
    >>> for _ in range(4):  # each step is too small for fp16, which has no number between 1 and 1 - 2^-11
    ...     w.grad = torch.ones_like(w)
    ...     master_weight_update([w], [master], sgd.step)
    >>> w.item(), master.item()
    (0.9990234375, 0.9990234375)
    """
    collect_gradients(weights, masters)
    if not isinstance(scale, float) or scale != 1.0:
        for master in masters:
            if master.grad is not None:
                master.grad.div_(scale)
    step()
    publish_weights(masters, weights)


def collect_gradients(weights: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    """masters.grad = fp32(weights.grad); where both are one tensor nothing happens."""
    _check(weights, masters)
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight:
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)


@torch.no_grad()
def publish_weights(masters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Weights = round(masters), to nearest even; where both are one tensor nothing happens."""
    _check(weights, masters)
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight:
            weight.copy_(master)


def _check(weights: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    ours, theirs = [tuple(w.shape) for w in weights], [tuple(m.shape) for m in masters]
    if ours != theirs:
        raise ValueError(f"master weights: shapes must agree, got weights {ours} and masters {theirs}")


@export("nn.MasterWeights")
class MasterWeights(nn.Module):
    """fp32 copies of a model's fp16 and bf16 weights, for an optimiser to work on.

    `masters` has an entry a weight: an fp32 copy where the weight has 16 bits, the weight itself where it has more, so
    a model of mixed dtypes needs no care. Only the copies are in the state dict. One update is
    `functional.master_weight_update(self.weights, self.masters, step)`, or its pieces: `collect`, the step, `publish`.

    >>> layer = nn.Linear(2, 1).half()
    >>> held = MasterWeights(layer.parameters())
    >>> [m.dtype for m in held.masters], list(held.state_dict())
    ([torch.float32, torch.float32], ['copies.0', 'copies.1'])
    """

    def __init__(self, weights: Iterable[nn.Parameter]):
        super().__init__()
        # A tuple: the weights belong to the model and must not appear in this module's state dict.
        self.weights = tuple(weights)
        self.copies = nn.ParameterList(
            nn.Parameter(w.detach().float(), requires_grad=w.requires_grad) for w in self.weights if w.dtype in SMALL
        )
        copies = iter(self.copies)
        self.masters: tuple[nn.Parameter, ...] = tuple(next(copies) if w.dtype in SMALL else w for w in self.weights)

    def collect(self) -> None:
        """Hand the weights' gradients over, in fp32."""
        collect_gradients(self.weights, self.masters)

    def publish(self) -> None:
        """Round the masters into the weights."""
        publish_weights(self.masters, self.weights)

    @torch.no_grad()
    def adopt(self) -> None:
        """Where a weight was changed from outside (clamped, loaded), its master takes the new value.

        Elsewhere the master keeps the bits that the rounded weight has not.
        """
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                changed = master.to(weight.dtype) != weight
                master.copy_(torch.where(changed, weight.to(master.dtype), master))
