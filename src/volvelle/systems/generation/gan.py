"""Generators of pictures and the critics they are trained with (configurations and papers: gan_config.py).

Shapes: latent numbers z (b, latent), pictures (b, c, y, x) in [-1, 1], scores (b).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from volvelle.parts.adversarial.group_sort import GroupSort
from volvelle.parts.adversarial.orthogonal import OrthogonalLinear
from volvelle.parts.adversarial.spectral_norm import SpectralNorm
from volvelle.systems.generation.gan_config import DCGAN, KIND, AnyCritic, GANConfig, Norm, Orthogonal
from volvelle.systems.native_folder import load_model, write_model


class GAN(nn.Module):
    """A generator and its critic. `forward(z)` gives pictures, `critic(pictures)` scores.

    >>> net = GAN(GANConfig(size=28, generator=DCGAN(8), critic=DCGAN(8)))
    >>> pictures = net(net.latents(3))
    >>> pictures.shape, net.critic(pictures).shape
    (torch.Size([3, 1, 28, 28]), torch.Size([3]))
    """

    def __init__(self, config: GANConfig):
        super().__init__()
        self.config = config
        self.generator = build_generator(config)
        self.critic = build_critic(config)

    def forward(self, z: Tensor) -> Tensor:
        """Pictures (b, c, y, x) in [-1, 1] of latent numbers (b, latent)."""
        return self.generator(z)

    def latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Latent numbers (count, latent) from the standard normal distribution, drawn on the CPU."""
        z = torch.randn(count, self.config.latent, generator=generator)
        return z.to(next(self.generator.parameters()).device)

    @torch.no_grad()
    def sample(self, count: int, *, generator: torch.Generator | None = None, batch: int = 256) -> Tensor:
        """`count` pictures (count, c, y, x) in [-1, 1]. Batch normalisation works with its running statistics."""
        from volvelle.systems.modes import evaluating

        with evaluating(self):
            z = self.latents(count, generator)
            return torch.cat([self(part).float() for part in z.split(batch)])


def build_generator(config: GANConfig) -> nn.Module:
    """A fresh generator, its weights drawn as its paper draws them."""
    coarsest = -(-config.size // 2**config.stages)
    if isinstance(config.generator, DCGAN):
        return DCGANGenerator(config, config.generator.width, coarsest)
    return ResNetGenerator(config, config.generator.width, coarsest)


def build_critic(config: GANConfig) -> nn.Module:
    """A fresh critic."""
    network: AnyCritic = config.critic
    if isinstance(network, Orthogonal):
        return LipschitzCritic(config.channels * config.size**2, network.widths, network.group)
    if isinstance(network, DCGAN):
        return DCGANCritic(config, network.width, network.norm)
    return ResNetCritic(config, network.width, network.norm)


class DCGANGenerator(nn.Module):
    """Transposed convolutions: Radford et al. 2016, figure 1."""

    def __init__(self, config: GANConfig, width: int, coarsest: int):
        super().__init__()
        widths = [width * min(8, 2**i) for i in reversed(range(config.stages))]
        self.size = config.size
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(config.latent, widths[0], coarsest, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        for before, after in pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], config.channels, 4, 2, 1))
        self.apply(_small)

    def forward(self, z: Tensor) -> Tensor:
        """Pictures of z (b, latent)."""
        return _middle(self.main(z[:, :, None, None]), self.size).tanh()


class DCGANCritic(nn.Module):
    """Strided convolutions and a linear score: Radford et al. 2016, section 3."""

    def __init__(self, config: GANConfig, width: int, norm: Norm):
        super().__init__()
        widths = [config.channels, *(width * min(8, 2**i) for i in range(config.stages))]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 4, 2, 1), _norm(norm if i else "none", after), nn.LeakyReLU(0.2)]
        side = config.size // 2**config.stages
        self.main = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * side**2, 1))
        self.apply(_small)
        _spectral(self, norm)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (b)."""
        return self.main(pictures).flatten()


class ResNetGenerator(nn.Module):
    """Residual blocks behind nearest upsampling: Gulrajani et al. 2017, appendix F."""

    def __init__(self, config: GANConfig, width: int, coarsest: int):
        super().__init__()
        self.size, self.shape = config.size, (width, coarsest, coarsest)
        self.first = nn.Linear(config.latent, math.prod(self.shape))
        self.blocks = nn.Sequential(*(Block(width, width, "batch", _up) for _ in range(config.stages)))
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, config.channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """Pictures of z (b, latent)."""
        return _middle(self.last(self.blocks(self.first(z).unflatten(1, self.shape))), self.size).tanh()


class ResNetCritic(nn.Module):
    """Residual blocks before mean pooling, a sum over places and a linear score: Miyato et al. 2018, table 4."""

    def __init__(self, config: GANConfig, width: int, norm: Norm):
        super().__init__()
        self.first = nn.Conv2d(config.channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, width, norm, _down) for _ in range(config.stages)))
        self.last = nn.Linear(width, 1)
        _spectral(self, norm)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores (b)."""
        return self.last(F.relu(self.blocks(self.first(pictures))).mean((2, 3))).flatten()


class Block(nn.Module):
    """x' + conv(relu(norm(conv(relu(norm(x)))))) with the picture resampled on both ways (He et al. 2016)."""

    def __init__(self, before: int, after: int, norm: Norm, resample: Callable[[Tensor], Tensor]):
        super().__init__()
        self.resample = resample
        self.norm1, self.norm2 = _norm(norm, before), _norm(norm, after)
        self.conv1, self.conv2 = (nn.Conv2d(c, after, 3, padding=1) for c in (before, after))
        self.short = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice or half as large."""
        if self.resample is _up:
            inner = self.conv1(_up(F.relu(self.norm1(x))))
            return self.short(_up(x)) + self.conv2(F.relu(self.norm2(inner)))
        inner = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.resample(self.short(x) + inner)


class LipschitzCritic(nn.Module):
    """Orthogonal layers and GroupSort: |s(x) - s(y)| <= ‖x - y‖ for all points, whatever the weights are.

    For points (b, features) or pictures, taken as vectors. `lipschitz()` is the constant of the exact function, the
    product of the layers' largest singular values in fp64: `certified_w1` divides by it.

    >>> critic = LipschitzCritic(2, (8, 8))
    >>> critic(torch.zeros(5, 2)).shape, critic.lipschitz() < 1 + 1e-5
    (torch.Size([5]), True)
    """

    def __init__(self, features: int, widths: tuple[int, ...] = (64, 64), group: int = 2):
        super().__init__()
        sizes = (features, *widths)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [OrthogonalLinear(before, after), GroupSort(group)]
        self.main = nn.Sequential(*layers, OrthogonalLinear(sizes[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (b)."""
        return self.main(x).flatten()

    def lipschitz(self) -> float:
        """K, at most 1 but for the rounding of the weights' orthonormalisation."""
        return math.prod(layer.lipschitz() for layer in self.main if isinstance(layer, OrthogonalLinear))


def write_gan(model: GAN, path: str | os.PathLike[str]) -> None:
    """Write config.json and model.safetensors into a folder."""
    write_model(model, model.config.to_json(), path)


def read_gan(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> GAN:
    """Read a folder of `write_gan`, in evaluation mode. Raises VolvelleError for files that do not fit."""
    model = load_model(path, KIND, lambda values, source: GAN(GANConfig.from_json(values, source)))
    return model.eval().to(device or "cpu")


def _norm(kind: Norm, channels: int) -> nn.Module:
    """Layer normalisation is over channels and places of one picture: a critic's slope stays that picture's own."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


def _spectral(critic: nn.Module, norm: Norm) -> None:
    if norm != "spectral":
        return
    for module in list(critic.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))


def _small(module: nn.Module) -> None:
    """Weights of Radford et al. 2016, section 4: normal with deviation 0.02."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _middle(x: Tensor, size: int) -> Tensor:
    """The middle (b, c, size, size) of a map that a power of two made a little larger."""
    top = (x.shape[-1] - size) // 2
    return x[:, :, top : top + size, top : top + size]


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _down(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)
