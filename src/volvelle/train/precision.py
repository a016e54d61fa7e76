"""In which number format the forward pass runs."""

from __future__ import annotations

from typing import Literal

import torch


class Precision:
    """fp32 as it is, or bf16 under autocast with weights, gradients and optimiser in fp32.

    bf16 has fp32's exponent range, so its gradients do not underflow and need no loss scaling.
    """

    def __init__(self, kind: Literal["fp32", "bf16"], device: torch.device):
        self.kind, self.device = kind, device

    def autocast(self) -> torch.autocast:
        """The context for one forward pass and its loss."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.kind == "bf16")
