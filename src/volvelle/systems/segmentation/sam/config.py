"""Configurations of Segment Anything, as frozen data without torch: an image encoder and a mask decoder.

Kirillov et al. 2023, "Segment Anything", section 3 and appendix A.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.systems.native_folder import build

STRIDE = 16
"""Pixels of the input to one place of the embedding."""
KIND = "sam"
"""What config.json calls it."""


@dataclass(frozen=True)
class ViT:
    """The paper's image encoder: a plain vision transformer (Li et al. 2022, "Exploring Plain Vision Transformer").

    Blocks attend inside windows of `window` x `window` patches, those numbered in `everywhere` over the whole picture.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    everywhere: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    mlp: int = 3072
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UsageError(f"ViT: the width {self.width} must be a multiple of the {self.heads} heads")


@dataclass(frozen=True)
class Light:
    """A convolutional image encoder: a backbone by name whose maps of stride 8, 16 and 32 are summed at stride 16.

    With `fine` it also gives maps of stride 8 and 4 for the mask decoder.
    """

    backbone: str = "efficientnet-lite0"
    fine: bool = False


Encoder = ViT | Light
ENCODERS: dict[str, type[Encoder]] = {"vit": ViT, "light": Light}
"""What config.json calls them."""


@dataclass(frozen=True)
class Decoder:
    """The two-way mask decoder (appendix A): `masks` for an ambiguous prompt, besides the one for a clear prompt.

    `eps` belongs to the norms of the two-way blocks: Meta's code trains with 1e-5, transformers computes with 1e-6.
    """

    depth: int = 2
    heads: int = 8
    mlp: int = 2048
    downsample: int = 2
    masks: int = 3
    iou_depth: int = 3
    iou_width: int = 256
    eps: float = 1e-5


@dataclass(frozen=True)
class SamConfig:
    """Pictures of `size` x `size` pixels become an embedding of `width` channels at stride 16.

    `mean` and `std` are those of the pixels in [0, 1]. A mask as a prompt passes `mask_channels` channels.
    """

    name: str
    encoder: Encoder
    size: int = 1024
    width: int = 256
    decoder: Decoder = field(default_factory=Decoder)
    mask_channels: int = 16
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.size < STRIDE or self.size % STRIDE:
            raise UsageError(f"sam: size must be a multiple of {STRIDE}, got {self.size}")
        if self.width % (2 * self.decoder.heads * self.decoder.downsample) or self.width % 8:
            raise UsageError(f"sam: width {self.width} does not divide among {self.decoder.heads} heads")

    @property
    def grid(self) -> int:
        """Places of the embedding along a side."""
        return self.size // STRIDE

    @property
    def fine(self) -> tuple[tuple[int, int, int], ...]:
        """Channels and sides of the encoder's finer maps, as the mask decoder grows: of stride 8 and 4, or none."""
        if not isinstance(self.encoder, Light) or not self.encoder.fine:
            return ()
        return (self.width // 4, 2 * self.grid, 2 * self.grid), (self.width // 8, 4 * self.grid, 4 * self.grid)

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        kind = next(name for name, encoder in ENCODERS.items() if type(self.encoder) is encoder)
        return {"type": KIND, **asdict(self), "encoder": {"type": kind, **asdict(self.encoder)}}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> SamConfig:
        """Undo `to_json`. Raises VolvelleError that names `source` and what does not fit."""
        given = dict(values)
        parts = isinstance(given.get("encoder"), dict) and isinstance(given.get("decoder"), dict)
        if given.pop("type", None) != KIND or not parts:
            raise VolvelleError(f"{source}: not the configuration of a {KIND}")
        encoder = dict(given.pop("encoder"))
        kind = encoder.pop("type", None)
        if kind not in ENCODERS:
            raise VolvelleError(f"{source}: unknown encoder {kind!r}", tip=did_you_mean(str(kind), ENCODERS))
        given["decoder"] = build(Decoder, given["decoder"], source)
        return build(cls, {**given, "encoder": build(ENCODERS[kind], encoder, source)}, source)


def vit_b(size: int = 1024) -> SamConfig:
    """SAM ViT-B: 93.7 M parameters."""
    return SamConfig("vit_b", ViT(), size)


def vit_l(size: int = 1024) -> SamConfig:
    """SAM ViT-L: 312 M parameters."""
    return SamConfig("vit_l", ViT(1024, 24, 16, (5, 11, 17, 23), mlp=4096), size)


def vit_h(size: int = 1024) -> SamConfig:
    """SAM ViT-H, the paper's: 641 M parameters."""
    return SamConfig("vit_h", ViT(1280, 32, 16, (7, 15, 23, 31), mlp=5120), size)


def lite0(size: int = 512) -> SamConfig:
    """SAM with EfficientNet-Lite0 as its image encoder, whose pixels are normalised as its ImageNet weights want."""
    half = (0.5, 0.5, 0.5)
    return SamConfig("lite0", Light(), size, mean=half, std=half)


def lite0_fine(size: int = 512) -> SamConfig:
    """The same with maps of stride 8 and 4 for the mask decoder: an experiment, see docs/sam.md."""
    return replace(lite0(size), name="lite0_fine", encoder=Light(fine=True))


PRESETS = {"vit_b": vit_b, "vit_l": vit_l, "vit_h": vit_h, "lite0": lite0, "lite0_fine": lite0_fine}
"""Name -> configuration for a size of input."""


def find_config(name: str, size: int | None = None) -> SamConfig:
    """The configuration of that name ("vit-b" is read as "vit_b"); UsageError with close names for any other.

    >>> find_config("vit-l", 512).grid
    32
    """
    preset = PRESETS.get(name.replace("-", "_").removeprefix("sam_"))
    if preset is None:
        raise UsageError(
            f"{name!r} is not a Segment Anything model",
            tip=did_you_mean(name, PRESETS) or f"known: {', '.join(PRESETS)}",
        )
    return preset() if size is None else preset(size)
