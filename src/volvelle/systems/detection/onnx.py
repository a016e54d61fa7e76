"""A detector as one ONNX file of standard operators, from bytes to boxes, suppression included.

detector.onnx: `pixels` (b, 3, y, x) uint8, RGB, of one size; `sizes` (b, 2) int64, how much of each is a picture, y and
x -> `boxes` (b, n, 4) fp32, x1 y1 x2 y2 in those pixels, `scores` (b, n), `labels` (b, n) int64, `mask` (b, n) bool.

Rows are padded to the most that can be found, best first; those beside the mask are zeros. A picture that does not fill
`pixels` lies in the upper left corner; what is beside it is looked at by convolutions alone, and was grey in training.
b, y and x are fixed. The file's metadata say `classes` (a JSON list of names), `size` and `stretch`, how pictures are
brought to that size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from volvelle.systems.detection.model import Detector
from volvelle.systems.modes import evaluating
from volvelle.systems.onnx_files import check_exports, write_onnx

FILE = "detector.onnx"
INPUTS, OUTPUTS = ("pixels", "sizes"), ("boxes", "scores", "labels", "mask")


class FromBytes(nn.Module):
    """A detector from bytes on: what detector.onnx holds."""

    def __init__(self, model: Detector):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, scores, labels and mask."""
        return tuple(self.model(self.model.preprocessing.normalise(pixels), sizes))


def export_onnx(
    model: Detector, folder: str | os.PathLike[str], *, image: tuple[int, int] | None = None, batch: int = 1
) -> Path:
    """Write detector.onnx into a folder, for `batch` images of (height, width) pixels, and return its path.

    Without `image` they are squares of the configuration's size. The model is left as it was; weights are written in
    fp32. Raises VolvelleError where onnx or onnxscript is missing.
    """
    check_exports(model)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    height, width = image or (model.config.size, model.config.size)
    device = next(model.parameters()).device
    pixels = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=device)
    sizes = torch.tensor([[height, width]] * batch, device=device)
    config = model.config
    facts = {"classes": json.dumps(model.classes), "size": str(config.size), "stretch": str(config.stretch).lower()}
    whole = FromBytes(model)
    with torch.no_grad(), evaluating(whole):
        return write_onnx(whole, (pixels, sizes), target / FILE, names=(INPUTS, OUTPUTS), facts=facts)
