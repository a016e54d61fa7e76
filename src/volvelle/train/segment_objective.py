"""Segmentation as an objective: weighted cross-entropy and Lovász-softmax on crops, the best moment kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.data.masks_augment import Whole
from volvelle.data.masks_labels import VOID
from volvelle.parts.metrics.lovasz import lovasz_softmax
from volvelle.parts.precision.depthwise import DepthwiseInFp32
from volvelle.systems.segmentation.model import Segmenter
from volvelle.train.best_weights import BestMoment
from volvelle.train.phase import Loss, Phase, adamw, trainable
from volvelle.train.recipes.segment import TrainSegment, Weighting
from volvelle.train.schedule import schedule
from volvelle.train.segment_measure import measure

Corners = tuple[int, int, int, int]
"""Which of 2 x 2 pixels is looked at, and which of 2 x 2 of these: row, column, row, column, each 0 or 1."""


class SegmentObjective(BestMoment):
    """Train all of a segmenter on batches of {images uint8 (b, 3, y, x), masks uint8 (b, y, x)}.

    `frequency` is each class's share of the training pixels. Evaluations measure `selection`, whole pictures, and keep
    a copy of the best weights: `use_best` puts them back. The copy travels in the checkpoints.
    """

    best = ("miou", "max")
    forward_methods = ("scores",)
    model: Segmenter

    def __init__(
        self, model: Segmenter, options: TrainSegment, frequency: np.ndarray, *, selection: Whole | None = None
    ):
        super().__init__(model)
        self.options, self.selection = options, selection
        self.class_weights = class_weights(frequency, options.weighting).to(next(model.parameters()).device)
        self.steps = 0

    def phases(self, steps: int) -> Sequence[Phase]:
        """One phase; the encoder's learning rate is a share of the decoder's."""
        self.steps = steps
        options = self.options
        rate = schedule(options.schedule, steps, options.warmup)
        optimizer = adamw(options, share=lambda name: options.encoder_rate if name.startswith("encoder.") else 1.0)
        return [Phase("segment", trainable(self.model), self.loss, optimizer, rate, clip=options.clip)]

    def loss(self, batch: Mapping[str, Tensor], *, at: Corners | None = None) -> Loss:
        """Loss of a batch of crops, shrunk during the first steps if so asked; `at` is that of `segmentation_loss`."""
        pixels = self.model.preprocessing.normalise(batch["images"])
        masks = batch["masks"]
        if self.step < self.options.small * self.steps:
            pixels, masks = shrink(pixels, masks, self.options.shrink)
        # The pictures decide in which order convolutions work. Weights keep plain strides: a moment of the optimiser
        # comes back from a checkpoint with these, and the fused step takes it for granted that all agree.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with DepthwiseInFp32():
            scores = self.model.scores(pixels)
        return segmentation_loss(scores, masks, self.class_weights, lovasz=self.options.lovasz, at=at)

    def evaluate(self) -> Mapping[str, float]:
        """Mean IoU and pixel accuracy on the pictures set aside; the best weights are copied."""
        if self.selection is None:
            return {}
        found = measure(self.model, self.selection, precision=self.options.precision).metrics
        self.best_weights.offer(found["miou"])
        return {name: found[name] for name in ("miou", "pixel_accuracy")}


def class_weights(frequency: np.ndarray, kind: Weighting) -> Tensor:
    """A weight a class, of mean 1 over the pixels, from the classes' shares f of them.

    log: 1 / log(1.1 + f), after Paszke et al. 2016 (ENet), section 5.2, with a wider bound: rare classes weigh up to
    3.7 times as much as one of 30 %. inverse: 1 / f. A class without pixels weighs nothing.

    >>> class_weights(np.array([0.5, 0.5, 0.0]), "log")
    tensor([1., 1., 0.])
    """
    f = torch.from_numpy(np.asarray(frequency, dtype=np.float64))
    found = f > 0
    raw = {"none": torch.ones_like(f), "log": 1 / torch.log(1.1 + f), "inverse": 1 / f.clamp(min=1e-12)}[kind]
    raw = torch.where(found, raw, 0.0)
    return (raw / (raw * f).sum().clamp(min=1e-12)).float()


def segmentation_loss(
    scores: Tensor, masks: Tensor, weights: Tensor, *, lovasz: float = 0.0, at: Corners | None = None
) -> Loss:
    """Cross-entropy, its pixels weighted by class, plus `lovasz` times the Lovász-softmax loss.

    scores (b, k, ·, ·) at any stride, masks (b, y, x). Both losses are taken at half the masks' resolution, where of
    each 2 x 2 pixels one is drawn, the same for all: in the mean over steps nothing is left out, thin things neither,
    and a step costs a quarter. Lovász-softmax looks at a quarter of these again. `at` names the pixels; None: drawn.
    """
    high, wide = masks.shape[-2:]
    half = (-(-high // 2), -(-wide // 2))
    logits = scores.float()
    if logits.shape[-2:] != half:
        logits = F.interpolate(logits, size=half, mode="bilinear", align_corners=False)
    first, second, third, fourth = at or torch.randint(2, (4,)).tolist()
    target = masks[:, min(first, high - 1) :: 2, min(second, wide - 1) :: 2].long()
    logits = logits[:, :, : target.shape[1], : target.shape[2]]
    summed = F.cross_entropy(logits, target, weights, ignore_index=VOID, reduction="sum")
    # 255 is beyond the weights' end: void pixels are counted in a place that is cut off.
    k = len(weights)
    counts = torch.bincount(target.clamp(max=k).flatten(), minlength=k + 1)[:k]
    count = (counts * weights).sum()
    entropy = summed / count.clamp(min=1e-6)
    metrics: dict[str, Tensor] = {"cross_entropy": entropy.detach()}
    value = entropy
    if lovasz:
        kept = (..., slice(min(third, target.shape[1] - 1), None, 2), slice(min(fourth, target.shape[2] - 1), None, 2))
        follow = lovasz_softmax(logits[kept].softmax(1), target[kept], ignore_index=VOID)
        metrics["lovasz"] = follow.detach()
        value = entropy + lovasz * follow
    return Loss(value, metrics, weight=max(float(count), 1e-6))


def shrink(pixels: Tensor, masks: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Pictures (b, 3, y, x) averaged down, and masks (b, y, x) by their nearest pixels, to multiples of 32."""
    high, wide = (max(32, round(side * factor / 32) * 32) for side in masks.shape[-2:])
    rows, columns = (
        ((torch.arange(new, device=masks.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in ((high, masks.shape[-2]), (wide, masks.shape[-1]))
    )
    smaller = F.interpolate(pixels, size=(high, wide), mode="bilinear", align_corners=False, antialias=True)
    return smaller, masks[:, rows][:, :, columns]
