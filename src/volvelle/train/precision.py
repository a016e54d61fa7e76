"""In which number format the forward pass runs, and what keeps small gradients alive in it."""

from __future__ import annotations

from typing import Literal

import torch

from volvelle.parts.precision.loss_scale import LossScaler

Kind = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """fp32 as it is, or bf16 or fp16 under autocast with weights, gradients and optimiser in fp32.

    bf16 has fp32's exponent range, so its gradients do not underflow and need no loss scaling; fp16's do.
    """

    def __init__(self, kind: Kind, device: torch.device):
        self.kind, self.device, self.dtype = kind, device, _DTYPES[kind]

    def autocast(self) -> torch.autocast:
        """The context for one forward pass and its loss."""
        enabled = self.kind != "fp32"
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)

    def scaler(self) -> LossScaler | None:
        """A fresh loss scaler where the format needs one. Every player has its own: their gradients differ in size."""
        return LossScaler().to(self.device) if self.kind == "fp16" else None
