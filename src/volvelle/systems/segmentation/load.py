"""Building, reading and writing segmenters: config.json and model.safetensors in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, write_atomic
from volvelle.systems.backbone.config import OutputStride
from volvelle.systems.backbone.load import backbone as load_backbone
from volvelle.systems.segmentation.config import GCN, Head, SegmenterConfig
from volvelle.systems.segmentation.model import Segmenter

SAFETENSORS = "model.safetensors"


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
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(folder / SAFETENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_atomic(folder / "config.json", json.dumps(model.config.to_json(), indent=2, ensure_ascii=False) + "\n")


def is_segmenter(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `write_segmenter` wrote."""
    try:
        values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("type") == "segmenter"


def read_segmenter(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Segmenter:
    """Read a folder of `write_segmenter`, in evaluation mode. Raises VolvelleError for files that do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    source = folder / "config.json"
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
        tensors = load_file(folder / SAFETENSORS)
    except FileNotFoundError as error:
        raise VolvelleError(f"{error.filename or folder / SAFETENSORS}: no such file") from error
    except (ValueError, SafetensorError) as error:
        raise VolvelleError(f"{folder}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise VolvelleError(f"{source}: not the configuration of a segmenter")
    model = Segmenter(SegmenterConfig.from_json(values, str(source)))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise VolvelleError(f"{folder / SAFETENSORS}: does not fit {source} ({error})") from error
    return model.eval().to(device or "cpu")
