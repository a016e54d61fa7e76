"""A language model of letters, small enough to be trained in a test."""

from __future__ import annotations

import torch

from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder


class Letters:
    """A tokenizer of letters."""

    eos_ids = (0,)
    chat_template = None

    def encode(self, text, *, special=False):
        return [ord(letter) % 60 + 1 for letter in text]

    encode_prompt = encode


def letters_model(context):
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama", 64, 16, 2, 2, context=context, norm=RMSNorm(), mlp=GatedMLP(24), position=Rope(), init_std=0.2
    )
    model = Decoder(config).eval()
    model.tokenizer = Letters()
    return model
