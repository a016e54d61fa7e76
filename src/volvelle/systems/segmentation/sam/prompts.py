"""Prompts as people give them, in pixels of their picture: checked, and carried over to the model's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.systems.segmentation.sam.embedding import Embedding

Numbers = Tensor | np.ndarray | Sequence[Any]
"""Numbers in a tensor, an array, or nested lists."""


class Prompts(NamedTuple):
    """k prompts on one picture, as `PromptEncoder` takes them, each with a first dimension of 1."""

    points: Tensor | None
    labels: Tensor | None
    boxes: Tensor | None
    masks: Tensor | None

    @property
    def count(self) -> int:
        """How many."""
        return next(x.shape[1] for x in self if x is not None)

    def part(self, start: int, stop: int) -> Prompts:
        """Some of the prompts."""
        return Prompts(*(None if x is None else x[:, start:stop] for x in self))


def prepare(
    embedding: Embedding,
    points: Numbers | None,
    labels: Numbers | None,
    boxes: Numbers | None,
    masks: Numbers | None,
) -> Prompts:
    """Check prompts in pixels of the picture and scale them to the input.

    `points` (k, n, 2) with `labels` (k, n), or (n, 2) with (n,) for one prompt; rows of different length are filled up
    with the label -1. `boxes` (k, 4) or (4,), `masks` (k, s / 4, s / 4), (k, 1, s / 4, s / 4) or one of them. Raises
    VolvelleError that names the first prompt which is wrong: outside the picture, not finite, an empty box, none at
    all.
    """
    if not isinstance(embedding, Embedding):
        raise VolvelleError(
            f"predict: an embedding is wanted, got {type(embedding).__name__}",
            tip="embedding = promptable.embed(picture)",
        )
    device, (height, width) = embedding.features.device, embedding.original
    found = check((height, width), points, labels, boxes, alone=masks is None)
    scale = torch.tensor([embedding.scaled[1] / width, embedding.scaled[0] / height], dtype=torch.float64)
    if "points" in found:
        found["points"] = found["points"] * scale
    if "boxes" in found:
        found["boxes"] = (found["boxes"].view(-1, 2, 2) * scale).view(-1, 4)
    if masks is not None:
        found["masks"] = _masks(masks, embedding.size // 4)
    counts = {name: tensor.shape[0] for name, tensor in found.items() if name != "labels"}
    if not counts or not max(counts.values()):
        raise VolvelleError("predict: no prompt", tip="give points with labels, boxes or masks")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise VolvelleError(f"predict: as many of each kind are wanted, one a prompt; got {listed}")
    ready = {name: (x if name == "labels" else x.float()).to(device).unsqueeze(0) for name, x in found.items()}
    return Prompts(*(ready.get(name) for name in Prompts._fields))


def check(
    size: tuple[int, int],
    points: Numbers | None,
    labels: Numbers | None,
    boxes: Numbers | None,
    *,
    alone: bool = True,
) -> dict[str, Tensor]:
    """Points (k, n, 2) fp64, labels (k, n) and boxes (k, 4), as far as given, for a picture of `size` (height, width).

    Raises VolvelleError as `prepare` does. Where boxes are given too, or the prompts are not `alone`, one without a
    point may be among them.
    """
    found: dict[str, Tensor] = {}
    given = _points(points, labels)
    if given is not None:
        found["points"] = given[0]
        found["labels"] = _check_points(*given, *size, wanted=alone and boxes is None)
    if boxes is not None:
        found["boxes"] = _boxes(boxes)
        _check_boxes(found["boxes"], *size)
    return found


def _points(points: Numbers | None, labels: Numbers | None) -> tuple[Tensor, Tensor] | None:
    """Points (k, n, 2) and labels (k, n), both fp64."""
    if points is None and labels is None:
        return None
    if points is None:
        raise VolvelleError("predict: labels without points", tip="points=[[x, y], …]")
    if not isinstance(points, (Tensor, np.ndarray)) and _is_ragged(points):
        return _filled(points, labels)
    at = _tensor(points, "points")
    at = at.reshape(0, 0, 2) if not at.numel() else at
    at = at.view(1, 1, 2) if at.dim() == 1 and at.numel() == 2 else at
    if at.dim() not in (2, 3) or at.shape[-1] != 2:
        raise VolvelleError(f"predict: points are (k, n, 2) or (n, 2) numbers x, y, got {tuple(at.shape)}")
    what = torch.ones(at.shape[:-1]).double() if labels is None else _tensor(labels, "labels")
    # One label a prompt of one point may stand without brackets, but rows may not become columns.
    if [side for side in what.shape if side != 1] != [side for side in at.shape[:-1] if side != 1]:
        raise VolvelleError(
            f"predict: {at.numel() // 2} points need as many labels, got {what.numel()}: "
            f"{tuple(at.shape)} and {tuple(what.shape)}",
            tip="1 is foreground, 0 background",
        )
    at = at.unsqueeze(0) if at.dim() == 2 else at
    return at, what.reshape(at.shape[:-1])


def _is_ragged(points: Sequence[Any]) -> bool:
    """Whether these are lists of points, of different lengths."""
    try:
        return len({len(row) for row in points}) > 1 and all(np.ndim(row) == 2 for row in points)
    except (TypeError, ValueError):
        return False


def _filled(points: Sequence[Any], labels: Any) -> tuple[Tensor, Tensor]:
    rows = [_tensor(row, "points") for row in points]
    wrong = next((row for row in rows if row.shape[-1] != 2), None)
    if wrong is not None:
        raise VolvelleError(f"predict: points are rows of (n, 2) numbers x, y, got one of {tuple(wrong.shape)}")
    try:
        marks = [torch.ones(len(row)) for row in rows] if labels is None else [_tensor(row, "labels") for row in labels]
    except TypeError:  # one number
        marks = []
    if [(len(row),) for row in rows] != [tuple(row.shape) for row in marks]:
        raise VolvelleError("predict: every prompt needs as many labels as points", tip="1 foreground, 0 background")
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([row.double() for row in marks], batch_first=True, padding_value=-1)


def _boxes(boxes: Numbers) -> Tensor:
    """(k, 4) fp64."""
    corners = _tensor(boxes, "boxes")
    corners = corners.reshape(0, 4) if not corners.numel() else corners
    corners = corners.unsqueeze(0) if corners.dim() == 1 else corners
    if corners.dim() != 2 or corners.shape[1] != 4:
        raise VolvelleError(
            f"predict: boxes are (k, 4) numbers x1, y1, x2, y2, or 4 of one box, got {tuple(corners.shape)}"
        )
    return corners


def _masks(masks: Numbers, side: int) -> Tensor:
    """(k, side, side) fp64."""
    logits = _tensor(masks, "masks")
    logits = logits.unsqueeze(0) if logits.dim() == 2 else logits
    if logits.dim() == 4 and logits.shape[1] == 1:
        logits = logits.squeeze(1)
    if logits.dim() == 4 and logits.shape[2:] == (side, side):
        raise VolvelleError(
            f"predict: {logits.shape[1]} masks a prompt, {tuple(logits.shape)}, and one is wanted",
            tip="choose one of each: logits[range(len(iou)), iou.argmax(1)]",
        )
    if logits.dim() != 3 or logits.shape[1:] != (side, side):
        raise VolvelleError(
            f"predict: masks are (k, {side}, {side}) logits, got {tuple(logits.shape)}",
            tip="give the low-resolution logits of an earlier answer",
        )
    for number in (~torch.isfinite(logits).flatten(1).all(1)).nonzero()[:1, 0].tolist():
        raise VolvelleError(f"predict: mask {number} holds numbers that are not finite")
    return logits


def _tensor(numbers: Numbers, name: str) -> Tensor:
    try:
        return (numbers.detach().cpu() if isinstance(numbers, Tensor) else torch.as_tensor(numbers)).double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise VolvelleError(f"predict: {name} must be numbers in a regular table ({error})") from error


def _check_points(points: Tensor, labels: Tensor, height: int, width: int, *, wanted: bool) -> Tensor:
    """The labels as int64."""
    wrong = ~((labels == -1) | (labels == 0) | (labels == 1))
    if wrong.any():
        raise VolvelleError(
            f"predict: labels are 1 (foreground), 0 (background) or -1 (no point), got {labels[wrong][0].item():g}"
        )
    real = labels >= 0
    if wanted and not real.any(-1).all():
        raise VolvelleError("predict: a prompt without a point", tip="every row needs a label 0 or 1, or a box")
    x, y = points.unbind(-1)
    # Written so that NaN is outside.
    outside = real & ~((x >= 0) & (x <= width) & (y >= 0) & (y <= height))
    if outside.any():
        prompt, number = (int(i) for i in outside.nonzero()[0])
        raise VolvelleError(
            f"predict: point {number} of prompt {prompt} at ({x[prompt, number]:g}, {y[prompt, number]:g}) is outside "
            f"the picture of {width} x {height} pixels",
            tip="coordinates are (x, y) pixels of the picture as it was given to embed",
        )
    return labels.to(torch.int64)


def _check_boxes(boxes: Tensor, height: int, width: int) -> None:
    x1, y1, x2, y2 = boxes.unbind(-1)
    for number in (~((x2 > x1) & (y2 > y1))).nonzero()[:1, 0].tolist():
        raise VolvelleError(
            f"predict: box {number} {_listed(boxes[number])} is empty",
            tip="a box is x1, y1, x2, y2 with x1 < x2 and y1 < y2",
        )
    outside = ~((x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height))
    for number in outside.nonzero()[:1, 0].tolist():
        raise VolvelleError(
            f"predict: box {number} {_listed(boxes[number])} leaves the picture of {width} x {height} pixels"
        )


def _listed(box: Tensor) -> str:
    return "(" + ", ".join(f"{value:g}" for value in box.tolist()) + ")"
