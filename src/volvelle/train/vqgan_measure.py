"""How well a codec keeps pictures: PSNR, SSIM, a perceptual distance, and how much of its codebook a whole set uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.data.loader import Loader
from volvelle.data.pictures import Framing, Middles, PictureSet, collate_pictures, to_signed
from volvelle.parts.metrics.psnr import peak_signal_noise_ratio
from volvelle.parts.metrics.ssim import structural_similarity
from volvelle.parts.quantization.usage import codebook_usage
from volvelle.systems.generation.perceptual import Perceptual
from volvelle.systems.generation.vqgan_model import VQGAN
from volvelle.systems.modes import evaluating
from volvelle.train.picture_sets import few
from volvelle.train.player import to_device

RANGE = 2.0
"""Pixels lie in [-1, 1]."""
WINDOW = 11
"""Of SSIM; smaller pictures have none."""


class Measured(NamedTuple):
    """Figures of a set, and how often each code occurred in it."""

    metrics: dict[str, float]
    counts: Tensor


@torch.no_grad()
def measure(
    model: VQGAN,
    pictures: PictureSet,
    *,
    batch: int = 64,
    perceptual: Perceptual | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Encode and decode the middles of pictures, at most `limit`, as the codec was trained.

    Metrics: psnr in dB and ssim, means over the pictures; perceptual where a distance is given; used, the share of the
    codes that occur, and code_perplexity, how many equally frequent ones that is.
    """
    device = model.quant_conv.weight.device
    channels = 1 if model.channels == 1 else 3
    views = Middles(few(pictures, limit), Framing(model.size, channels))
    sums: dict[str, float] = {}
    counts = torch.zeros(model.vocabulary, dtype=torch.long)
    done = 0
    with evaluating(model):
        for found in Loader(views, batch, seed=0, collate=collate_pictures, shuffle=False):
            pixels = to_signed(to_device(found.value["images"], device))
            codes = model.encode(pixels)
            drawn = model.decode(codes).float()
            values = {"psnr": peak_signal_noise_ratio(drawn, pixels, RANGE)}
            if model.size >= WINDOW:
                values["ssim"] = structural_similarity(drawn, pixels, RANGE)
            if perceptual is not None:
                values["perceptual"] = perceptual(drawn, pixels)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value.double().sum())
            counts += torch.bincount(codes.flatten().cpu(), minlength=model.vocabulary)
            done += len(pixels)
            if progress is not None:
                progress(done, len(views))
    usage = codebook_usage(counts)
    means = {name: value / done for name, value in sums.items()}
    return Measured({**means, "used": usage.share, "code_perplexity": usage.perplexity}, counts)
