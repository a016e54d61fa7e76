"""Classification as an objective: cross-entropy on views of pictures, accuracy on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.data.loader import Loader
from volvelle.parts.metrics.confusion import confusion_matrix
from volvelle.parts.precision.depthwise import DepthwiseInFp32
from volvelle.systems.backbone.model import Backbone
from volvelle.train.phase import Loss, Objective, Phase, adamw, trainable
from volvelle.train.player import to_device
from volvelle.train.precision import Kind, Precision
from volvelle.train.recipes.classify import TrainClassify
from volvelle.train.schedule import schedule


@dataclass(frozen=True)
class Measured:
    """What a classifier said of every picture: figures, the confusion matrix (k, k), and its answers.

    `predicted` (n) and `confidence` (n) are the likeliest class and its probability, `labels` (n) the right ones.
    """

    metrics: dict[str, float]
    matrix: Tensor
    labels: Tensor
    predicted: Tensor
    confidence: Tensor

    def worst(self, count: int) -> list[int]:
        """Numbers of the pictures that were missed with the greatest confidence."""
        wrong = (self.predicted != self.labels).nonzero()[:, 0]
        order = self.confidence[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()


@torch.no_grad()
def measure(
    model: Backbone,
    loader: Loader,
    *,
    precision: Kind = "fp32",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Look at the loader's pictures, at most `limit`. Metrics: loss, accuracy, and top5 where there are over five."""
    device = next(model.parameters()).device
    format_ = Precision(precision, device)
    found: list[tuple[Tensor, ...]] = []
    done, total = 0, min(limit or len(loader.dataset), len(loader.dataset))
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 0})
    for batch in loader:
        images, labels = (to_device(batch.value[name], device) for name in ("images", "labels"))
        with format_.autocast():
            logits = model(model.preprocessing.normalise(images))
        logits = logits.float()
        confidence, predicted = logits.softmax(1).max(1)
        five = logits.topk(min(5, logits.shape[1]), 1).indices.eq(labels[:, None]).any(1)
        loss = F.cross_entropy(logits, labels, reduction="none")
        found.append(tuple(value.cpu() for value in (labels, predicted, confidence, five, loss)))
        done += len(labels)
        if progress is not None:
            progress(min(done, total), total)
        if done >= total:
            break
    labels, predicted, confidence, five, loss = (torch.cat(parts)[:total] for parts in zip(*found, strict=True))
    metrics = {"loss": float(loss.double().mean()), "accuracy": float((predicted == labels).double().mean())}
    if len(model.classes) > 5:
        metrics["top5"] = float(five.double().mean())
    matrix = confusion_matrix(predicted, labels, num_classes=len(model.classes))
    return Measured(metrics, matrix, labels, predicted, confidence)


class ClassifyObjective(Objective):
    """Train a backbone on batches of {images uint8 (b, 3, y, x), labels int64 (b)}; evaluations measure `held`."""

    best = ("accuracy", "max")

    def __init__(self, model: Backbone, options: TrainClassify, *, held: Loader | None = None):
        self.model, self.options, self.held = model, options, held
        if options.freeze == "backbone":
            model.requires_grad_(False)
            model.last_layer.requires_grad_(True)

    def modules(self) -> Mapping[str, nn.Module]:
        """The network."""
        return {"model": self.model}

    def phases(self, steps: int) -> Sequence[Phase]:
        """One phase over what asks for gradients; what began with known weights learns at a share of the rate."""
        options = self.options
        rate = schedule(options.schedule, steps, options.warmup)
        known = 1.0 if options.weights == "none" else options.backbone_rate
        last = f"{self.model.classifier_name}."
        optimizer = adamw(options, share=lambda name: 1.0 if name.startswith(last) else known)
        return [Phase("classify", trainable(self.model), self.loss, optimizer, rate, clip=options.clip)]

    def train_mode(self) -> None:
        """Training mode, except for norms whose statistics stay: those of frozen parts, and with a batch of one."""
        self.model.train()
        if self.options.freeze != "none" or self.options.batch == 1:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """Cross-entropy with smoothed labels."""
        images = self.model.preprocessing.normalise(batch["images"])
        with DepthwiseInFp32():
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
        labels = batch["labels"]
        value = F.cross_entropy(logits.float(), labels, label_smoothing=self.options.smoothing)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return Loss(value, {"accuracy": right}, weight=len(labels))

    def units(self, batch: Any) -> tuple[float, str]:
        """Pictures."""
        return float(len(batch["labels"])), "images"

    def evaluate(self) -> Mapping[str, float]:
        """Loss and accuracy on the held-out pictures."""
        if self.held is None:
            return {}
        return measure(
            self.model, self.held, precision=self.options.precision, limit=self.options.held_out_size
        ).metrics
