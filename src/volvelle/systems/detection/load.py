"""Building, reading and writing detectors: config.json and model.safetensors in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from volvelle.errors import VolvelleError
from volvelle.systems.backbone.load import backbone as load_backbone
from volvelle.systems.detection.compositions import compose, output_stride
from volvelle.systems.detection.config import DetectorConfig
from volvelle.systems.detection.deforming import deformify
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.names import named
from volvelle.systems.native_folder import is_model, load_model, write_model


def detector(
    config: DetectorConfig | str,
    classes: int | Sequence[str] | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
) -> Detector:
    """Build a detector with a fresh head, in training mode, of a configuration or a name ("rfcn-resnet-50").

    `classes` are the names of a named detector's classes, or how many (80 when left out). `weights` are the backbone's:
    "imagenet" for known ones, a file or folder, None for random ones; see `volvelle.systems.backbone.backbone`. Or they
    are a detector's, whose folder is given: then all is carried over that both have, whatever the classes and anchors
    (`carry_over`). Raises VolvelleError for files that do not fit.
    """
    if isinstance(config, str):
        config = named(config, 80 if classes is None else classes)
    if weights is not None and is_detector(weights):
        source = read_detector(weights)
        # Deformable convolutions hold the plain ones that they were made of: what begins plain is deformed last.
        plain = source.config.deformable == 0
        model = compose(config) if plain else blank_detector(config)
        carry_over(source, model)
        return (_made(config, model) if plain else model).train()
    encoder = load_backbone(config.backbone, weights=weights, output_stride=output_stride(config.composition))
    return _made(config, compose(config, encoder)).train()


def thundernet(
    name: str = "snet49",
    classes: int | Sequence[str] = 80,
    *,
    weights: str | os.PathLike[str] | None = None,
) -> Detector:
    """ThunderNet (Qin et al. 2019) on the backbone `name`: snet49, snet146, snet535, or any other.

    >>> sum(p.numel() for p in thundernet("snet49").parameters())
    1147774
    """
    return detector(f"thundernet-{name}", classes, weights=weights)


def rfcn(
    classes: int | Sequence[str] = 20,
    *,
    backbone: str = "resnet-101",
    weights: str | os.PathLike[str] | None = None,
) -> Detector:
    """R-FCN (Dai et al. 2016) on a ResNet, or any other backbone, whose last stage is dilated.

    >>> net = rfcn(("cat", "dog"), backbone="resnet-18")
    >>> net.backbone.strides, net.roi_head.scorer.classes.out_channels
    ((4, 8, 16, 16), 147)
    """
    return detector(f"rfcn-{backbone}", classes, weights=weights)


def write_detector(model: Detector, path: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors into a folder."""
    write_model(model, model.config.to_json(), path)


def is_detector(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `write_detector` wrote."""
    return is_model(path, "detector")


def read_detector(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Detector:
    """Read a folder of `write_detector`, in evaluation mode. Raises VolvelleError for files that do not fit."""
    made = load_model(path, "detector", lambda values, source: blank_detector(DetectorConfig.from_json(values, source)))
    return made.eval().to(device or "cpu")


def carry_over(source: Detector, model: Detector) -> list[str]:
    """Give `model` the weights that `source` has under the same name and shape; return the names that keep their own.

    What speaks of classes or anchors keeps its own weights unless these are the same in both: the numbers of a class,
    and what a shape's boxes should be moved by, mean nothing for another. Raises VolvelleError for unlike backbones.

    >>> cells, letters = thundernet("snet49", ("cell",)), thundernet("snet49", ("a", "b"))
    >>> carry_over(cells, letters)
    ['roi_head.scorer.classes.weight', 'roi_head.scorer.classes.bias']
    """
    ours, theirs = model.config, source.config
    if ours.backbone != theirs.backbone:
        raise VolvelleError(
            f"weights of a detector on {theirs.backbone} cannot begin one on {ours.backbone}",
            tip=f"choose a model on {theirs.backbone}",
        )
    own = [
        prefix
        for prefix, same in (
            ("roi_head.scorer.classes.", ours.classes == theirs.classes),
            ("proposer.objectness.", ours.rpn.anchors == theirs.rpn.anchors),
            ("proposer.deltas.", ours.rpn.anchors == theirs.rpn.anchors),
        )
        if not same
    ]
    given, kept = source.state_dict(), list[str]()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith(tuple(own)) or name not in given or given[name].shape != value.shape:
                kept.append(name)
            else:
                value.copy_(given[name])
    return kept


def blank_detector(config: DetectorConfig) -> Detector:
    """A detector of a configuration, backbone and all with random weights: also of tensors that are not real."""
    return _made(config, compose(config))


def _made(config: DetectorConfig, model: Detector) -> Detector:
    """With as many deformable convolutions as the configuration says."""
    return deformify(model, config.deformable) if config.deformable else model
