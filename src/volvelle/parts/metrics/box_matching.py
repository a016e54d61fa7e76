"""Which detection finds which object: the greedy assignments of VOC and of COCO, for many pictures at once.

Both go through the detections of one class in one picture from the surest down.

- VOC (Everingham et al. 2010, section 4.2): a detection belongs to the object that it overlaps most. It is a hit when
  the overlap reaches the threshold and nobody has found that object before, ignored when the object is difficult, and
  a false alarm otherwise.
- COCO (Lin et al. 2014; pycocotools' COCOeval): a detection takes, of the objects that nobody has taken, the one that
  it overlaps most, if the overlap reaches the threshold; ignored objects only where no other will do. A crowd can be
  taken any number of times, and its overlap is measured over the detection alone.

A cell is one class in one picture. Cells are padded to a common number of detections and of objects, so that one step
of the greedy walk is a few tensor operations for all of them.

Shapes: c cells, d detections, g objects, a ranges of area, t thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1 << 16
"""The most pairs of a detection and an object in one block of cells."""


class Picture(NamedTuple):
    """What was found in one picture and what is there, on the CPU; boxes, scores and areas are fp64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    objects: Tensor
    classes: Tensor
    ignored: Tensor
    areas: Tensor


class Cells(NamedTuple):
    """Detections (c, d, 4), surest first, and objects (c, g, 4) with their areas.

    `mask` (c, d) and `there` (c, g) say which of them are none but padding, `ignored` (c, g) which objects are ignored.
    """

    boxes: Tensor
    mask: Tensor
    objects: Tensor
    there: Tensor
    ignored: Tensor
    areas: Tensor


class Matched(NamedTuple):
    """The n detections of all pictures by picture, class and falling score, and what became of them.

    `labels` are numbers of classes, `ranks` the place within a cell; hits and ignored are (…, n).
    """

    labels: Tensor
    scores: Tensor
    ranks: Tensor
    hits: Tensor
    ignored: Tensor


class Detections(NamedTuple):
    """The detections of all pictures, sorted by cell (picture · k + number of the class) and falling score."""

    cells: Tensor
    labels: Tensor
    scores: Tensor
    ranks: Tensor
    boxes: Tensor


Rule = Callable[[Cells], tuple[Tensor, Tensor]]


def matched(
    pictures: Sequence[Picture], classes: Tensor, rule: Rule, *, shape: tuple[int, ...] = (), limit: int | None = None
) -> Matched:
    """Apply `rule` (cells -> hits and ignored, (c, *shape, d)) to every cell, at most `limit` detections in each.

    `classes` (k,) are the labels that occur, in order.
    """
    found = _detections(pictures, classes, limit)
    hits, ignored = (torch.zeros(*shape, len(found.scores), dtype=torch.bool) for _ in range(2))
    for rows, cells in _blocks(pictures, classes, found):
        use = rows >= 0
        for flags, flags_of_all in zip(rule(cells), (hits, ignored), strict=True):
            flags_of_all[..., rows[use]] = flags.movedim(-1, 1)[use].movedim(0, -1)
    return Matched(found.labels, found.scores, found.ranks, hits, ignored)


def overlaps(boxes: Tensor, objects: Tensor, crowd: Tensor) -> Tensor:
    """IoU (c, d, g); with a crowd, the share of the detection that lies in it. 0 for boxes without area."""
    low = torch.maximum(boxes[:, :, None, :2], objects[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], objects[:, None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    own, theirs = area(boxes)[:, :, None], area(objects)[:, None]
    union = torch.where(crowd[:, None], own.expand_as(inside), own + theirs - inside)
    return torch.where(union > 0, inside / union, 0.0)


def area(boxes: Tensor) -> Tensor:
    """Areas (…) of boxes (…, 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def match_voc(cells: Cells, threshold: float) -> tuple[Tensor, Tensor]:
    """(hits, ignored), each (c, d), by VOC's rule. Of equal overlaps the first object's counts."""
    iou = overlaps(cells.boxes, cells.objects, torch.zeros_like(cells.there))
    iou = torch.where(cells.there[:, None], iou, -1.0)
    best, which = iou.max(-1)
    near = (best >= threshold) & cells.mask
    difficult = cells.ignored.gather(1, which)
    # Who is first at an object: nobody before has come near the same one.
    same = (which[:, :, None] == which[:, None]) & near[:, None] & ~difficult[:, None]
    earlier = same.tril(-1).any(-1)
    return near & ~difficult & ~earlier, near & difficult


def match_coco(cells: Cells, thresholds: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """(hits, ignored), each (c, a, t, d), by COCO's rule, at `thresholds` (t,) and in `ranges` (a, 2) of areas.

    Within a range of areas the objects outside are ignored, and so are detections outside that found nothing. Of equal
    overlaps the last object's counts, as in pycocotools.
    """
    # The last of equals counts, and argmax gives the first.
    objects, there, crowd, areas = (x.flip(1) for x in (cells.objects, cells.there, cells.ignored, cells.areas))
    iou = overlaps(cells.boxes, objects, crowd)
    passed = (iou[..., None, :] >= thresholds.clamp(max=1 - 1e-10)[:, None]) & there[:, None, None]  # (c, d, t, g)
    set_aside = crowd[:, None] | _outside(areas, ranges)  # (c, a, g)
    own = _outside(area(cells.boxes), ranges)  # (c, a, d)
    c, d, t, g = passed.shape
    taken = torch.zeros(c, len(ranges), t, g, dtype=torch.bool, device=iou.device)
    hits = torch.zeros(c, len(ranges), t, d, dtype=torch.bool, device=iou.device)
    ignored = torch.zeros_like(hits)
    for i in range(d):
        free = passed[:, i, None] & (~taken | crowd[:, None, None]) & cells.mask[:, i, None, None, None]
        wanted = free & ~set_aside[:, :, None]
        free = torch.where(wanted.any(-1, keepdim=True), wanted, free)
        found = free.any(-1)
        which = torch.where(free, iou[:, i, None, None], -1.0).argmax(-1, keepdim=True)
        taken |= torch.zeros_like(taken).scatter_(-1, which, found[..., None])
        aside = set_aside[:, :, None].expand_as(free).gather(-1, which)[..., 0]
        hits[..., i] = found
        ignored[..., i] = torch.where(found, aside, own[:, :, None, i])
    return hits, ignored


def _outside(areas: Tensor, ranges: Tensor) -> Tensor:
    """(c, a, k): which areas (c, k) lie outside each range."""
    return (areas[:, None] < ranges[:, :1]) | (areas[:, None] > ranges[:, 1:])


def _joined(pictures: Sequence[Picture], field: int) -> Tensor:
    """One field of all pictures in a row."""
    return torch.cat([picture[field] for picture in pictures]) if pictures else torch.zeros(0, dtype=torch.float64)


def _cells(pictures: Sequence[Picture], classes: Tensor, field: int) -> Tensor:
    """The cell of each entry of a field of labels."""
    counts = torch.tensor([len(picture[field]) for picture in pictures], dtype=torch.int64)
    image = torch.arange(len(pictures)).repeat_interleave(counts)
    return image * len(classes) + torch.searchsorted(classes, _joined(pictures, field).long())


def _detections(pictures: Sequence[Picture], classes: Tensor, limit: int | None) -> Detections:
    """All detections, the surest first within a cell, equal scores in the order given."""
    boxes, scores, cells = _joined(pictures, 0), _joined(pictures, 1), _cells(pictures, classes, 2)
    order = scores.argsort(descending=True, stable=True)
    order = order[cells[order].argsort(stable=True)]
    cells = cells[order]
    ranks = torch.arange(len(cells)) - torch.searchsorted(cells, cells)
    if limit is not None:
        order, cells, ranks = (x[ranks < limit] for x in (order, cells, ranks))
    return Detections(cells, cells % max(1, len(classes)), scores[order], ranks, boxes.reshape(-1, 4)[order])


def _blocks(pictures: Sequence[Picture], classes: Tensor, found: Detections) -> Iterator[tuple[Tensor, Cells]]:
    """Cells with detections in padded blocks of similar ones, and the detections' numbers (c, d), -1 where padded."""
    cells = _cells(pictures, classes, 4)
    order = cells.argsort(stable=True)
    cells = cells[order]
    # One row more, the last, which -1 takes for a place without an object.
    objects = F.pad(_joined(pictures, 3).reshape(-1, 4)[order], (0, 0, 0, 1))
    ignored, areas = (F.pad(_joined(pictures, field)[order], (0, 1)) for field in (5, 6))
    own = found.cells.unique()
    spans = [(torch.searchsorted(x, own), torch.searchsorted(x, own, right=True)) for x in (found.cells, cells)]
    (first, end), (first_object, end_object) = spans
    many, there = end - first, end_object - first_object
    by_size = (many * (int(there.max()) + 1) + there).argsort() if len(own) else own
    for block in _chunks(by_size.tolist(), many.tolist(), there.tolist()):
        rows = _spread(first[block], many[block])
        theirs = _spread(first_object[block], there[block])
        yield rows, Cells(found.boxes[rows], rows >= 0, objects[theirs], theirs >= 0, ignored[theirs], areas[theirs])


def _chunks(order: Sequence[int], many: Sequence[int], there: Sequence[int]) -> Iterator[list[int]]:
    """Runs of `order` whose padded pairs of detections and objects stay within BLOCK."""
    block, d, g = list[int](), 0, 1
    for cell in order:
        d, g = max(d, many[cell]), max(g, there[cell])
        if block and (len(block) + 1) * d * g > BLOCK:
            yield block
            block, d, g = [], many[cell], max(1, there[cell])
        block.append(cell)
    if block:
        yield block


def _spread(first: Tensor, count: Tensor) -> Tensor:
    """Numbers (c, most) from each `first` on, `count` of them, then -1; one column at least."""
    steps = torch.arange(max(1, int(count.max())))
    return torch.where(steps < count[:, None], first[:, None] + steps, -1)
