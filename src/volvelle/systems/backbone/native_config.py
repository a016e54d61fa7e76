"""config.json of backbones: timm's layout with every field of ours beside it, and that of transformers. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from volvelle.data.images_prepare import Preprocessing
from volvelle.errors import VolvelleError
from volvelle.systems.backbone.config import (
    AnyConfig,
    InceptionConfig,
    MobileConfig,
    MobileStage,
    Norm,
    ResNetConfig,
    ShuffleConfig,
)
from volvelle.systems.backbone.imagenet import imagenet_classes
from volvelle.systems.backbone.names import CONFIGS, find_config
from volvelle.systems.backbone.scaling import B0, PUBLISHED, Scaling, from_tensorflow, scale

KINDS: dict[str, type[AnyConfig]] = {
    "mobile": MobileConfig, "resnet": ResNetConfig, "shuffle": ShuffleConfig, "inception": InceptionConfig,
}  # fmt: skip
_NESTED = {"preprocessing": Preprocessing, "norm": Norm}


def to_timm(config: AnyConfig, classes: tuple[str, ...], features: int) -> dict[str, Any]:
    """The content of config.json: what timm's "local-dir:" reads, and under "volvelle" every field."""
    how = config.preprocessing
    kind = next(name for name, cls in KINDS.items() if isinstance(config, cls))
    return {
        "architecture": config.timm or config.name,
        "num_classes": config.classes,
        "num_features": features,
        "label_names": list(classes),
        "pretrained_cfg": {
            "input_size": [3, how.size, how.size],
            "num_classes": config.classes,
            "mean": list(how.mean),
            "std": list(how.std),
            "interpolation": how.interpolation,
            "crop_pct": how.crop,
            "crop_mode": "center",
        },
        "volvelle": {"kind": kind, **dataclasses.asdict(config)},
    }


def from_json(values: Mapping[str, Any], source: str) -> tuple[AnyConfig, tuple[str, ...] | None]:
    """The network and the names of its classes (None: not given) of a config.json, ours, timm's or transformers'.

    Raises VolvelleError that names the field.
    """
    if isinstance(values.get("volvelle"), dict):
        return _native(values["volvelle"], source), _names(values.get("label_names"))
    if values.get("model_type") == "efficientnet":
        return _transformers(values, source)
    if isinstance(values.get("architecture"), str):
        return _timm(values, source)
    raise VolvelleError(f"{source}: neither a config.json of timm nor of a transformers EfficientNet")


def _native(values: Mapping[str, Any], source: str) -> AnyConfig:
    fields = dict(values)
    cls = KINDS.get(fields.pop("kind", ""))
    if cls is None:
        raise VolvelleError(f"{source}: volvelle.kind must be one of {', '.join(KINDS)}")
    try:
        for name, nested in _NESTED.items():
            if name in fields:
                fields[name] = nested(**{key: _tuple(value) for key, value in fields[name].items()})
        if "stages" in fields:
            fields["stages"] = tuple(MobileStage(**stage) for stage in fields["stages"])
        return cls(**{name: _tuple(value) for name, value in fields.items()})
    except (TypeError, ValueError) as error:
        raise VolvelleError(f"{source}: {error}") from error


def _timm(values: Mapping[str, Any], source: str) -> tuple[AnyConfig, tuple[str, ...] | None]:
    config = find_config(values["architecture"].partition(".")[0])
    given = values.get("pretrained_cfg") or {}
    how = config.preprocessing
    how = Preprocessing(
        size=int((given.get("input_size") or [3, how.size])[-1]),
        mean=_tuple(given.get("mean", how.mean)),
        std=_tuple(given.get("std", how.std)),
        interpolation=given.get("interpolation", how.interpolation),
        crop=float(given.get("crop_pct", how.crop)),
    )
    classes = int(values.get("num_classes", given.get("num_classes", config.classes)))
    names = values.get("label_names") or given.get("label_names")
    return replace(config, preprocessing=how, classes=classes), _names(names)


_ACTIVATIONS = {"swish": "silu", "silu": "silu"}


def _transformers(values: Mapping[str, Any], source: str) -> tuple[AnyConfig, tuple[str, ...] | None]:
    fixed = {"depth_divisor": 8, "pooling_type": "mean", "num_channels": 3}
    for name, only in fixed.items():
        if values.get(name, only) != only:
            raise VolvelleError(f"{source}: {name} must be {only!r}, got {values[name]!r}")
    activation = _ACTIVATIONS.get(values.get("hidden_act", "swish"))
    if activation is None:
        raise VolvelleError(f"{source}: hidden_act must be swish, got {values['hidden_act']!r}")
    squeeze = values.get("squeeze_expansion_ratio", 0.25)
    columns = {
        "kernel": "kernel_sizes", "stride": "strides", "expansion": "expand_ratios", "channels": "out_channels",
        "repeats": "num_block_repeats",
    }  # fmt: skip
    usual = {name: [getattr(stage, name) for stage in B0.stages] for name in columns}
    rows = zip(*(values.get(theirs, usual[name]) for name, theirs in columns.items()), strict=True)
    stages = tuple(MobileStage(*map(int, row), squeeze=squeeze) for row in rows)
    size = values.get("image_size", 600)
    scaling = Scaling(
        values.get("width_coefficient", 2.0),
        values.get("depth_coefficient", 3.1),
        size[0] if isinstance(size, list) else size,
        values.get("dropout_rate", 0.5),
    )
    config = from_tensorflow(scale(replace(B0, stages=stages), scaling))
    variant = next((v for v, s in PUBLISHED.items() if (s.width, s.depth) == (scaling.width, scaling.depth)), None)
    if variant is not None:
        config = replace(config, name=f"tf-efficientnet-{variant}", timm=f"tf_efficientnet_{variant}")
    labels = values.get("id2label") or {}
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else None
    if names == tuple(f"LABEL_{i}" for i in range(len(names or ()))):
        names = None
    count = len(labels) or int(values.get("num_labels", 2))
    norm = Norm(float(values.get("batch_norm_eps", 1e-3)), 0.01)
    return replace(config, classes=count, norm=norm, drop_path=float(values.get("drop_connect_rate", 0.2))), names


def to_transformers(config: AnyConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of a transformers config.json. Raises VolvelleError for a network that it cannot describe.

    Channels and repeats are written as they are, with coefficients of 1.
    """
    if not isinstance(config, MobileConfig) or config.padding != "same" or config.stages[0].squeeze != 0.25:
        raise VolvelleError(
            f"{config.name}: transformers has EfficientNets with squeeze and excitation and TensorFlow's padding only",
            tip="a network named tf-efficientnet-… can be written so",
        )
    scaling = next((s for v, s in PUBLISHED.items() if _same(config, v)), None)
    if scaling is None:
        raise VolvelleError(f"{config.name}: channels or repeats are not those of B0 to B7")
    base, size = B0.stages, config.preprocessing.size
    return {
        "architectures": ["EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        "num_channels": 3,
        "image_size": size,
        "width_coefficient": scaling.width,
        "depth_coefficient": scaling.depth,
        "depth_divisor": 8,
        "kernel_sizes": [stage.kernel for stage in base],
        "in_channels": [32, *(stage.channels for stage in base[:-1])],
        "out_channels": [stage.channels for stage in base],
        "depthwise_padding": odd_blocks(config, size),
        "strides": [stage.stride for stage in base],
        "num_block_repeats": [stage.repeats for stage in base],
        "expand_ratios": [stage.expansion for stage in base],
        "squeeze_expansion_ratio": config.stages[0].squeeze,
        "hidden_act": "swish",
        "hidden_dim": config.head,
        "pooling_type": "mean",
        "batch_norm_eps": config.norm.eps,
        "dropout_rate": config.dropout,
        "drop_connect_rate": config.drop_path,
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
    }


def odd_blocks(config: MobileConfig, size: int) -> list[int]:
    """The blocks that halve an odd side of pictures of this size, which transformers wants to be told.

    >>> odd_blocks(B0, 224), odd_blocks(B0, 300)
    ([], [3, 11])
    """
    side, number, found = -(-size // 2), 0, []
    for stage in config.stages:
        if stage.stride > 1 and side % 2:
            found.append(number)
        side, number = -(-side // stage.stride), number + stage.repeats
    return found


def default_names(count: int) -> tuple[str, ...]:
    """Names of classes that nobody named: ImageNet's where there are a thousand, else numbers."""
    return imagenet_classes() if count == 1000 else tuple(str(number) for number in range(count))


def _same(config: MobileConfig, variant: str) -> bool:
    published = CONFIGS[f"efficientnet-{variant}"]
    return isinstance(published, MobileConfig) and (published.stages, published.head) == (config.stages, config.head)


def _names(value: Any) -> tuple[str, ...] | None:
    return tuple(str(name) for name in value) if isinstance(value, list) and value else None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
