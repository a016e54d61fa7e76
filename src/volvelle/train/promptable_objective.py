"""Segment Anything as an objective: one look at each crop, many prompts on it, and clicks where the answers are wrong.

A step looks at each crop once and asks for k objects, all by a click or all by a box. The answer to a click may be any
of three masks, of which the best one learns, and the one mask for clear prompts, which learns beside them. Some of the
objects then get further clicks, one a round, in the middle of the largest error or anywhere in one, with the logits
before as a prompt too. Kirillov et al. 2023, appendix A, with fewer rounds.

A crop is a part of the model's input: it lies anywhere in it, and the places' encoding is that of where it lies.

Shapes: b crops, k prompts, m masks, n points; g places a side of the input, h x w of the crop.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.data.promptable import Pictures
from volvelle.data.promptable_clicks import COARSE, next_click
from volvelle.parts.precision.depthwise import DepthwiseInFp32
from volvelle.systems.segmentation.sam.config import STRIDE
from volvelle.systems.segmentation.sam.layers import Features
from volvelle.systems.segmentation.sam.model import Sam
from volvelle.train.best_weights import BestMoment
from volvelle.train.phase import Loss, Phase, adamw, trainable
from volvelle.train.promptable_classes import ClassHead
from volvelle.train.promptable_losses import best_of, mask_losses, overlaps
from volvelle.train.promptable_measure import measure
from volvelle.train.recipes.promptable import TrainPromptable
from volvelle.train.schedule import schedule

CELL = 4
"""Pixels of the input to one cell of a mask."""
FORGET = 0.2
"""The share of further rounds that are asked without the logits before."""


@dataclass(frozen=True)
class Asked:
    """Prompts: points (b, k, n, 2) and labels (b, k, n), or none; boxes (b, k, 4) or none; logits (b, k, 4h, 4w)."""

    points: Tensor | None
    labels: Tensor | None
    boxes: Tensor | None = None
    before: Tensor | None = None

    def first(self, count: int) -> Asked:
        """The prompts of the first `count` objects."""
        parts = (None if part is None else part[:, :count] for part in (self.points, self.labels, self.boxes))
        return Asked(*parts)

    def clicked(self, points: Tensor, labels: Tensor) -> Asked:
        """The same with one more click each: (b, k, 1, 2) and (b, k, 1)."""
        if self.points is None or self.labels is None:
            return replace(self, points=points, labels=labels)
        return replace(self, points=torch.cat((self.points, points), 2), labels=torch.cat((self.labels, labels), 2))


@dataclass(frozen=True)
class Target:
    """What is there: of each cell the share that objects cover (b, k, 4h, 4w) and the share that is known (b, 4h, 4w).

    `there` (b, k) says which objects are real.
    """

    cover: Tensor
    known: Tensor
    there: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Target:
        """Of a batch of `collate_objects`."""
        known = F.avg_pool2d(batch["known"].float()[:, None], CELL)[:, 0]
        cover = F.avg_pool2d(batch["masks"].float(), CELL) / known[:, None].clamp(min=1 / CELL**2)
        return cls(cover.clamp(max=1), known, batch["there"])

    def first(self, count: int) -> Target:
        """The first `count` objects."""
        return Target(self.cover[:, :count], self.known, self.there[:, :count])

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (b, k) over real objects."""
        return (values * self.there).sum() / self.there.sum().clamp(min=1)


class PromptObjective(BestMoment):
    """Train all of a model on batches of `collate_objects`.

    Evaluations ask for each object of `selection`, in whole pictures, by one click and by its box, and keep a copy of
    the best weights: `iou` is the mean of both, in the shares of `boxes` in which they are trained.
    With `classes`, as many as the pixels of the batches have, the image encoder also learns to tell these apart.
    """

    best = ("iou", "max")
    model: Sam

    def __init__(
        self, model: Sam, options: TrainPromptable, *, selection: Pictures | None = None, classes: int | None = None
    ):
        super().__init__(model)
        self.options, self.selection = options, selection
        self.classes: ClassHead | None = None
        if classes and options.classes_weight:
            self.classes = ClassHead(model.config, classes).to(next(model.parameters()).device)

    def modules(self) -> Mapping[str, nn.Module]:
        """The model, and what names the classes."""
        return {"model": self.model} | ({"classes": self.classes} if self.classes else {})

    def phases(self, steps: int) -> Sequence[Phase]:
        """One phase; the backbone's learning rate is a share of the others'."""
        options = self.options
        rate = schedule(options.schedule, steps, options.warmup)

        def share(name: str) -> float:
            return options.encoder_rate if name.startswith("image_encoder.backbone.") else 1.0

        optimizer = adamw(options, share=share)
        parameters = trainable(self.model) | (trainable(self.classes, "classes.") if self.classes else {})
        return [Phase("promptable", parameters, self.loss, optimizer, rate, clip=options.clip)]

    def loss(self, batch: Mapping[str, Tensor]) -> Loss:
        """The losses of the first answers and the mean of those after further clicks."""
        draw = random.Random(f"prompts/{self.options.seed}/{self.step}")
        pixels = self.model.preprocessing.normalise(batch["images"]).contiguous(memory_format=torch.channels_last)
        with DepthwiseInFp32():
            seen = self.model.image_encoder.features(pixels)
        target = Target.of(batch)
        corner, position = self._place(seen.embedding, draw)
        asked = self._first(batch, corner, draw)
        value, answer, metrics = self._answer_first(seen, position, asked, target)
        count = min(self.options.refined, target.cover.shape[1])
        if count:
            rounds = draw.randint(1, self.options.rounds)
            asked, target, answer = asked.first(count), target.first(count), answer[:, :count]
            later = list[Tensor]()
            for _ in range(rounds):
                asked = asked.clicked(*self._clicks(answer, target, corner, draw))
                before = None if draw.random() < FORGET else answer
                logits, iou = self._ask(seen, position, replace(asked, before=before), multimask=False)
                later.append(self._judged(logits, iou, target))
                answer = logits[:, :, 0].detach().float()
            further = torch.stack(later).mean()
            value = value + further
            metrics["later_loss"] = further.detach()
        if self.classes:
            named = self.classes.loss(seen, batch["classes"])
            value = value + self.options.classes_weight * named
            metrics["classes_loss"] = named.detach()
        return Loss(value, metrics, weight=max(1.0, float(batch["there"].sum())))

    def evaluate(self) -> Mapping[str, float]:
        """Mean IoU by one click and by a box on the pictures set aside; the best weights are copied."""
        if self.selection is None:
            return {}
        found = measure(self.model, self.selection, clicks=(1,), more=True, precision=self.options.precision).metrics
        click, box, share = found["iou_1"], found["iou_box"], self.options.boxes
        iou = share * box + (1 - share) * click
        self.best_weights.offer(iou)
        return {"iou": iou, "iou_1": click, "iou_box": box}

    def _place(self, embedding: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
        """Where the crops lie in the input: their corner (x, y) in pixels, and the places' encoding (1, c, h, w)."""
        grid = self.model.config.grid
        h, w = embedding.shape[-2:]
        top, left = draw.randint(0, grid - h), draw.randint(0, grid - w)
        position = self.model.prompt_encoder.position()[:, :, top : top + h, left : left + w]
        return torch.tensor([left, top], device=embedding.device) * float(STRIDE), position

    def _first(self, batch: Mapping[str, Tensor], corner: Tensor, draw: random.Random) -> Asked:
        if draw.random() < self.options.boxes:
            return Asked(None, None, batch["boxes"] + corner.repeat(2))
        points = (batch["points"] + corner)[:, :, None]
        return Asked(points, torch.ones(points.shape[:-1], dtype=torch.int64, device=points.device))

    def _answer_first(
        self, seen: Features, position: Tensor, asked: Asked, target: Target
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss of the first answers, the answers (b, k, 4h, 4w) that the model ranks first, and figures."""
        logits, iou = self._ask(seen, position, asked, multimask=None)
        clear = self._judged(logits[:, :, :1], iou[:, :, :1], target)
        if asked.points is None:  # a box is clear enough
            return clear, logits[:, :, 0].detach().float(), {"box_loss": clear.detach()}
        unclear = self._judged(logits[:, :, 1:], iou[:, :, 1:], target)
        ranked = iou[:, :, 1:].detach().argmax(-1)
        rows = torch.arange(ranked.shape[1], device=ranked.device)
        chosen = logits.detach()[torch.arange(len(ranked), device=ranked.device)[:, None], rows, ranked + 1]
        return clear + unclear, chosen.float(), {"click_loss": unclear.detach(), "clear_loss": clear.detach()}

    def _ask(self, seen: Features, position: Tensor, asked: Asked, *, multimask: bool | None) -> tuple[Tensor, Tensor]:
        """Logits (b, k, m, 4h, 4w) and estimated IoU (b, k, m)."""
        encoder = self.model.prompt_encoder
        sparse, dense = encoder(asked.points, asked.labels, asked.boxes)
        if asked.before is not None:
            b, k, high, wide = asked.before.shape
            dense = encoder.mask_downscaling(asked.before.reshape(b * k, 1, high, wide)).unflatten(0, (b, k))
        return self.model.mask_decoder(seen.embedding, position, sparse, dense, multimask, fine=seen.fine)

    def _judged(self, logits: Tensor, iou: Tensor, target: Target) -> Tensor:
        """The loss of each prompt's masks, the best of them above all, and the error of all estimated IoUs."""
        losses = mask_losses(logits, target.cover, target.known, self.options.focal)
        wrong = (iou.float() - overlaps(logits, target.cover, target.known)).square().mean(-1)
        return target.mean(best_of(losses, self.options.others) + wrong)

    def _clicks(self, answer: Tensor, target: Target, corner: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
        """One more click for each answer (b, k, 4h, 4w): points (b, k, 1, 2) in the input, labels (b, k, 1).

        An answer without an error gets a point that is nothing.
        """
        seen, truth = (answer > 0).cpu().numpy(), (target.cover > 0.5).cpu().numpy()
        known = (target.known > 0.5).cpu().numpy()
        points, labels = torch.zeros(*seen.shape[:2], 1, 2), torch.full((*seen.shape[:2], 1), -1)
        for row in range(seen.shape[0]):
            for i in range(seen.shape[1]):
                anywhere = None if draw.random() < self.options.central else draw
                click = next_click(seen[row, i], truth[row, i], known[row], generator=anywhere, limit=COARSE)
                if click is not None:
                    points[row, i, 0] = torch.tensor([click.x, click.y]) * float(CELL) + (CELL - 1) / 2
                    labels[row, i, 0] = click.label
        return points.to(corner.device) + corner, labels.to(corner.device)
