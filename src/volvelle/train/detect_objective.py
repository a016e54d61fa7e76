"""Detection as an objective: the detector's four losses on views of one size, the best moment kept."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from volvelle.data.boxes_augment import Fitted
from volvelle.parts.precision.depthwise import DepthwiseInFp32
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.targets import Targets, collate
from volvelle.train.best_weights import BestMoment
from volvelle.train.detect_measure import measure
from volvelle.train.phase import Loss, Phase, adamw, trainable
from volvelle.train.recipes.detect import TrainDetect
from volvelle.train.schedule import schedule


class DetectObjective(BestMoment):
    """Train all of a detector on batches of `collate_views`.

    Evaluations measure `selection`, whole pictures; with `keep="best"` a copy of the best weights is kept, and travels
    in the checkpoints: `use_best` puts them back.
    """

    best = ("map_50", "max")
    forward_methods = ("losses",)
    model: Detector

    def __init__(self, model: Detector, options: TrainDetect, *, selection: Fitted | None = None):
        super().__init__(model)
        self.options, self.selection = options, selection

    def phases(self, steps: int) -> Sequence[Phase]:
        """One phase; the backbone's learning rate is a share of the others'."""
        options = self.options
        rate = schedule(options.schedule, steps, options.warmup)
        optimizer = adamw(options, share=lambda name: options.backbone_rate if name.startswith("backbone.") else 1.0)
        return [Phase("detect", trainable(self.model), self.loss, optimizer, rate, clip=options.clip)]

    def loss(self, batch: Mapping[str, Any]) -> Loss:
        """The sum of the detector's losses on a batch, magnified as this step is."""
        pixels, sizes = self.model.preprocessing.normalise(batch["images"]), batch["sizes"]
        targets = collate(batch["boxes"], batch["labels"], batch["ignored"]).to(pixels.device)
        factor = random.Random(f"{self.options.seed}/{self.step}").choice(self.options.multi_scale)
        if factor != 1:
            pixels, sizes, targets = magnify(pixels, sizes, targets, factor)
        # Weights keep plain strides, as in segmentation: the optimiser's moments come back from checkpoints with them.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with DepthwiseInFp32():
            losses = self.model.losses(pixels, sizes, targets)
        value = torch.stack([loss.float() for loss in losses.values()]).sum()
        metrics = {f"{name}_loss": loss.detach().float() for name, loss in losses.items()}
        return Loss(value, metrics, weight=float(len(pixels)))

    def evaluate(self) -> Mapping[str, float]:
        """Mean average precisions on the pictures set aside; the best weights are copied if they are to be kept."""
        if self.selection is None:
            return {}
        found = measure(self.model, self.selection, precision=self.options.precision).metrics
        if self.options.keep == "best":
            self.best_weights.offer(found["map_50"])
        return {name: found[name] for name in ("map_50", "map")}


def magnify(pixels: Tensor, sizes: Tensor, targets: Targets, factor: float) -> tuple[Tensor, Tensor, Targets]:
    """Pictures (b, 3, y, x), their sizes (b, 2) and their boxes, all larger by `factor`; sides are multiples of 32."""
    high, wide = (max(32, round(side * factor / 32) * 32) for side in pixels.shape[-2:])
    down, across = high / pixels.shape[-2], wide / pixels.shape[-1]
    larger = F.interpolate(pixels, size=(high, wide), mode="bilinear", align_corners=False, antialias=factor < 1)
    grown = (sizes * sizes.new_tensor([down, across], dtype=torch.float64)).round().long().clamp(min=1)
    return larger, grown, targets._replace(boxes=targets.boxes * targets.boxes.new_tensor([across, down] * 2))
