"""`backbone(name)` and folders of backbones: building, reading and writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from volvelle.errors import UsageError, VolvelleError
from volvelle.files import read_json, write_atomic
from volvelle.hub import ASSETS, fetch, resolve
from volvelle.systems.backbone.config import (
    AnyConfig,
    InceptionConfig,
    MobileConfig,
    OutputStride,
    ResNetConfig,
    ShuffleConfig,
)
from volvelle.systems.backbone.files import load_tensors, read_tensors, recognise, to_tensors, write_tensors
from volvelle.systems.backbone.key_maps import FORMATS, TIMM, TRANSFORMERS, Format
from volvelle.systems.backbone.model import Backbone
from volvelle.systems.backbone.names import find_config
from volvelle.systems.backbone.native_config import default_names, from_json, to_timm, to_transformers

IMAGENET = "imagenet"
SAFETENSORS = "model.safetensors"


def backbone(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    output_stride: OutputStride = 32,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Backbone:
    """Build an image classifier by name, in evaluation mode, with random or given weights.

    `weights`: None for random ones, "imagenet" for those that `volvelle get` knows under this name, or a file or folder
    in the format of timm, transformers, efficientnet_pytorch or torchvision, recognised by its names. `classes` gives
    the network other outputs: where the weights have another number of them, the last layer starts afresh. With
    `output_stride` 16 or 8 late stages are dilated in place of strided, for dense use. Raises UsageError for an unknown
    name and VolvelleError for files that do not fit.

    >>> net = backbone("efficientnet-lite0", classes=("cat", "dog"), output_stride=16)
    >>> net.channels, net.strides, net(torch.zeros(1, 3, 64, 64)).shape
    ((24, 40, 112, 320), (4, 8, 16, 16), torch.Size([1, 2]))
    """
    config = find_config(name)
    if weights is None:
        model = build(config, output_stride)
        model.classes = default_names(config.classes)
    else:
        model = _read(config, None, _weights_file(config, weights), output_stride)
    return _finish(model, classes, dtype, device)


def efficientnet(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    output_stride: OutputStride = 32,
) -> Backbone:
    """EfficientNet "b0" to "b7", "lite0" to "lite4", or "tf-b0" to "tf-b7"; arguments as for `backbone`.

    >>> sum(p.numel() for p in efficientnet("b0").parameters())
    5288548
    """
    config = find_config(name.replace("tf-b", "tf-efficientnet-b"))
    if not config.name.removeprefix("tf-").startswith("efficientnet"):
        raise UsageError(f"{name!r} is no EfficientNet", tip="b0 … b7, tf-b0 … tf-b7, lite0 … lite4")
    return backbone(config.name, weights=weights, classes=classes, output_stride=output_stride)


def read_backbone(
    path: str | os.PathLike[str],
    *,
    output_stride: OutputStride = 32,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Backbone:
    """Read a folder with config.json and model.safetensors: ours, timm's, or a transformers EfficientNet.

    Raises VolvelleError for files that are missing, broken or do not fit each other.
    """
    folder = Path(path)
    config, names = from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    return _finish(_read(config, names, _in_folder(folder), output_stride), None, dtype, device)


def write_backbone(model: Backbone, path: str | os.PathLike[str], *, form: Format = TIMM) -> None:
    """Write config.json and model.safetensors; as `timm` reads back with `timm.create_model("local-dir:PATH")`.

    `form` TRANSFORMERS writes what transformers reads; of the other formats, which know no config.json, the names of
    the tensors. Raises VolvelleError where the format has no place for this network.
    """
    folder = Path(path)
    tensors = to_tensors(model, model.config, form)
    values = to_timm(model.config, model.classes, model.last_layer.in_features)
    if form is TRANSFORMERS:
        values = to_transformers(model.config, model.classes)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    write_tensors(tensors, folder / SAFETENSORS)


def build(config: AnyConfig, output_stride: OutputStride = 32) -> Backbone:
    """The network of a configuration, with random weights, in training mode."""
    if isinstance(config, MobileConfig):
        from volvelle.systems.backbone.mobile import MobileNet

        return MobileNet(config, output_stride=output_stride)
    if isinstance(config, ResNetConfig):
        from volvelle.systems.backbone.resnet import ResNet

        return ResNet(config, output_stride=output_stride)
    if isinstance(config, ShuffleConfig):
        from volvelle.systems.backbone.shufflenet import ShuffleNet

        return ShuffleNet(config, output_stride=output_stride)
    from volvelle.systems.backbone.inception import Inception

    assert isinstance(config, InceptionConfig)
    return Inception(config, output_stride=output_stride)


def _read(config: AnyConfig, names: Sequence[str] | None, file: Path, output_stride: OutputStride) -> Backbone:
    """The network of a file: its format says how it was trained, its last layer how many classes it knows."""
    tensors = read_tensors(file)
    form = recognise(tensors)
    config = form.trained(config)
    with torch.device("meta"):
        model = build(config, output_stride)
    count = _class_count(model, form, tensors)
    if count is not None and count != config.classes:
        config = replace(config, classes=count)
        with torch.device("meta"):
            model = build(config, output_stride)
    model.to_empty(device="cpu")
    load_tensors(model, config, tensors, source=str(file))
    if names is not None and len(names) != config.classes:
        raise VolvelleError(f"{file}: {config.classes} outputs, but config.json names {len(names)} classes")
    model.classes = tuple(names) if names else default_names(config.classes)
    return model


def _class_count(model: Backbone, form: Format, tensors: Mapping[str, Tensor]) -> int | None:
    """How many outputs the file's classifier has; None where it has none, which `load_tensors` will say."""
    name = f"{model.classifier_name}.weight"
    key_map = form.key_map(model.config)
    if key_map is None:
        return None
    bindings = key_map.bind({name: tuple(model.last_layer.weight.shape)})
    found = next((tensors[b.theirs] for b in bindings if b.theirs in tensors), None)
    return found.shape[0] if found is not None and found.ndim == 2 else None


def _finish(
    model: Backbone, classes: Sequence[str] | None, dtype: torch.dtype | None, device: torch.device | str | None
) -> Backbone:
    if classes is not None and tuple(classes) != model.classes:
        if len(classes) == model.config.classes and model.classes == default_names(len(classes)):
            model.classes = tuple(classes)
        else:
            model.reset_classifier(classes)
    return model.to(device=device, dtype=dtype).eval()


def _weights_file(config: AnyConfig, weights: str | os.PathLike[str]) -> Path:
    if weights == IMAGENET:
        if config.name not in ASSETS:
            known = [name for name, asset in ASSETS.items() if asset.kind == "image backbone"]
            raise UsageError(
                f"weights=imagenet: none known for {config.name}, only for {', '.join(known)}",
                tip="weights=FILE reads those of timm, transformers, torchvision and efficientnet_pytorch",
            )
        return fetch(config.name)
    path = resolve(weights)
    return _in_folder(path) if path.is_dir() else path


def _in_folder(folder: Path) -> Path:
    if not (folder / SAFETENSORS).is_file():
        others = sorted(
            file.name for file in folder.glob("*") if file.suffix in {".pth", ".pt", ".bin", ".safetensors"}
        )
        raise VolvelleError(
            f"{folder}: holds no {SAFETENSORS}", tip=f"name the file: {folder / others[0]}" if others else None
        )
    return folder / SAFETENSORS


def format_named(name: str) -> Format:
    """The format of that name; UsageError for any other."""
    for form in FORMATS:
        if form.name == name:
            return form
    raise UsageError(f"{name!r} is not a format of backbones", tip=f"one of {', '.join(f.name for f in FORMATS)}")
