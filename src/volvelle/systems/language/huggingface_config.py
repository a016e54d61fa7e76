"""Hugging Face's config.json <-> our configurations, both ways, without torch.

Reading refuses what would change the computation and is not built (sliding windows, quantised weights); writing reads
its own result back and refuses when anything was lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from volvelle.errors import VolvelleError, did_you_mean
from volvelle.systems.language import bart
from volvelle.systems.language import config as c
from volvelle.systems.language.config_fields import Fields
from volvelle.systems.language.encoder_decoder_config import ModelConfig
from volvelle.systems.language.native_config import ARCHITECTURE, read_native, write_native

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "GPT2LMHeadModel": "gpt2",
    "RoFormerForCausalLM": "roformer",
    "RoFormerForMaskedLM": "roformer",
    ARCHITECTURE: "volvelle",
    bart.ARCHITECTURE: "bart",
    "BartModel": "bart",
}


def family_of(values: Mapping[str, Any], source: str = "config.json") -> str:
    """Return the family a config.json names by `architectures`, or by `model_type` when that is absent.

    Raises VolvelleError that lists the known architectures.

    >>> family_of({"architectures": ["GPT2LMHeadModel"]})
    'gpt2'
    """
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else values.get("model_type")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if not names and name in _READERS:
        return str(name)
    known = f"known: {', '.join(ARCHITECTURES)}"
    if name is None:
        raise VolvelleError(f"{source}: neither architectures nor model_type is given", tip=known)
    near = did_you_mean(str(name), ARCHITECTURES)
    raise VolvelleError(f"{source}: architecture {name!r} is not supported", tip=f"{near} {known}" if near else known)


def config_from_dict(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Read the content of a config.json. Raises VolvelleError that names the field.

    >>> config_from_dict({
    ...     "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16,
    ...     "num_hidden_layers": 1, "num_attention_heads": 2, "rope_theta": 1e5}).position
    Rope(base=100000.0, layout='half', dim=None, scaling=None, rotate_value=False)
    """
    family = family_of(values, source)
    if values.get("quantization_config") is not None:
        raise VolvelleError(
            f"{source}: quantised weights are not supported", tip="take the unquantised model or a GGUF file"
        )
    try:
        return _READERS[family](Fields(values, source))
    except ValueError as error:
        raise VolvelleError(f"{source}: {error}") from error


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Write the content of a config.json that transformers 4 and 5 read.

    Raises VolvelleError when the family's files cannot hold this configuration.
    """
    values = _WRITERS[config.family](config)
    again = config_from_dict(values)
    if again != config:
        lost = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(again, field.name) != getattr(config, field.name)
        ]
        raise VolvelleError(
            f"a {config.family} config.json cannot hold this model: "
            + "; ".join(
                f"{name} = {getattr(config, name)!r} would be read as {getattr(again, name)!r}" for name in lost
            )
        )
    return values


def _read_rope(fields: Fields, context: int) -> c.Rope:
    """Both spellings: transformers 5's rope_parameters, and rope_theta + rope_scaling before it."""
    given = fields.get("rope_scaling", dict, None) or fields.get("rope_parameters", dict, None) or {}
    rope = Fields(given, f"{fields.source}: rope")
    base = float(rope.get("rope_theta", float, fields.get("rope_theta", float, 10000.0)))
    rope.refuse(partial_rotary_factor=1.0)
    fields.refuse(partial_rotary_factor=1.0)
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return c.Rope(base=base)
    original = fields.get("original_max_position_embeddings", int, None)
    original = original or rope.get("original_max_position_embeddings", int, context)
    factor = rope.get("factor", float, context / original)
    if kind == "linear":
        scaling = c.LinearScaling(factor)
    elif kind == "dynamic":
        scaling = c.DynamicScaling(factor)
    elif kind == "yarn":
        scaling = c.YarnScaling(
            factor,
            original,
            beta_fast=rope.get("beta_fast", float, 32.0),
            beta_slow=rope.get("beta_slow", float, 1.0),
            attention_factor=rope.get("attention_factor", float, None),
            mscale=rope.get("mscale", float, None),
            mscale_all_dim=rope.get("mscale_all_dim", float, None),
            truncate=rope.get("truncate", bool, True),
        )
    elif kind == "longrope":
        scaling = c.LongRopeScaling(
            tuple(rope.get("short_factor", list, [])),
            tuple(rope.get("long_factor", list, [])),
            original,
            factor,
            rope.get("attention_factor", float, None),
        )
    elif kind == "llama3":
        scaling = c.Llama3Scaling(
            factor, original, rope.get("low_freq_factor", float, 1.0), rope.get("high_freq_factor", float, 4.0)
        )
    else:
        raise VolvelleError(
            f"{fields.source}: rope type {kind!r} is not supported",
            tip="known: default, linear, dynamic, yarn, longrope, llama3",
        )
    return c.Rope(base=base, scaling=scaling)


def _write_rope(position: c.Rope) -> dict[str, Any]:
    scaling = position.scaling
    match scaling:
        case None:
            given: dict[str, Any] = {"rope_type": "default"}
        case c.LinearScaling():
            given = {"rope_type": "linear", "factor": scaling.factor}
        case c.DynamicScaling():
            given = {"rope_type": "dynamic", "factor": scaling.factor}
        case c.YarnScaling():
            given = {"rope_type": "yarn", **dataclasses.asdict(scaling)}
        case c.LongRopeScaling():
            given = {"rope_type": "longrope", "factor": scaling.factor, "attention_factor": scaling.attention_factor}
            given |= {
                "short_factor": list(scaling.short_factors or ()),
                "long_factor": list(scaling.long_factors or ()),
            }
            given |= {"original_context": scaling.original_context}
        case c.Llama3Scaling():
            given = {"rope_type": "llama3", "factor": scaling.factor, "original_context": scaling.original_context}
            given |= {"low_freq_factor": scaling.low_frequency_factor}
            given |= {"high_freq_factor": scaling.high_frequency_factor}
        case c.NtkScaling() | c.ProportionalScaling():
            raise VolvelleError(f"a llama config.json has no name for {scaling}")
    if "original_context" in given:
        given["original_max_position_embeddings"] = given.pop("original_context")
    given = {name: value for name, value in given.items() if value is not None}
    # transformers 5 reads rope_parameters, transformers 4 and vLLM read the other two; a plain rope_scaling stays null.
    parameters = {"rope_theta": position.base, **given}
    return {
        "rope_parameters": parameters,
        "rope_theta": position.base,
        "rope_scaling": None if scaling is None else given,
    }


def _read_llama(fields: Fields) -> c.LanguageConfig:
    heads, context = fields.size("num_attention_heads"), fields.get("max_position_embeddings", int, 2048)
    bias = fields.get("attention_bias", bool, False)
    return c.LanguageConfig(
        "llama",
        vocabulary=fields.size("vocab_size"),
        width=fields.size("hidden_size"),
        depth=fields.size("num_hidden_layers"),
        heads=heads,
        context=context,
        norm=c.RMSNorm(float(fields.get("rms_norm_eps", float, 1e-6))),
        mlp=c.GatedMLP(
            fields.size("intermediate_size"),
            fields.activation("hidden_act", "silu"),
            fields.get("mlp_bias", bool, False),
        ),
        position=_read_rope(fields, context),
        kv_heads=fields.get("num_key_value_heads", int, heads),
        head_width=fields.get("head_dim", int, 0),
        qkv_bias=bias,
        out_bias=bias,
        head=c.Head(tied=fields.get("tie_word_embeddings", bool, False)),
        dropout=c.Dropout(attention=float(fields.get("attention_dropout", float, 0.0))),
        special=fields.special(1, 2, None),
        init_std=float(fields.get("initializer_range", float, 0.02)),
    )


def _read_qwen2(fields: Fields) -> c.LanguageConfig:
    fields.refuse(use_sliding_window=False)
    if "sliding_attention" in (fields.get("layer_types", list, None) or ()):
        raise VolvelleError(f"{fields.source}: layer_types asks for sliding_attention, which is not supported")
    same = dict(fields.values)
    # The same fields as Llama's, other defaults, and biases that no field announces.
    same.setdefault("max_position_embeddings", 32768)
    same.setdefault("bos_token_id", None)
    same.setdefault("eos_token_id", None)
    config = _read_llama(Fields(same | {"attention_bias": False, "mlp_bias": False}, fields.source))
    return dataclasses.replace(config, family="qwen2", qkv_bias=True)


def _read_gpt2(fields: Fields) -> c.LanguageConfig:
    fields.refuse(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )  # reorder_and_upcast_attn changes rounding only
    width = fields.size("n_embd")
    return c.LanguageConfig(
        "gpt2",
        vocabulary=fields.size("vocab_size"),
        width=width,
        depth=fields.size("n_layer"),
        heads=fields.size("n_head"),
        context=fields.get("n_positions", int, 1024),
        norm=c.LayerNorm(float(fields.get("layer_norm_epsilon", float, 1e-5))),
        mlp=c.MLP(fields.get("n_inner", int, 4 * width), fields.activation("activation_function", "gelu_tanh")),
        position=c.Learned(),
        qkv_bias=True,
        out_bias=True,
        head=c.Head(tied=fields.get("tie_word_embeddings", bool, True)),
        dropout=c.Dropout(
            float(fields.get("embd_pdrop", float, 0.1)),
            float(fields.get("resid_pdrop", float, 0.1)),
            float(fields.get("attn_pdrop", float, 0.1)),
        ),
        special=fields.special(50256, 50256, None),
        init_std=float(fields.get("initializer_range", float, 0.02)),
    )


def _read_roformer(fields: Fields) -> c.LanguageConfig:
    fields.refuse(add_cross_attention=False, tie_word_embeddings=True)
    width, activation = fields.size("hidden_size"), fields.activation("hidden_act", "gelu")
    dropout = float(fields.get("hidden_dropout_prob", float, 0.1))
    return c.LanguageConfig(
        "roformer",
        vocabulary=fields.size("vocab_size"),
        width=width,
        depth=fields.size("num_hidden_layers"),
        heads=fields.size("num_attention_heads"),
        context=fields.get("max_position_embeddings", int, 1536),
        norm=c.LayerNorm(float(fields.get("layer_norm_eps", float, 1e-12))),
        mlp=c.MLP(fields.size("intermediate_size"), activation),
        position=c.Rope(layout="interleaved", rotate_value=fields.get("rotary_value", bool, False)),
        qkv_bias=True,
        out_bias=True,
        order="post",
        causal=fields.get("is_decoder", bool, False),
        segments=fields.get("type_vocab_size", int, 2),
        embedding_width=fields.get("embedding_size", int, width),
        head=c.Head(tied=True, bias=True, transform=activation),
        dropout=c.Dropout(dropout, dropout, float(fields.get("attention_probs_dropout_prob", float, 0.1))),
        special=fields.special(None, None, 0),
        init_std=float(fields.get("initializer_range", float, 0.02)),
    )


def _common(config: c.LanguageConfig, architecture: str) -> dict[str, Any]:
    eos = config.special.eos
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.head.tied,
        "initializer_range": config.init_std,
        "bos_token_id": config.special.bos,
        "eos_token_id": list(eos) if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": config.special.pad,
    }


def _write_llama(config: c.LanguageConfig) -> dict[str, Any]:
    if not isinstance(config.position, c.Rope):
        raise VolvelleError(f"a {config.family} config.json cannot hold position = {config.position!r}")
    names = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    values = _common(config, "LlamaForCausalLM" if config.family == "llama" else "Qwen2ForCausalLM")
    values |= {
        "hidden_size": config.width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": names[config.mlp.activation],
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "attention_dropout": config.dropout.attention,
        **_write_rope(config.position),
    }
    if config.family == "llama":
        return values | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp.bias}
    return values | {"use_sliding_window": False}


def _write_gpt2(config: c.LanguageConfig) -> dict[str, Any]:
    names = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    return _common(config, "GPT2LMHeadModel") | {
        "n_embd": config.width,
        "n_inner": config.mlp.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_positions": config.context,
        "n_ctx": config.context,
        "activation_function": names[config.mlp.activation],
        "layer_norm_epsilon": config.norm.eps,
        "embd_pdrop": config.dropout.embedding,
        "resid_pdrop": config.dropout.residual,
        "attn_pdrop": config.dropout.attention,
    }


def _write_roformer(config: c.LanguageConfig) -> dict[str, Any]:
    names = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
    rotate_value = isinstance(config.position, c.Rope) and config.position.rotate_value
    return _common(config, "RoFormerForCausalLM" if config.causal else "RoFormerForMaskedLM") | {
        "hidden_size": config.width,
        "embedding_size": config.embedding_width,
        "intermediate_size": config.mlp.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.segments,
        "hidden_act": names[config.mlp.activation],
        "layer_norm_eps": config.norm.eps,
        "hidden_dropout_prob": config.dropout.residual,
        "attention_probs_dropout_prob": config.dropout.attention,
        "rotary_value": rotate_value,
        "is_decoder": config.causal,
    }


_READERS: dict[str, Callable[[Fields], ModelConfig]] = {
    "llama": _read_llama,
    "qwen2": _read_qwen2,
    "gpt2": _read_gpt2,
    "roformer": _read_roformer,
    "volvelle": read_native,
    "bart": bart.read_bart,
}
_WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _write_llama,
    "qwen2": _write_llama,
    "gpt2": _write_gpt2,
    "roformer": _write_roformer,
    "volvelle": write_native,
    "bart": bart.write_bart,
}
