"""RoIAlign keeps where things lie; RoI pooling rounds it to whole cells of the map, sixteen pixels of the picture."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="RoIAlign: regions without rounding",
    family="detection",
    paper=Paper(
        "He et al.",
        2017,
        "Mask R-CNN",
        "section 3, RoIAlign",
        "https://arxiv.org/abs/1703.06870",
    ),
    sentence="these quantizations introduce misalignments between the RoI and the extracted features; while this may "
    "not impact classification, it has a large negative effect on predicting pixel-accurate masks; RoIAlign removes "
    "the harsh quantization of RoIPool, properly aligning the extracted features with the input",
    measured_by="maps that hold their own coordinates, fp64: what 7 x 7 bins of random boxes read beside where they "
    "lie, and how what they read follows a box that moves by less than a cell; the place of a blob inside its box, by "
    "a linear map of the 49 features (least squares on half of the boxes, error on the others); torchvision",
    summary="Reads each bin of a region by interpolation where it lies: features move with the box by fractions of a "
    "cell.",
    summary_zh="在每个子区域的真实位置上插值读取特征，框移动不足一格时特征也随之移动，不做取整。",
    seconds={"quick": 20, "full": 60},
    parts=("functional.roi_align", "nn.RoIAlign", "functional.roi_pool"),
)

SIDE, BINS, STRIDE = 32, 7, 16
"""Cells a side of the map, bins a side of a region, pixels of the picture a cell."""


def measure(budget: Budget) -> Measurement:
    """400 boxes (full: 4000)."""
    import torch

    count = 400 if budget == "quick" else 4000
    draw = torch.Generator().manual_seed(0)
    boxes = random_boxes(count, draw)
    peers = _peers(boxes)
    findings = [*_places(boxes), *_movements(boxes, draw), *_blobs(count, draw), *peers]
    versions = {}
    if peers:
        from importlib import metadata

        versions["torchvision"] = metadata.version("torchvision")
    setting = {"boxes": count, "cells": SIDE, "bins": BINS, "samples a bin": 4, "dtype": "fp64", "seed": 0}
    notes = [] if peers else ["torchvision is not installed here, or does not load: not compared"]
    return Measurement(findings, peers=versions, setting=setting, notes=notes)


def random_boxes(count: int, draw) -> Tensor:
    """Boxes (k, 4) of 6 to 16 cells a side that keep two cells from the border."""
    import torch

    sizes = 6 + 10 * torch.rand(count, 2, generator=draw, dtype=torch.float64)
    corners = 2 + (SIDE - 4 - sizes) * torch.rand(count, 2, generator=draw, dtype=torch.float64)
    return torch.cat((corners, corners + sizes), 1)


def own_coordinates() -> Tensor:
    """A map (1, 2, y, x) whose cells hold x and y of their middles."""
    import torch

    middles = torch.arange(SIDE, dtype=torch.float64) + 0.5
    return torch.stack((middles.expand(SIDE, SIDE), middles[:, None].expand(SIDE, SIDE)))[None]


def aligned(maps: Tensor, boxes: Tensor | list[Tensor], *, half: bool = True) -> Tensor:
    """RoIAlign with four samples a bin; `half` as in Detectron2, without it as first released."""
    from volvelle.parts.regions import roi_align

    return roi_align.roi_align(maps, boxes, BINS, sampling_ratio=2, aligned=half)


def pooled(maps: Tensor, boxes: Tensor | list[Tensor]) -> Tensor:
    """RoI pooling."""
    from volvelle.parts.regions import roi_pool

    return roi_pool.roi_pool(maps, boxes, BINS)


def _places(boxes: Tensor) -> list[Finding]:
    """What is read on a map of coordinates, beside the middles of the bins."""
    import torch

    steps = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    low, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    wanted = low[:, :, None] + size[:, :, None] * steps  # (k, 2, bins)
    at_x, at_y = wanted[:, 0, None, :].expand(-1, BINS, -1), wanted[:, 1, :, None].expand(-1, -1, BINS)
    wanted = torch.stack((at_x, at_y), 1)
    found = aligned(own_coordinates(), [boxes])
    released = aligned(own_coordinates(), [boxes], half=False)
    return [
        at_most("RoIAlign: largest distance from a bin's middle", float((found - wanted).abs().max()), 1e-9, "cells"),
        Finding("the same as first released (aligned=False)", float((released - wanted).abs().max()), "cells"),
    ]


def _movements(boxes: Tensor, draw) -> list[Finding]:
    """How what is read follows boxes that move by up to a cell."""
    import torch

    by = torch.rand(len(boxes), 2, generator=draw, dtype=torch.float64)
    errors = {}
    for name, read in (("RoIAlign", aligned), ("RoI pooling", pooled)):
        seen = read(own_coordinates(), [boxes + by.repeat(1, 2)]) - read(own_coordinates(), [boxes])
        errors[name] = (seen - by[:, :, None, None]).abs()
    worst, mean = float(errors["RoI pooling"].max()), float(errors["RoI pooling"].mean())
    return [
        at_most(
            "RoIAlign: largest error of a movement of up to a cell", float(errors["RoIAlign"].max()), 1e-9, "cells"
        ),
        at_least("RoI pooling: mean error of the same", mean, 0.2, "cells"),
        Finding("RoI pooling: largest", worst, "cells"),
        Finding("RoI pooling: mean, in pixels of the picture at stride 16", STRIDE * mean, "pixels"),
    ]


def _blobs(count: int, draw) -> list[Finding]:
    """Where a blob lies in its box, by a linear map of the features."""
    import torch

    middles = torch.arange(SIDE, dtype=torch.float64) + 0.5
    centres = SIDE / 2 + 4 * (torch.rand(count, 2, generator=draw, dtype=torch.float64) - 0.5)
    away = 4 * (torch.rand(count, 2, generator=draw, dtype=torch.float64) - 0.5)
    over = torch.exp(-((middles - centres[:, :, None]) ** 2) / 8)  # (k, 2, cells), two cells wide
    maps = (over[:, 1, :, None] * over[:, 0, None, :])[:, None]
    boxes = torch.cat((centres + away - 6, centres + away + 6), 1)
    rois = torch.cat((torch.arange(count, dtype=torch.float64)[:, None], boxes), 1)
    half, errors = count // 2, {}
    for name, read in (("RoIAlign", aligned), ("RoI pooling", pooled)):
        features = torch.nn.functional.pad(read(maps, rois).flatten(1), (0, 1), value=1.0)
        weights = torch.linalg.lstsq(features[:half], away[:half]).solution
        errors[name] = float((features[half:] @ weights - away[half:]).square().mean().sqrt())
    return [
        *(Finding(f"{name}: error of a blob's place in its box", error, "cells") for name, error in errors.items()),
        at_most("of RoIAlign over RoI pooling", errors["RoIAlign"] / errors["RoI pooling"], 0.5, "x"),
    ]


def _peers(boxes: Tensor) -> list[Finding]:
    """The operators of torchvision on the same map, where they load."""
    if find_spec("torchvision") is None:
        return []
    try:
        ops = importlib.import_module("torchvision.ops")
        theirs = ops.roi_align(own_coordinates(), [boxes], BINS, sampling_ratio=2, aligned=True)
        pool = ops.roi_pool(own_coordinates(), [boxes], BINS)
    except (ImportError, RuntimeError):  # built for another torch
        return []
    apart = float((aligned(own_coordinates(), [boxes]) - theirs).abs().max())
    return [
        at_most("RoIAlign: difference from torchvision", apart, 1e-12),
        at_most("RoI pooling: the same", float((pooled(own_coordinates(), [boxes]) - pool).abs().max()), 1e-12),
    ]
