"""Language models, decoders and encoder-decoders: one class for several families, readers and writers of their files.

Importing this package, or its `config`, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.systems.language.config import LanguageConfig as LanguageConfig
    from volvelle.systems.language.decoder import Decoder as Decoder
    from volvelle.systems.language.encoder_decoder import EncoderDecoder as EncoderDecoder
    from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig as EncoderDecoderConfig
    from volvelle.systems.language.huggingface import read_folder as read_folder
    from volvelle.systems.language.huggingface import write_folder as write_folder
    from volvelle.systems.language.load import load_language_model as load_language_model
    from volvelle.systems.language.medusa import MedusaHeads as MedusaHeads
    from volvelle.systems.language.medusa_files import read_medusa as read_medusa
    from volvelle.systems.language.medusa_files import write_medusa as write_medusa
    from volvelle.systems.language.mtp import ParallelMTP as ParallelMTP
    from volvelle.systems.language.mtp import SequentialMTP as SequentialMTP
    from volvelle.systems.language.mtp_drafts import drafts_of as drafts_of
    from volvelle.systems.language.mtp_files import read_mtp as read_mtp
    from volvelle.systems.language.mtp_files import write_mtp as write_mtp
    from volvelle.systems.language.projections import fuse_projections as fuse_projections
    from volvelle.systems.language.projections import unfuse_projections as unfuse_projections
    from volvelle.systems.language.quantized import quantize_model as quantize_model

_HOMES = {
    "LanguageConfig": "config",
    "Decoder": "decoder",
    "EncoderDecoder": "encoder_decoder",
    "EncoderDecoderConfig": "encoder_decoder_config",
    "read_folder": "huggingface",
    "write_folder": "huggingface",
    "load_language_model": "load",
    "MedusaHeads": "medusa",
    "read_medusa": "medusa_files",
    "write_medusa": "medusa_files",
    "ParallelMTP": "mtp",
    "SequentialMTP": "mtp",
    "drafts_of": "mtp_drafts",
    "read_mtp": "mtp_files",
    "write_mtp": "mtp_files",
    "fuse_projections": "projections",
    "unfuse_projections": "projections",
    "quantize_model": "quantized",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
