"""From a mask's logits at a quarter of the input's size to run lengths in the picture's size, a band at a time.

Two bilinear interpolations lie between them, to the input's square and, without its padding, to the picture. Both are
linear and act on each axis alone, so together they are two matrices whose rows hold few neighbouring weights:

    M = A_y L A_x^T,    M is L in the picture's size

Only where M can pass the lowest threshold is it computed, in bands of columns that stay in the processor's cache; of a
band what is kept is where its runs begin and end, and two counts. No map of the picture's size exists, in bits neither.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.data.run_lengths import RunLengths, edges_of
from volvelle.parts.regions.masks import masks_to_boxes

CACHED = 2**15
"""Numbers of a band on a processor: 128 KiB."""
LARGE = 2**20
"""Numbers of a band on other devices, where many small steps cost more than memory."""


class Axis(NamedTuple):
    """One axis of the way up: weights (out, low), and where those of each output begin and end, in rising order."""

    weights: Tensor
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, low: int, side: int, used: int, out: int, device: torch.device | str) -> Axis:
        """`low` values interpolated to `side`, of those the first `used` to `out`."""
        units = torch.eye(low, device=device).unsqueeze(0)
        square = F.interpolate(units, size=side, mode="linear", align_corners=False)[..., :used]
        weights = F.interpolate(square, size=out, mode="linear", align_corners=False)[0].T.contiguous()
        touched = (weights != 0).cpu().numpy()
        return cls(weights, touched.argmax(1), low - touched[:, ::-1].argmax(1))

    def reach(self, begin: int, end: int) -> tuple[int, int]:
        """The outputs that low values begin .. end - 1 have a part in."""
        return int(np.searchsorted(self.last, begin, side="right")), int(np.searchsorted(self.first, end, side="left"))

    def needs(self, begin: int, end: int) -> tuple[int, int]:
        """The low values that have a part in outputs begin .. end - 1."""
        return int(self.first[begin]), int(self.last[end - 1])


class Upsampler:
    """Masks of one crop: `low` x `low` logits, an input of `side` pixels of which `used` (height, width) are picture.

    The crop lies at `box` (x1 y1 x2 y2) in a picture of `size` (height, width), and masks are the picture's.
    """

    def __init__(
        self,
        low: int,
        side: int,
        used: tuple[int, int],
        box: tuple[int, int, int, int],
        size: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
    ):
        self.corner, self.size = box[:2], size
        self.y = Axis.of(low, side, used[0], box[3] - box[1], device)
        self.x = Axis.of(low, side, used[1], box[2] - box[0], device)
        self.numbers = CACHED if torch.device(device).type == "cpu" else LARGE

    def bytes_needed(self) -> int:
        """The most that one mask takes besides its run lengths: what lies between the two matrices, and a band."""
        low, high = self.x.weights.shape[1], len(self.y.weights)
        return 4 * low * high + 48 * (self.numbers + high)

    def masks(
        self, logits: Tensor, *, threshold: float = 0.0, offset: float = 1.0, least: float = 0.0
    ) -> list[tuple[int, float, RunLengths]]:
        """Of logits (n, low, low): the number, the stability and the mask of each that is at least so stable.

        Stability is that of `stability_score` in the crop's size. With `least` 0 all are given, and where even the
        lower threshold leaves nothing, stability is NaN.
        """
        logits = logits.float()
        windows = masks_to_boxes(logits > threshold - offset).int().tolist()
        found = []
        for number, (one, (left, top, right, bottom)) in enumerate(zip(logits, windows, strict=True)):
            xs, ys = self.x.reach(left, right + 1), self.y.reach(top, bottom + 1)
            edges, high, low = self._threshold(one, xs, ys, threshold, offset)
            stability = float(np.float32(high) / np.float32(low)) if low else float("nan")
            if least <= 0 or stability >= np.float32(least):
                found.append((number, stability, RunLengths.between(edges, self.size)))
        return found

    def _threshold(
        self, logits: Tensor, xs: tuple[int, int], ys: tuple[int, int], threshold: float, offset: float
    ) -> tuple[np.ndarray, int, int]:
        """Where the runs of a window begin and end, and how many pixels pass the higher and the lower threshold."""
        tall = ys[1] - ys[0]
        if xs[1] <= xs[0] or tall <= 0:
            return np.zeros(0, dtype=np.int64), 0, 0
        begin, end = self.x.needs(*xs)
        middle = self._along_y(logits[:, begin:end], ys)
        edges, high, low = list[np.ndarray](), 0, 0
        step = max(1, self.numbers // tall)
        for start in range(xs[0], xs[1], step):
            stop = min(start + step, xs[1])
            first, last = self.x.needs(start, stop)
            band = (self.x.weights[start:stop, first:last] @ middle[first - begin : last - begin]).cpu().numpy()
            corner = start + self.corner[0], ys[0] + self.corner[1]
            edges.append(edges_of(band > threshold, corner, self.size[0]))
            high += int(np.count_nonzero(band > threshold + offset))
            low += int(np.count_nonzero(band > threshold - offset))
        return np.concatenate(edges), high, low

    def _along_y(self, logits: Tensor, ys: tuple[int, int]) -> Tensor:
        """Columns of the logits (low, n) on rows ys of the crop: (n, y)."""
        n = logits.shape[1]
        found = logits.new_empty(n, ys[1] - ys[0])
        step = max(1, self.numbers // n)
        for start in range(ys[0], ys[1], step):
            stop = min(start + step, ys[1])
            first, last = self.y.needs(start, stop)
            part = found[:, start - ys[0] : stop - ys[0]]
            torch.mm(logits[first:last].T, self.y.weights[start:stop, first:last].T, out=part)
        return found
