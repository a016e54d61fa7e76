"""VQGAN: an encoder, a codebook and a decoder; as a codec it turns pictures into codes and back.

Esser et al. 2021, section 3.1. With a loss of pixels alone the same network is a VQ-VAE (van den Oord et al. 2017).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.quantization.ema import EMAVectorQuantizer
from volvelle.parts.quantization.nearest import nearest_code
from volvelle.parts.quantization.vector_quantize import Quantized, VectorQuantizer
from volvelle.systems.generation.autoencoder import Decoder, Encoder
from volvelle.systems.generation.config import VQGANConfig

DECAY, LEAST = 0.95, 0.1
"""Of running means: they follow a young encoder, and a code that is left behind begins anew within 50 steps."""


class Reconstruction(NamedTuple):
    """The decoder's pictures, fp (b, c, y, x), the codes with their loss, and what the last convolution was given."""

    pixels: Tensor
    quantized: Quantized
    features: Tensor


class VQGAN(nn.Module):
    """Pictures fp (b, channels, y, x) in [-1, 1] to codes and back; a `Codec`.

    Parts: `encoder`, `quant_conv`, `quantize`, `post_quant_conv`, `decoder`, all with taming-transformers' names.

    >>> from volvelle.systems.generation.config import find_config
    >>> net = VQGAN(find_config("small-f4")).eval()
    >>> codes = net.encode(torch.zeros(2, 1, 28, 28))
    >>> codes.shape, net.decode(codes).shape
    (torch.Size([2, 7, 7]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent, config.code_width, 1)
        commitment, codebook = config.weights
        self.quantize = (
            EMAVectorQuantizer(config.codes, config.code_width, commitment=commitment, decay=DECAY, least=LEAST)
            if config.codebook == "means"
            else VectorQuantizer(config.codes, config.code_width, commitment=commitment, codebook_weight=codebook)
        )
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent, 1)
        self.decoder = Decoder(config) if config.decodes else None

    @property
    def vocabulary(self) -> int:
        """How many codes there are."""
        return self.config.codes

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return self.config.channels

    @property
    def size(self) -> int:
        """The side in pixels of the pictures it was trained on."""
        return self.config.size

    @property
    def factor(self) -> int:
        """Pixels of a code's side."""
        return self.config.factor

    def latents(self, pixels: Tensor) -> Tensor:
        """What is quantized, (b, code_width, y / factor, x / factor), of pictures (b, channels, y, x).

        Raises UsageError for another number of channels, and for sides that are no multiples of `factor`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != self.channels or any(n % self.factor for n in pixels.shape[2:]):
            raise UsageError(
                f"{self.config.name}: pictures (b, {self.channels}, y, x) with sides that are multiples of "
                f"{self.factor} are wanted, got {tuple(pixels.shape)}"
            )
        return self.quant_conv(self.encoder(pixels))

    def pictures(self, quantized: Tensor) -> Tensor:
        """The decoder's pictures of vectors (b, code_width, h, w). Raises VolvelleError where there is no decoder."""
        return self.decoding(self.post_quant_conv(quantized))

    @property
    def decoding(self) -> Decoder:
        """The decoder. Raises VolvelleError where there is none."""
        if self.decoder is None:
            raise VolvelleError(
                f"{self.config.name}: has no decoder: it can encode pictures, and make none",
                tip="transformers' Chameleon folders hold the encoder alone; the authors' vqgan.ckpt has both",
            )
        return self.decoder

    def forward(self, pixels: Tensor) -> Reconstruction:
        """Encode, quantize and decode, with gradients."""
        quantized = self.quantize(self.latents(pixels))
        features = self.decoding.features(self.post_quant_conv(quantized.quantized))
        return Reconstruction(self.decoding.conv_out(features), quantized, features)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The codes int64 (b, y / factor, x / factor) of pictures (b, channels, y, x) in [-1, 1].

        A codebook of means learns nothing of them. Raises UsageError as `latents` does.
        """
        z = self.latents(pixels.to(self.quant_conv.weight))
        return nearest_code(z.movedim(1, -1), self.quantize.embedding.weight)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures (b, channels, factor h, factor w) in [-1, 1] of codes int64 (b, h, w).

        Raises UsageError for numbers that are no code, VolvelleError where there is no decoder.
        """
        if codes.ndim != 3 or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.vocabulary):
            span = f", {int(codes.min())} to {int(codes.max())}" if codes.numel() else ""
            raise UsageError(
                f"{self.config.name}: codes (b, h, w) from 0 to {self.vocabulary - 1} are wanted, "
                f"got {tuple(codes.shape)}{span}"
            )
        return self.pictures(self.quantize.look_up(codes)).clamp(-1, 1)
