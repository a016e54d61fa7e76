"""A further signal for the image encoder where the data has classes: each cell of its finest map names its class.

    L = - Σ_cells Σ_c w_c s_c log p_c / Σ_cells Σ_c w_c s_c

s_c is the share of a cell's known pixels that are of class c, p the softmax of a 1 x 1 convolution over the map, and
w_c = 1 / log(1.1 + f_c) for a class that is the share f_c of the batch (`segment_objective.class_weights`). A click
teaches where a few objects end; this teaches every cell of a crop what it is, at the cost of one thin convolution. The
layer is not part of the model: it stays in the training's checkpoints.

Shapes: b crops of y x x pixels, c channels of the map, k classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.data.masks_labels import VOID
from volvelle.systems.segmentation.sam.config import SamConfig
from volvelle.systems.segmentation.sam.layers import Features
from volvelle.train.segment_objective import class_weights


class ClassHead(nn.Module):
    """Logits (b, k, ·, ·) of classes over the finest map that an image encoder makes."""

    def __init__(self, config: SamConfig, classes: int):
        super().__init__()
        channels = config.fine[-1][0] if config.fine else config.width
        self.layer = nn.Conv2d(channels, classes, 1)

    def forward(self, seen: Features) -> Tensor:
        """Return the logits."""
        return self.layer(seen.embedding if seen.cells is None else seen.cells)

    def loss(self, seen: Features, classes: Tensor) -> Tensor:
        """The loss of class numbers uint8 (b, y, x), VOID where nothing is known; 0 where nothing is anywhere."""
        logits = self(seen).float()
        shares = shares_of_cells(classes, logits.shape[1], classes.shape[-1] // logits.shape[-1])
        counts = shares.sum((0, 2, 3))
        frequency = (counts / counts.sum().clamp(min=1)).cpu().numpy()
        weights = class_weights(frequency, "log").to(logits.device)
        weighted = shares * weights[:, None, None]
        return -(weighted * logits.log_softmax(1)).sum() / weighted.sum().clamp(min=1)


def shares_of_cells(classes: Tensor, count: int, cell: int) -> Tensor:
    """Of each cell of `cell` x `cell` pixels the share of each class among what is known: (b, y, x) -> (b, k, ·, ·).

    A cell without known pixels has none.

    >>> shares_of_cells(torch.tensor([[[0, 1, 255, 255], [1, 255, 255, 255]]], dtype=torch.uint8), 2, 2).squeeze()
    tensor([[0.3333, 0.0000],
            [0.6667, 0.0000]])
    """
    b, high, wide = classes.shape
    rows, columns = high // cell, wide // cell
    parts = classes.long().view(b, rows, cell, columns, cell).transpose(2, 3).reshape(b, rows * columns, cell**2)
    held = parts.new_zeros(b, rows * columns, count + 1, dtype=torch.float32)
    known = parts != VOID
    held.scatter_add_(2, parts.where(known, torch.full_like(parts, count)), torch.ones_like(known, dtype=torch.float32))
    found = held[..., :count] / known.sum(2, keepdim=True).clamp(min=1)
    return found.mT.reshape(b, count, rows, columns)
