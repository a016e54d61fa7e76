"""The kinds of language model, and which of them a configuration builds."""

from __future__ import annotations

from volvelle.systems.language.config import LanguageConfig
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.encoder_decoder_config import ModelConfig

LanguageModel = Decoder | EncoderDecoder
"""What reading a model folder gives."""


def build(config: ModelConfig) -> LanguageModel:
    """A fresh model of that configuration."""
    return Decoder(config) if isinstance(config, LanguageConfig) else EncoderDecoder(config)
