"""Probabilities for whole pictures: in one pass, over windows that slide, and over several scales and mirror images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.errors import UsageError
from volvelle.systems.backbone.folding import fold
from volvelle.systems.segmentation.model import Segmenter


@dataclass(frozen=True)
class Looks:
    """How often a picture is looked at: at each of `scales`, and in the mirror too with `mirror`; results are averaged.

    `window` (height, width) cuts larger pictures into windows that overlap by at least `overlap` of their size: what a
    network was trained on, or what fits into memory.
    """

    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False
    window: tuple[int, int] | None = None
    overlap: float = 1 / 3

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise UsageError(f"scales: must be above 0, and one at least, got {self.scales}")
        if not 0 <= self.overlap < 1:
            raise UsageError(f"overlap: must be in [0, 1), got {self.overlap}")
        if self.window is not None and min(self.window) < 1:
            raise UsageError(f"window: must be at least 1 pixel, got {self.window}")

    @property
    def count(self) -> int:
        """Passes over a picture."""
        return len(self.scales) * (2 if self.mirror else 1)


def ready(model: Segmenter, dtype: torch.dtype = torch.float32) -> Segmenter:
    """Make a segmenter fast at looking, in place: norms folded into convolutions, channels last, weights in `dtype`.

    It cannot be trained or written afterwards. Returns the model, in evaluation mode.
    """
    model.eval()
    fold(model)
    return model.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def probabilities(
    model: Segmenter,
    pixels: Tensor,
    looks: Looks | None = None,
    *,
    autocast: AbstractContextManager | None = None,
) -> Tensor:
    """Class probabilities (b, classes, y, x) fp32 of pictures uint8 (b, 3, y, x): the mean over all looks.

    The model should be in evaluation mode; `autocast` is entered around it.
    """
    looks = looks or Looks()
    weight = next(model.parameters())
    x = model.preprocessing.normalise(pixels).to(weight.device, weight.dtype)
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)
    total: Tensor | None = None
    size = x.shape[-2:]
    for scale in looks.scales:
        small = tuple(max(1, round(scale * side)) for side in size)
        # A picture that shrinks is averaged, as training's was.
        seen = (
            x
            if small == tuple(size)
            else F.interpolate(x, size=small, mode="bilinear", align_corners=False, antialias=scale < 1)
        )
        for mirrored in (False, True) if looks.mirror else (False,):
            view = seen.flip(-1) if mirrored else seen
            with autocast or nullcontext():
                logits = _slide(model, view, looks)
            logits = logits.flip(-1) if mirrored else logits
            resized = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
            found = resized.softmax(1)
            total = found if total is None else total.add_(found)
    assert total is not None
    return total / looks.count


def labels(model: Segmenter, pixels: Tensor, looks: Looks | None = None) -> Tensor:
    """The likeliest class (b, y, x) uint8 of every pixel of pictures uint8 (b, 3, y, x)."""
    return probabilities(model, pixels, looks).argmax(1).to(torch.uint8)


def _slide(model: Segmenter, x: Tensor, looks: Looks) -> Tensor:
    """Logits of x: in one pass, or the mean of those of overlapping windows."""
    if looks.window is None or (x.shape[-2] <= looks.window[0] and x.shape[-1] <= looks.window[1]):
        return model(x)
    height, width = (min(side, full) for side, full in zip(looks.window, x.shape[-2:], strict=True))
    total: Tensor | None = None
    seen = torch.zeros(x.shape[-2:], device=x.device)
    for top in starts(x.shape[-2], height, looks.overlap):
        for left in starts(x.shape[-1], width, looks.overlap):
            where = (slice(top, top + height), slice(left, left + width))
            found = model(x[:, :, where[0], where[1]]).float()
            placed = F.pad(found, (left, x.shape[-1] - left - width, top, x.shape[-2] - top - height))
            total = placed if total is None else total + placed
            seen[where] += 1
    assert total is not None
    return total / seen


def starts(size: int, window: int, overlap: float) -> Sequence[int]:
    """Where windows begin so that they cover `size`, spread evenly, each pair sharing `overlap` of a window or more.

    >>> starts(100, 40, 0.25), starts(30, 40, 0.5)
    ((0, 30, 60), (0,))
    """
    if size <= window:
        return (0,)
    step = max(1, int(window * (1 - overlap)))
    count = -(-(size - window) // step) + 1
    return tuple(round(i * (size - window) / (count - 1)) for i in range(count))
