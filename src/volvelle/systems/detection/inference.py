"""Detectors in use alone: norms folded, channels last."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.systems.backbone.folding import fold
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.targets import Detections


class _Features(nn.Module):
    """What of a backbone can be traced: its maps; it has no classifier any more."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of x."""
        return self.backbone.features(x)


def ready(model: Detector, dtype: torch.dtype = torch.float32) -> Detector:
    """Make a detector fast at looking, in place: norms folded into convolutions, channels last, weights in `dtype`.

    It cannot be trained or written afterwards. Returns the model, in evaluation mode.
    """
    model.eval()
    # Norms stand in the backbone, in chains of layers, and in the attention; what is between cannot be traced.
    chains = [module for module in (*model.neck.children(), model.proposer.body) if isinstance(module, nn.Sequential)]
    for part in (_Features(model.backbone).eval(), *chains, model.proposer.attention):
        fold(part)
    return model.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def detect(model: Detector, pixels: Tensor, sizes: Tensor | None = None) -> Detections:
    """Detections in pictures uint8 (b, 3, y, x) of valid sizes (b, 2), all of it when left out, from bytes to boxes."""
    weight = next(model.parameters())
    x = model.preprocessing.normalise(pixels.to(weight.device)).to(weight.dtype)
    return model(x.contiguous(memory_format=torch.channels_last), sizes)
