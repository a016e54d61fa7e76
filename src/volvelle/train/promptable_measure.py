"""Measuring Segment Anything: the IoU of masks with objects by the number of clicks, as somebody would click.

The first click is the middle of the object; the mask is the one of three that the model itself ranks first. Each
further click is the middle of the largest error, with the logits before as a prompt too, and there is one answer. The
IoU of a mask is that in the picture's own pixels, void ones left out of both; objects that are void altogether are not
asked for; means are over objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from volvelle.data.promptable import Pictures
from volvelle.data.promptable_clicks import Click, box_around, middle, next_click
from volvelle.data.promptable_objects import Objects
from volvelle.systems.modes import evaluating
from volvelle.systems.segmentation.sam.model import Sam
from volvelle.systems.segmentation.sam.promptable import Embedding, Promptable
from volvelle.train.precision import Kind, Precision

AT_ONCE = 16
"""Objects of a picture that are asked for together."""


@dataclass(frozen=True)
class Seen:
    """What was found of one object of picture `picture`: the clicks, and the IoU after each.

    `best` is the IoU of the best of the three masks of the first click, `single` of the one mask for clear prompts at
    the same click, `box` of the mask of the object's box; NaN where not asked for.
    """

    picture: int
    index: int
    label: int
    area: int
    clicks: Sequence[Click]
    ious: Sequence[float]
    best: float = float("nan")
    single: float = float("nan")
    box: float = float("nan")


@dataclass(frozen=True)
class Measured:
    """The objects of a data set, and the figures that follow, all in [0, 1].

    metrics: `iou_1`, `iou_2`, … after so many clicks, and with `more` `best_of_three`, `single` and `iou_box`.
    """

    objects: Sequence[Seen]
    metrics: dict[str, float]

    def rows(self, classes: Sequence[str]) -> list[tuple[str, int, float, float, float]]:
        """Of each class that occurs: name, objects, mean IoU after the first and the last click, best of three."""
        found = []
        for number, name in enumerate(classes):
            own = [one for one in self.objects if one.label == number]
            if own:
                means = (
                    _mean([o.ious[0] for o in own]),
                    _mean([o.ious[-1] for o in own]),
                    _mean([o.best for o in own]),
                )
                found.append((name, len(own), *means))
        return found

    def worst(self, count: int) -> list[Seen]:
        """The objects with the lowest IoU after one click, one of a picture."""
        first: dict[int, Seen] = {}
        for one in sorted(self.objects, key=lambda one: one.ious[0]):
            first.setdefault(one.picture, one)
        return list(first.values())[:count]


def measure(
    model: Sam,
    folder: Pictures,
    *,
    clicks: Sequence[int] = (1, 2, 3, 5),
    more: bool = False,
    precision: Kind = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Ask for every object of every picture, each looked at once.

    With `more` also the best of three masks, the mask for clear prompts after one click, and boxes are measured.
    """
    numbers = Precision(precision, next(model.parameters()).device)
    prompted, found = Promptable(model), list[Seen]()
    with evaluating(model), torch.no_grad():
        for picture in range(len(folder)):
            image, objects = folder[picture]
            if len(objects):
                with numbers.autocast():
                    embedding = prompted.embed(image)
                known = ~objects.void()
                for some in _parts(len(objects)):
                    asked = _Asking(prompted, embedding, objects, known, some, numbers)
                    if asked.chosen:
                        found += asked.run(picture, max(clicks), more)
            if progress:
                progress(picture + 1, len(folder))
    metrics = {f"iou_{n}": _mean([one.ious[n - 1] for one in found]) for n in sorted(set(clicks))}
    if more:
        named = {"best_of_three": "best", "single": "single", "iou_box": "box"}
        metrics |= {name: _mean([getattr(one, field) for one in found]) for name, field in named.items()}
    return Measured(found, metrics)


class _Asking:
    """Some objects of one picture, asked for together."""

    def __init__(
        self,
        prompted: Promptable,
        embedding: Embedding,
        objects: Objects,
        known: np.ndarray,
        chosen: Sequence[int],
        numbers: Precision,
    ):
        self.prompted, self.embedding, self.known, self.numbers = prompted, embedding, known, numbers
        self.objects = objects
        seen = {i: truth for i in chosen if (truth := objects.mask(i) & known).any()}
        self.chosen, self.truths = list(seen), list(seen.values())

    def run(self, picture: int, most: int, more: bool) -> list[Seen]:
        """Click up to `most` times."""
        clicks = [[_first(truth)] for truth in self.truths]
        masks, ranks, logits = self._ask(clicks, multimask=True)
        three = [[self._iou(mask, truth) for mask in some] for some, truth in zip(masks, self.truths, strict=True)]
        ious = [[values[rank]] for values, rank in zip(three, ranks, strict=True)]
        single = box = [float("nan")] * len(self.chosen)
        if more:
            single = self._ious(self._ask(clicks, multimask=False)[0])
            boxes = torch.tensor([box_around(truth) for truth in self.truths])
            with self.numbers.autocast():
                boxed = self.prompted.predict(self.embedding, boxes=boxes, multimask=False)
            box = self._ious(boxed.masks.cpu().numpy())
        answers = [some[rank] for some, rank in zip(masks, ranks, strict=True)]
        before = torch.stack([some[rank] for some, rank in zip(logits, ranks, strict=True)])
        for _ in range(1, most):
            for own, answer, truth in zip(clicks, answers, self.truths, strict=True):
                # Where nothing is wrong, nobody clicks: the last click counts twice and changes nothing.
                own.append(next_click(answer, truth, self.known) or own[-1])
            masks, _, logits = self._ask(clicks, multimask=False, before=before)
            answers, before = [some[0] for some in masks], logits[:, 0]
            for values, answer, truth in zip(ious, answers, self.truths, strict=True):
                values.append(self._iou(answer, truth))
        return [
            Seen(picture, index, self.objects.labels[index], int(self.truths[i].sum()), clicks[i], ious[i],
                 max(three[i]), single[i], box[i])
            for i, index in enumerate(self.chosen)
        ]  # fmt: skip

    def _ask(
        self, clicks: Sequence[Sequence[Click]], *, multimask: bool, before: Tensor | None = None
    ) -> tuple[np.ndarray, list[int], Tensor]:
        """Masks (k, m, y, x), which of them is ranked first (k), logits (k, m, h, w)."""
        points = torch.tensor([[click[:2] for click in own] for own in clicks], dtype=torch.float32)
        labels = torch.tensor([[click.label for click in own] for own in clicks])
        with self.numbers.autocast():
            found = self.prompted.predict(
                self.embedding, points=points, labels=labels, masks=before, multimask=multimask
            )
        return found.masks.cpu().numpy(), found.iou.argmax(1).tolist(), found.logits.float()

    def _ious(self, masks: np.ndarray) -> list[float]:
        return [self._iou(some[0], truth) for some, truth in zip(masks, self.truths, strict=True)]

    def _iou(self, mask: np.ndarray, truth: np.ndarray) -> float:
        seen = mask & self.known
        both = int((seen & truth).sum())
        return both / max(1, int(seen.sum()) + int(truth.sum()) - both)


def _first(truth: np.ndarray) -> Click:
    found = middle(truth)
    assert found is not None, "an object has pixels"
    return Click(found[0], found[1], 1)


def _parts(count: int) -> Iterator[range]:
    for start in range(0, count, AT_ONCE):
        yield range(start, min(count, start + AT_ONCE))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else -1.0


def replay(model: Sam, image: Image.Image, clicks: Sequence[Click], *, precision: Kind = "fp32") -> list[np.ndarray]:
    """The masks (y, x) after each of an object's clicks, asked for as `measure` does."""
    numbers, masks, before = Precision(precision, next(model.parameters()).device), list[np.ndarray](), None
    prompted = Promptable(model)
    with evaluating(model), torch.no_grad(), numbers.autocast():
        embedding = prompted.embed(image)
        for count in range(1, len(clicks) + 1):
            points = torch.tensor([[click[:2] for click in clicks[:count]]], dtype=torch.float32)
            labels = torch.tensor([[click.label for click in clicks[:count]]])
            found = prompted.predict(embedding, points=points, labels=labels, masks=before, multimask=count == 1)
            rank = int(found.iou[0].argmax())
            masks.append(found.masks[0, rank].cpu().numpy())
            before = found.logits[:, rank].float()
    return masks
