"""Boxes and how networks predict them: Girshick et al. 2014, "Rich Feature Hierarchies for Accurate Object Detection
and Semantic Segmentation" (R-CNN), appendix C.

    t_x = (x - x_a) / w_a      t_y = (y - y_a) / h_a      t_w = log(w / w_a)      t_h = log(h / h_a)

for a box with centre (x, y), width w and height h, seen from an anchor (subscript a).

Shapes: boxes (..., 4) as x1 y1 x2 y2 in pixels. Sixteen-bit numbers and integers are taken to fp32 first, and results
are fp32: at 1000 pixels neighbouring bf16 numbers are 4 pixels apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from volvelle.export import export

Form = Literal["xyxy", "xywh", "cxcywh"]
"""Ways to write a box: two corners, a corner and the size, the centre and the size."""
SHORTEST = 1e-6
"""Sides shorter than this count as this long where a box is divided by, or a logarithm taken of it."""


def check_boxes(call: str, **boxes: Tensor) -> None:
    """Raise ValueError unless the last axis of each is x1 y1 x2 y2."""
    for name, value in boxes.items():
        if value.dim() < 1 or value.shape[-1] != 4:
            raise ValueError(f"{call}: {name} must be (..., 4), x1 y1 x2 y2, got shape {tuple(value.shape)}")


def wide(x: Tensor) -> Tensor:
    """fp64 as it is, everything else in fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@export("functional.box_convert")
def box_convert(boxes: Tensor, in_fmt: Form, out_fmt: Form) -> Tensor:
    """Return boxes (..., 4) written another way: x1 y1 x2 y2, or x1 y1 and the size, or the centre and the size.

    The centre of boxes of integers is fp32. Raises ValueError for other shapes and names.

    >>> box_convert(torch.tensor([[10.0, 20, 30, 60]]), "xyxy", "cxcywh")
    tensor([[20., 40., 20., 40.]])
    """
    check_boxes("box_convert", boxes=boxes)
    if not {in_fmt, out_fmt} <= set(get_args(Form)):
        raise ValueError(f"box_convert: in_fmt and out_fmt are {', '.join(get_args(Form))}, got {in_fmt}, {out_fmt}")
    low, high = boxes[..., :2], boxes[..., 2:]
    if in_fmt == out_fmt:
        return boxes.clone()
    if in_fmt == "xywh":
        high = low + high
    elif in_fmt == "cxcywh":
        low, high = low - high / 2, low + high / 2
    if out_fmt == "xywh":
        high = high - low
    elif out_fmt == "cxcywh":
        low, high = (low + high) / 2, high - low
    return torch.cat((low, high), dim=-1)


@export("functional.encode_boxes")
def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Return what a network must predict at `anchors` to give `boxes`: (t_x, t_y, t_w, t_h) times `weights`.

    boxes and anchors (..., 4) that broadcast; the result (..., 4), fp32 or fp64. Boxes and anchors without width or
    height give large but finite numbers; only a NaN gives NaN, in its own row. Girshick et al. 2014, appendix C.

    >>> encode_boxes(torch.tensor([10.0, 10, 30, 50]), torch.tensor([0.0, 0, 20, 40]))
    tensor([0.5000, 0.2500, 0.0000, 0.0000])
    """
    check_boxes("encode_boxes", boxes=boxes, anchors=anchors)
    boxes, anchors = wide(boxes), wide(anchors)
    low, high = anchors[..., :2], anchors[..., 2:]
    size = (high - low).clamp(min=SHORTEST)
    centre = low + 0.5 * (high - low)
    own = (boxes[..., 2:] - boxes[..., :2]).clamp(min=SHORTEST)
    middle = boxes[..., :2] + 0.5 * (boxes[..., 2:] - boxes[..., :2])
    deltas = torch.cat(torch.broadcast_tensors((middle - centre) / size, torch.log(own / size)), dim=-1)
    return deltas * deltas.new_tensor(weights)


@export("functional.decode_boxes")
def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    limit: float = math.log(1000 / 16),
) -> Tensor:
    """Return the boxes that `deltas` mean at `anchors`: the inverse of `encode_boxes`.

    deltas and anchors (..., 4) that broadcast; the result (..., 4), fp32 or fp64. t_w and t_h are cut at `limit`, so
    that a wild prediction gives a box of at most exp(limit) anchors. Girshick et al. 2014, appendix C.

    >>> anchors = torch.tensor([0.0, 0, 20, 40])
    >>> decode_boxes(torch.tensor([0.5, 0.25, 0, 0]), anchors)
    tensor([10., 10., 30., 50.])
    """
    check_boxes("decode_boxes", deltas=deltas, anchors=anchors)
    deltas, anchors = wide(deltas), wide(anchors)
    deltas = deltas / deltas.new_tensor(weights)
    low, high = anchors[..., :2], anchors[..., 2:]
    size = high - low
    middle = deltas[..., :2] * size + (low + 0.5 * size)
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=limit)) * size
    return torch.cat((middle - half, middle + half), dim=-1)


@export("functional.clip_boxes")
def clip_boxes(boxes: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
    """Return the boxes cut at the borders of their image: x into [0, width], y into [0, height].

    boxes (..., 4); `size` is (height, width), or a tensor (..., 2) of them that broadcasts over the boxes, one for each
    image: `clip_boxes(boxes, sizes[:, None])` for (b, n, 4) and (b, 2). The dtype stays, and so do NaNs.

    >>> clip_boxes(torch.tensor([[-5.0, 3, 70, 90]]), (40, 60))
    tensor([[ 0.,  3., 60., 40.]])
    """
    check_boxes("clip_boxes", boxes=boxes)
    if isinstance(size, Tensor):
        if size.dim() < 1 or size.shape[-1] != 2:
            raise ValueError(f"clip_boxes: size must be (..., 2), height and width, got shape {tuple(size.shape)}")
        most = size.to(boxes)[..., [1, 0, 1, 0]]
        return torch.minimum(boxes.clamp(min=0), most)
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), dim=-1).flatten(-2)
