"""Dynamic loss scaling: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.

Half of a network's gradients may lie below 2^-24, fp16's smallest number, and become zero, while the upper half of
fp16's range stays empty. The loss is therefore multiplied by s before the backward pass, which multiplies every
gradient by s (the chain rule is linear); the weight gradients are divided by s again, in fp32, before they are clipped
and used. s is found by trying: it shrinks when a gradient overflows, and that update is left out; it grows after
`growth_interval` updates without overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from volvelle.export import export


class LossScale(NamedTuple):
    """The state of dynamic loss scaling: two scalars on the gradients' device."""

    scale: Tensor
    """s, fp32."""
    clean: Tensor
    """Updates without overflow since s last changed, int32."""


@export("functional.update_loss_scale")
def update_loss_scale(
    state: LossScale,
    found_inf: Tensor | bool,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> LossScale:
    """The scale after an update: s · backoff on overflow, s · growth after `growth_interval` clean updates, else s.

    `found_inf` says whether a gradient was infinite or NaN. A growth that would make s infinite leaves it. Nothing
    waits for the device: the new state is computed where the old one lies. Micikevicius et al. 2018, section 3.2, with
    the arithmetic of torch.amp.GradScaler, bit for bit.

    >>> state = LossScale(torch.tensor(8.0), torch.tensor(0, dtype=torch.int32))
    >>> [float((state := update_loss_scale(state, bad, growth_interval=2)).scale) for bad in (True, False, False)]
    [4.0, 4.0, 8.0]
    """
    scale, clean = state
    found = torch.as_tensor(found_inf, device=scale.device).bool()
    counted = clean + 1
    # In fp64, rounded once: a factor such as 1/3 is not an fp32 number.
    wide = scale.double()
    grown = (wide * growth_factor).to(scale.dtype)
    due = counted == growth_interval
    kept = torch.where(due & grown.isfinite(), grown, scale)
    return LossScale(
        torch.where(found, (wide * backoff_factor).to(scale.dtype), kept),
        torch.where(found | due, torch.zeros_like(clean), counted),
    )


@export("functional.unscale_gradients")
@torch.no_grad()
def unscale_gradients(gradients: Iterable[Tensor], scale: Tensor) -> Tensor:
    """Divide gradients by the scale in place, g ← g / s, and return whether one of them held an infinity or a NaN.

    The result is a boolean scalar on the scale's device; no value is read on the host. Gradients must be dense, and
    fp32 or fp64: in fp16 the division would bring back the underflow that the scale avoided, so fp16 raises ValueError
    (collect such gradients in fp32 master weights first). Micikevicius et al. 2018, section 3.2.

    >>> g = torch.tensor([1024.0, 2048.0])
    >>> bool(unscale_gradients([g], torch.tensor(1024.0))), g
    (False, tensor([1., 2.]))
    """
    found = list(gradients)
    for g in found:
        if g.dtype not in {torch.float32, torch.float64} or g.layout != torch.strided:
            raise ValueError(f"unscale_gradients: gradients must be dense, in fp32 or fp64, got {g.dtype}, {g.layout}")
    if not found:
        return torch.zeros((), dtype=torch.bool, device=scale.device)
    # The largest magnitude is finite exactly when every entry is: NaN and infinity both survive the maximum.
    largest = torch.nn.utils.get_total_norm(found, math.inf)
    # As 1 / s in fp64, rounded once: for powers of two exact, and otherwise what GradScaler multiplies by.
    inverse = scale.double().reciprocal().float()
    for g in found:
        g.mul_(inverse.to(g.device))
    return largest.to(scale.device).isfinite().logical_not()


@export("nn.LossScaler")
class LossScaler(nn.Module):
    """Dynamic loss scaling with its state in buffers, so that it moves, saves and loads like any Module.

    One update: `scaler(loss).backward()`; then `found = scaler.unscale(gradients)` for each optimiser, which steps only
    when nothing was found; then `scaler.update(found)` once, with the `|` of what was found. Optimisers that do not
    share a loss are better off with a scaler each: then one overflow holds up only its own player.

    The defaults are those of torch.amp.GradScaler. Raises ValueError for factors that do not shrink and grow.

    >>> scaler = LossScaler(initial=4.0, growth_interval=1)
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> scaler((3 * w).sum()).backward()
    >>> scaler.update(scaler.unscale([w.grad])), w.grad
    (None, tensor([3.]))
    >>> float(scaler.scale)
    8.0
    """

    scale: Tensor
    clean: Tensor

    def __init__(
        self,
        *,
        initial: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ):
        super().__init__()
        if not (initial > 0 and growth_factor > 1 > backoff_factor > 0 and growth_interval >= 1):
            raise ValueError(
                "LossScaler: needs initial > 0, growth_factor > 1 > backoff_factor > 0 and growth_interval >= 1, got "
                f"{initial}, {growth_factor}, {backoff_factor} and {growth_interval}"
            )
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.register_buffer("scale", torch.tensor(float(initial)))
        self.register_buffer("clean", torch.tensor(0, dtype=torch.int32))

    def forward(self, loss: Tensor) -> Tensor:
        """The loss times s, in the loss's dtype (fp32: a scaled fp16 loss would overflow)."""
        if loss.dtype == torch.float16:
            loss = loss.float()
        return loss * self.scale.to(loss.device)

    def unscale(self, gradients: Iterable[Tensor]) -> Tensor:
        """Divide the gradients by s in place; whether one overflowed. See `unscale_gradients`."""
        return unscale_gradients(gradients, self.scale)

    def update(self, found_inf: Tensor | bool) -> None:
        """Shrink s when something was found, or count a clean update. See `update_loss_scale`."""
        state = update_loss_scale(
            LossScale(self.scale, self.clean),
            found_inf,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            growth_interval=self.growth_interval,
        )
        self.scale.copy_(state.scale)
        self.clean.copy_(state.clean)

    def extra_repr(self) -> str:
        """The numbers shown by print."""
        return f"scale={float(self.scale):g}, clean={int(self.clean)} of {self.growth_interval}"
