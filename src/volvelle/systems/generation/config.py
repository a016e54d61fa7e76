"""Configurations of image codecs, as frozen data without torch.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", section 3.1 and table 7; Rombach et al.
2022, "High-Resolution Image Synthesis with Latent Diffusion Models", table 8.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from volvelle.errors import UsageError, did_you_mean
from volvelle.systems.native_folder import build

KIND = "vqgan"
"""What config.json calls it."""
Codebook = Literal["means", "loss"]
BetaOn = Literal["commitment", "codebook"]


@dataclass(frozen=True)
class VQGANConfig:
    """A convolutional encoder and decoder around a codebook; their letters are those of taming-transformers.

    Pictures of `channels` channels pass levels of `width` times `multipliers` channels, `depth` residual blocks each
    and half as large from one to the next; those numbered in `attention` (0: the pictures' own size) attend after every
    block. The encoder ends in `latent` channels, the codebook has `codes` vectors of `code_width` numbers. `size` is
    the side of the pictures it was trained on; any other multiple of `factor` will do.

    `codebook`: its vectors are running means of what they stand for ("means"), or learn by the loss ("loss"). `beta`
    weighs the commitment, or in files of taming-transformers and diffusers the codebook's term (`beta_on`: "codebook",
    their flag legacy). `decodes` is False where a file holds no decoder.
    """

    name: str = KIND
    channels: int = 3
    size: int = 256
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    depth: int = 2
    attention: tuple[int, ...] = (4,)
    latent: int = 256
    code_width: int = 256
    codes: int = 1024
    codebook: Codebook = "loss"
    beta: float = 0.25
    beta_on: BetaOn = "commitment"
    groups: int = 32
    middle_attention: bool = True
    decodes: bool = True

    def __post_init__(self) -> None:
        counts = (self.channels, self.size, self.width, self.depth, self.latent, self.code_width, self.codes)
        if min(*counts, self.groups, *self.multipliers, 1) < 1 or not self.multipliers:
            raise UsageError(f"{self.name}: all sizes must be at least 1, got {self}")
        if self.size % self.factor:
            raise UsageError(
                f"{self.name}: size must be a multiple of its {self.factor} pixels a code, got {self.size}"
            )
        if self.width % self.groups:
            raise UsageError(f"{self.name}: width {self.width} must be a multiple of the norms' {self.groups} groups")
        if any(not 0 <= level < len(self.multipliers) for level in self.attention):
            raise UsageError(
                f"{self.name}: attention names levels 0 … {len(self.multipliers) - 1}, got {self.attention}"
            )
        if self.codebook not in ("means", "loss") or self.beta_on not in ("commitment", "codebook"):
            raise UsageError(
                f"{self.name}: codebook must be means or loss and beta_on commitment or codebook, "
                f"got {self.codebook} and {self.beta_on}"
            )
        if self.codebook == "means" and self.beta_on == "codebook":
            raise UsageError(f"{self.name}: beta weighs the codebook's loss, which a codebook of means does not have")

    @property
    def factor(self) -> int:
        """Pixels of a code's side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def weights(self) -> tuple[float, float]:
        """(commitment, codebook_weight) of the codebook's loss (volvelle.parts.quantization.vector_quantize)."""
        if self.codebook == "means":
            return self.beta, 0.0
        return (self.beta, 1.0) if self.beta_on == "commitment" else (1.0, self.beta)

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return {"type": KIND, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> VQGANConfig:
        """Undo `to_json`. Raises VolvelleError that names `source` and what does not fit."""
        return build(cls, {name: value for name, value in values.items() if name != "type"}, source)


PRESETS: dict[str, VQGANConfig] = {
    config.name: config
    for config in (
        # Small pictures on a processor: 28 pixels become 7 x 7 codes, 64 become 16 x 16.
        VQGANConfig("small-f4", 1, 28, 32, (1, 2, 2), 1, (), 32, 32, 512, "means", groups=8),
        VQGANConfig("small-f8", 3, 64, 32, (1, 2, 2, 4), 1, (), 64, 64, 1024, "means", groups=8),
        VQGANConfig("vqgan-f16-1024", beta_on="codebook"),
        VQGANConfig("vqgan-f16-16384", codes=16384, beta_on="codebook"),
        VQGANConfig("vq-f4", 3, 256, 128, (1, 2, 4), 2, (), 3, 3, 8192, beta_on="codebook"),
        VQGANConfig("vq-f8", 3, 256, 128, (1, 2, 2, 4), 2, (3,), 4, 4, 16384, beta_on="codebook"),
        VQGANConfig("vq-f16", 3, 256, 128, (1, 1, 2, 2, 4), 2, (4,), 8, 8, 16384, beta_on="codebook"),
        VQGANConfig("chameleon", 3, 512, attention=(), codes=8192, beta_on="codebook"),
    )
}
"""Codecs by name: two of ours for small pictures, those of the two papers, Chameleon's."""


def find_config(name: str, **changes: Any) -> VQGANConfig:
    """The configuration of that name with `changes` to its fields. Raises UsageError with a near name.

    >>> find_config("vq-f8").factor
    8
    """
    if name not in PRESETS:
        raise UsageError(f"{name}: no codec of that name", tip=did_you_mean(name, PRESETS) or ", ".join(PRESETS))
    return replace(PRESETS[name], **changes)
