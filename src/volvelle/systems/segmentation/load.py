"""Building, reading and writing segmenters: config.json and model.safetensors in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from volvelle.systems.backbone.config import OutputStride
from volvelle.systems.backbone.load import backbone as load_backbone
from volvelle.systems.native_folder import is_model, load_model, write_model
from volvelle.systems.segmentation.config import GCN, Head, SegmenterConfig
from volvelle.systems.segmentation.model import Segmenter


def segmenter(
    head: Head,
    classes: int | Sequence[str],
    *,
    backbone: str = "efficientnet-lite0",
    weights: str | os.PathLike[str] | None = None,
    output_stride: OutputStride = 32,
    colours: Sequence[tuple[int, int, int]] = (),
) -> Segmenter:
    """Build a segmenter with a fresh decoder, in training mode.

    `head` is a decoder's configuration; `classes` their names, or how many; `backbone` and `weights` are those of
    `volvelle.systems.backbone.backbone` ("imagenet" for known weights, None for random ones).
    """
    names = tuple(f"class {i}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)
    encoder = load_backbone(backbone, weights=weights, output_stride=output_stride)
    config = SegmenterConfig(encoder.config.name, head, names, tuple(colours), output_stride)
    return Segmenter(config, encoder).train()


def gcn(
    classes: int | Sequence[str] = 21,
    *,
    backbone: str = "efficientnet-lite0",
    weights: str | os.PathLike[str] | None = None,
    kernel: int = 7,
    width: int | None = None,
    refine: bool = True,
    detail: int = 0,
) -> Segmenter:
    """A global convolutional network (Peng et al. 2017) on any backbone, with any kernel k; see `config.GCN`.

    >>> net = gcn(("sky", "road"), kernel=5).eval()
    >>> net(torch.zeros(1, 3, 33, 64)).shape
    torch.Size([1, 2, 33, 64])
    """
    head = GCN(kernel=kernel, width=width, refine=refine, detail=detail)
    return segmenter(head, classes, backbone=backbone, weights=weights)


def write_segmenter(model: Segmenter, path: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors into a folder."""
    write_model(model, model.config.to_json(), path)


def is_segmenter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `write_segmenter` wrote."""
    return is_model(path, "segmenter")


def read_segmenter(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Segmenter:
    """Read a folder of `write_segmenter`, in evaluation mode. Raises VolvelleError for files that do not fit."""
    model = load_model(path, "segmenter", lambda values, source: Segmenter(SegmenterConfig.from_json(values, source)))
    return model.eval().to(device or "cpu")
