"""Small priors: random decoders over the codes of a codec of grey squares, known to the last bit."""

from __future__ import annotations

import json

import torch
from PIL import Image
from torch import nn

from volvelle.systems.generation.config import VQGANConfig
from volvelle.systems.generation.layout import Layout
from volvelle.systems.generation.load import vqgan, write_vqgan
from volvelle.systems.generation.prior import Prior
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder


class Patches(nn.Module):
    """A codec whose codes are grey squares: code c is a patch of 4 x 4 pixels of brightness 2 c / (codes - 1) - 1."""

    factor, channels = 4, 1

    def __init__(self, codes=16, size=12):
        super().__init__()
        self.vocabulary, self.size = codes, size
        self.register_buffer("levels", torch.linspace(-1, 1, codes))

    def encode(self, pixels):
        means = nn.functional.avg_pool2d(pixels.float(), self.factor)[:, 0]
        return (means[..., None] - self.levels).abs().argmin(-1)

    def decode(self, codes):
        return self.levels[codes][:, None].repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def small_prior(layout=None, *, depth=2, width=64, position=None, codec=None):
    """A prior with lively random weights."""
    layout = layout or Layout(codes=16, rows=3, columns=3, classes=("bright", "dark"))
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", vocabulary=layout.vocabulary, width=width, depth=depth, heads=2, context=layout.context,
        norm=RMSNorm(), mlp=GatedMLP(96), position=position or Rope(), init_std=0.3,
    )  # fmt: skip
    return Prior(Decoder(config).eval(), layout, codec=codec or Patches(layout.codes))


def grey_pictures(folder, *, count=24, captions=False):
    """Pictures of 12 x 12 pixels: bright ones and dark ones, in folders of their classes or in a list of captions."""
    draw = torch.Generator().manual_seed(0)
    lines = []
    for i in range(count):
        name = ("bright", "dark")[i % 2]
        low = 160 if name == "bright" else 0
        pixels = torch.randint(low, low + 90, (3, 3), generator=draw, dtype=torch.uint8)
        pixels = pixels.repeat_interleave(4, 0).repeat_interleave(4, 1)
        file = folder / (f"{i}.png" if captions else f"{name}/{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
        lines.append(json.dumps({"image": file.name, "caption": f"a {name} square"}))
    if captions:
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def small_codec(folder):
    """A folder with a random VQGAN of 16 codes over pictures of 12 x 12 pixels."""
    torch.manual_seed(0)
    config = VQGANConfig(
        channels=1, size=12, width=8, multipliers=(1, 1, 1), depth=1, attention=(), latent=8, code_width=8, codes=16,
        groups=4, middle_attention=False,
    )  # fmt: skip
    write_vqgan(vqgan(config), folder)
    return folder
