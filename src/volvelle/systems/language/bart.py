"""BART's config.json <-> `EncoderDecoderConfig`, both ways, without torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from volvelle.errors import VolvelleError
from volvelle.systems.language import config as c
from volvelle.systems.language.config_fields import Fields
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack, Writing

ARCHITECTURE = "BartForConditionalGeneration"
WRITING = {
    "width": "num_beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
"""The fields of `Writing` by the names of transformers; new files have them in generation_config.json only."""
GENERATION = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", *WRITING.values())
"""Fields that transformers' generate takes from generation_config.json."""


_NOTHING = {WRITING[name]: value for name, value in dataclasses.asdict(Writing()).items()}


def read_bart(fields: Fields) -> EncoderDecoderConfig:
    """Read the content of a config.json. Raises VolvelleError that names the field.

    Absent fields have transformers' values. Variants that came before BART was one thing (norms before the branches, a
    last norm, fixed positions) are refused, and so is dropping whole layers.
    """
    fields.refuse(
        normalize_before=False,
        add_final_layer_norm=False,
        normalize_embedding=True,
        static_position_embeddings=False,
        add_bias_logits=False,
        encoder_layerdrop=0,
        decoder_layerdrop=0,
    )
    width, dropout = fields.size("d_model"), float(fields.get("dropout", float, 0.1))
    special = fields.special(0, 2, 1)
    old_first = special.bos if fields.get("force_bos_token_to_be_generated", bool, False) else None
    return EncoderDecoderConfig(
        "bart",
        vocabulary=fields.size("vocab_size"),
        width=width,
        encoder=_stack(fields, "encoder"),
        decoder=_stack(fields, "decoder"),
        context=fields.get("max_position_embeddings", int, 1024),
        start=fields.get("decoder_start_token_id", int, 2),
        embedding_scale=math.sqrt(width) if fields.get("scale_embedding", bool, False) else 1.0,
        head=c.Head(tied=fields.get("tie_word_embeddings", bool, True)),
        dropout=c.Dropout(dropout, dropout, float(fields.get("attention_dropout", float, 0.0))),
        activation_dropout=float(fields.get("activation_dropout", float, 0.0)),
        special=special,
        forced_first=_token(fields, "forced_bos_token_id", old_first),
        forced_last=_token(fields, "forced_eos_token_id", 2),
        writing=_writing(fields),
        init_std=float(fields.get("init_std", float, 0.02)),
    )


def write_bart(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Write the content of a config.json that transformers 4 and 5 read."""
    names = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    eos = config.special.eos
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": config.family,
        "is_encoder_decoder": True,
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "max_position_embeddings": config.context,
        "activation_function": names[config.encoder.mlp.activation],
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": config.head.tied,
        "dropout": config.dropout.residual,
        "attention_dropout": config.dropout.attention,
        "activation_dropout": config.activation_dropout,
        "init_std": config.init_std,
        "bos_token_id": config.special.bos,
        "eos_token_id": list(eos) if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": config.special.pad,
        "decoder_start_token_id": config.start,
        "forced_bos_token_id": config.forced_first,
        "forced_eos_token_id": config.forced_last,
    }
    asked = {WRITING[name]: value for name, value in dataclasses.asdict(config.writing).items()}
    values |= {name: value for name, value in asked.items() if value != _NOTHING[name]}
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        values[f"{side}_layers"], values[f"{side}_attention_heads"] = stack.depth, stack.heads
        values[f"{side}_ffn_dim"] = stack.mlp.width
    return values


def _stack(fields: Fields, side: str) -> Stack:
    mlp = c.MLP(fields.size(f"{side}_ffn_dim"), fields.activation("activation_function", "gelu"))
    return Stack(fields.size(f"{side}_layers"), fields.size(f"{side}_attention_heads"), mlp)


def _writing(fields: Fields) -> Writing:
    """What answers are like; VolvelleError for a value that generation would refuse."""
    early: bool | str = fields.values.get("early_stopping") or False
    if early not in (True, False, "never"):
        raise VolvelleError(f'{fields.source}: early_stopping must be true, false or "never", got {early!r}')
    numbers = {name: fields.get(name, int, _NOTHING[name]) for name in ("num_beams", "no_repeat_ngram_size")}
    for name, least in (("num_beams", 1), ("no_repeat_ngram_size", 0)):
        if numbers[name] < least:
            raise VolvelleError(f"{fields.source}: {name} must be at least {least}, got {numbers[name]}")
    return Writing(
        width=numbers["num_beams"],
        length_penalty=float(fields.get("length_penalty", float, 1.0)),
        early_stopping=early,
        no_repeat_ngram_size=numbers["no_repeat_ngram_size"],
    )


def _token(fields: Fields, name: str, absent: int | None) -> int | None:
    """A token to force; null in the file means none. Several at once are refused."""
    value = fields.values.get(name, absent)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise VolvelleError(f"{fields.source}: {name} must be one token id, got {value!r}")
    return value
