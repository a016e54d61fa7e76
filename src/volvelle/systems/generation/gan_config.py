"""Configurations of generators and their critics, as frozen data without torch.

Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks";
Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", appendix F; Miyato et al. 2018, "Spectral Normalization
for Generative Adversarial Networks", appendix B; Anil et al. 2019, "Sorting out Lipschitz Function Approximation".
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.systems.native_folder import build

KIND = "gan"
"""What config.json calls it."""
Norm = Literal["none", "batch", "layer", "spectral"]
NORMS: tuple[Norm, ...] = ("none", "batch", "layer", "spectral")
LEAST, MOST = 8, 512
"""Sides in pixels of the pictures that can be generated."""


@dataclass(frozen=True)
class DCGAN:
    """Strided convolutions down, transposed ones up; channels from `width` at the finest map, doubled up to 8 times.

    `norm` is the critic's; the generator has batch normalisation.
    """

    width: int = 64
    norm: Norm = "spectral"


@dataclass(frozen=True)
class ResNet:
    """Residual blocks with `width` channels everywhere, resampled between. `norm` is the critic's."""

    width: int = 64
    norm: Norm = "none"


@dataclass(frozen=True)
class Orthogonal:
    """A critic of orthogonal layers of `widths` features and GroupSort in groups of `group`: 1-Lipschitz by
    construction.

    Pixels are its features, so it is for small pictures. It knows its Lipschitz constant.
    """

    widths: tuple[int, ...] = (256, 256)
    group: int = 2


Network = DCGAN | ResNet
AnyCritic = DCGAN | ResNet | Orthogonal
NETWORKS: dict[str, type[AnyCritic]] = {"dcgan": DCGAN, "resnet": ResNet, "orthogonal": Orthogonal}
"""What config.json calls them."""


@dataclass(frozen=True)
class GANConfig:
    """A generator of pictures (channels, size, size) from `latent` normal numbers, and the critic it was trained
    with.
    """

    size: int = 28
    channels: int = 1
    latent: int = 64
    generator: Network = DCGAN()
    critic: AnyCritic = DCGAN()

    def __post_init__(self) -> None:
        if not LEAST <= self.size <= MOST or self.channels not in (1, 3) or self.latent < 1:
            raise UsageError(
                f"gan: size from {LEAST} to {MOST}, 1 or 3 channels and latent >= 1 are wanted, got size {self.size}, "
                f"{self.channels} channels and latent {self.latent}"
            )
        if isinstance(self.generator, Orthogonal):
            raise UsageError("gan: an orthogonal network is for the critic", tip="generator=dcgan or resnet")
        for network in (self.generator, self.critic):
            _check(network)

    @property
    def stages(self) -> int:
        """How often the side is halved between pictures and the coarsest map, whose side is 4 to 8."""
        return max(1, int(math.log2(self.size / 4)))

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        networks = {name: _named(network) for name, network in (("generator", self.generator), ("critic", self.critic))}
        return {"type": KIND, **asdict(self), **networks}

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str) -> GANConfig:
        """Undo `to_json`. Raises VolvelleError that names `source` and what does not fit."""
        given = {name: value for name, value in values.items() if name != "type"}
        for name in ("generator", "critic"):
            if not isinstance(given.get(name), dict):
                raise VolvelleError(f"{source}: has no {name}")
            fields = dict(given[name])
            kind = fields.pop("type", None)
            if kind not in NETWORKS:
                raise VolvelleError(f"{source}: unknown {name} {kind!r}", tip=did_you_mean(str(kind), NETWORKS))
            given[name] = build(NETWORKS[kind], fields, source)
        return build(cls, given, source)


def _named(network: AnyCritic) -> dict[str, Any]:
    return {"type": next(name for name, kind in NETWORKS.items() if type(network) is kind), **asdict(network)}


def _check(network: AnyCritic) -> None:
    if isinstance(network, Orthogonal):
        widths, group = network.widths, network.group
        if not widths or group < 1 or min(widths) < 1 or any(width % group for width in widths):
            raise UsageError(f"gan: widths must be multiples of the group of {group}, got {widths}")
    elif network.width < 1 or network.norm not in NORMS:
        raise UsageError(f"gan: width >= 1 and a norm of {', '.join(NORMS)} are wanted, got {network}")
