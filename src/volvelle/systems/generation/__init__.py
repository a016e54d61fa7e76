"""Image codecs, priors over their codes, and adversaries. Importing it does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.generation.codec import Codec as Codec
    from volvelle.systems.generation.config import VQGANConfig as VQGANConfig
    from volvelle.systems.generation.discriminator import PatchDiscriminator as PatchDiscriminator
    from volvelle.systems.generation.gan import GAN as GAN
    from volvelle.systems.generation.gan import LipschitzCritic as LipschitzCritic
    from volvelle.systems.generation.gan import read_gan as read_gan
    from volvelle.systems.generation.gan import write_gan as write_gan
    from volvelle.systems.generation.gan_config import DCGAN as DCGAN
    from volvelle.systems.generation.gan_config import GANConfig as GANConfig
    from volvelle.systems.generation.gan_config import Orthogonal as Orthogonal
    from volvelle.systems.generation.gan_config import ResNet as ResNet
    from volvelle.systems.generation.layout import Layout as Layout
    from volvelle.systems.generation.load import load_vqgan as load_vqgan
    from volvelle.systems.generation.load import open_codec as open_codec
    from volvelle.systems.generation.load import vqgan as vqgan
    from volvelle.systems.generation.load import write_vqgan as write_vqgan
    from volvelle.systems.generation.perceptual import Perceptual as Perceptual
    from volvelle.systems.generation.prior import Prior as Prior
    from volvelle.systems.generation.prior import read_prior as read_prior
    from volvelle.systems.generation.prior import write_prior as write_prior
    from volvelle.systems.generation.vqgan_model import VQGAN as VQGAN

_HOMES = {
    "Codec": "codec",
    "DCGAN": "gan_config",
    "GAN": "gan",
    "GANConfig": "gan_config",
    "Layout": "layout",
    "LipschitzCritic": "gan",
    "Orthogonal": "gan_config",
    "PatchDiscriminator": "discriminator",
    "Perceptual": "perceptual",
    "Prior": "prior",
    "ResNet": "gan_config",
    "VQGAN": "vqgan_model",
    "VQGANConfig": "config",
    "load_vqgan": "load",
    "open_codec": "load",
    "read_gan": "gan",
    "read_prior": "prior",
    "vqgan": "load",
    "write_gan": "gan",
    "write_prior": "prior",
    "write_vqgan": "load",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = lazy(__name__, _HOMES)
