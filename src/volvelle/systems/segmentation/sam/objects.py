"""One mask for each object that is asked for, as run lengths with what the model thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from volvelle.data.coco_masks import MaskedObject
from volvelle.systems.segmentation.sam.embedding import Embedding
from volvelle.systems.segmentation.sam.promptable import Promptable
from volvelle.systems.segmentation.sam.prompts import prepare
from volvelle.systems.segmentation.sam.upsample import Upsampler


@torch.no_grad()
def objects_at(
    promptable: Promptable,
    embedding: Embedding,
    points: Sequence[Sequence[Sequence[float]]] = (),
    labels: Sequence[Sequence[int]] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> list[MaskedObject]:
    """Of each object its points x, y with labels (1 on it, 0 beside it), or its box x1, y1, x2, y2, or both.

    Where some object has a single point only, which may mean a thing, a part of it, or several, three masks are made
    and the one is taken that the model ranks first. Raises VolvelleError as `Promptable.predict` does.
    """
    ambiguous = not boxes and any(len(one) == 1 for one in points)
    prompts = prepare(embedding, points or None, labels or None, boxes or None, None)  # pyright: ignore  # lists
    logits, iou = promptable.decode(embedding, prompts, multimask=ambiguous)
    best = iou.argmax(1)
    rows = torch.arange(len(best), device=best.device)
    height, width = embedding.original
    way = Upsampler(
        logits.shape[-1],
        embedding.size,
        embedding.scaled,
        (0, 0, width, height),
        embedding.original,
        device=logits.device,
    )
    objects = []
    for (number, stability, mask), sure in zip(way.masks(logits[rows, best]), iou[rows, best].tolist(), strict=True):
        facts: dict[str, Any] = {
            "predicted_iou": sure,
            "stability_score": None if stability != stability else stability,
        }
        if points:
            facts |= {"point_coords": points[number], "point_labels": labels[number]}
        if boxes:
            x1, y1, x2, y2 = boxes[number]
            facts["asked_box"] = [x1, y1, x2 - x1, y2 - y1]
        objects.append(MaskedObject(mask, facts=facts))
    return objects
