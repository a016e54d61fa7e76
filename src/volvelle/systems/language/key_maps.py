"""Which tensor of a Hugging Face checkpoint is which parameter of ours: one declarative map a family of texts."""

from __future__ import annotations

from typing import Literal

from volvelle.systems.key_map import KeyMap, Rule
from volvelle.systems.language.config import Family


def _rule(theirs: str, *ours: str, transposed: bool = False) -> Rule:
    return Rule(theirs, ours, transposed)


_LAYER = "model.layers.{i}"

LLAMA = KeyMap(
    rules=(
        _rule("model.embed_tokens.weight", "model.embed_tokens.weight"),
        _rule(f"{_LAYER}.input_layernorm.weight", f"{_LAYER}.input_layernorm.weight"),
        *(
            _rule(f"{_LAYER}.self_attn.{name}_proj.{{p}}", f"{_LAYER}.self_attn.{name}_proj.{{p}}")
            for name in ("q", "k", "v", "o")
        ),
        _rule(f"{_LAYER}.post_attention_layernorm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
        *(
            _rule(f"{_LAYER}.mlp.{name}_proj.{{p}}", f"{_LAYER}.mlp.{name}_proj.{{p}}")
            for name in ("gate", "up", "down")
        ),
        _rule("model.norm.weight", "model.norm.weight"),
        _rule("lm_head.weight", "lm_head.weight"),
    ),
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    prefix="model.",
    ignored=("*rotary_emb.inv_freq",),
)

_GPT2_LAYER = "transformer.h.{i}"

GPT2 = KeyMap(
    rules=(
        _rule("transformer.wte.weight", "model.embed_tokens.weight"),
        _rule("transformer.wpe.weight", "model.position.weight"),
        _rule(f"{_GPT2_LAYER}.ln_1.{{p}}", f"{_LAYER}.input_layernorm.{{p}}"),
        _rule(
            f"{_GPT2_LAYER}.attn.c_attn.{{p}}",
            *(f"{_LAYER}.self_attn.{name}_proj.{{p}}" for name in ("q", "k", "v")),
            transposed=True,
        ),
        _rule(f"{_GPT2_LAYER}.attn.c_proj.{{p}}", f"{_LAYER}.self_attn.o_proj.{{p}}", transposed=True),
        _rule(f"{_GPT2_LAYER}.ln_2.{{p}}", f"{_LAYER}.post_attention_layernorm.{{p}}"),
        _rule(f"{_GPT2_LAYER}.mlp.c_fc.{{p}}", f"{_LAYER}.mlp.up_proj.{{p}}", transposed=True),
        _rule(f"{_GPT2_LAYER}.mlp.c_proj.{{p}}", f"{_LAYER}.mlp.down_proj.{{p}}", transposed=True),
        _rule("transformer.ln_f.{p}", "model.norm.{p}"),
        _rule("lm_head.weight", "lm_head.weight"),
    ),
    aliases={"lm_head.weight": "transformer.wte.weight"},
    prefix="transformer.",
    ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)

_ROFORMER_LAYER = "roformer.encoder.layer.{i}"

ROFORMER = KeyMap(
    rules=(
        _rule("roformer.embeddings.word_embeddings.weight", "model.embed_tokens.weight"),
        _rule("roformer.embeddings.token_type_embeddings.weight", "model.embed_segments.weight"),
        _rule("roformer.embeddings.LayerNorm.{p}", "model.embed_norm.{p}"),
        _rule("roformer.embeddings_project.{p}", "model.embed_proj.{p}"),
        *(
            _rule(f"{_ROFORMER_LAYER}.attention.self.{theirs}.{{p}}", f"{_LAYER}.self_attn.{ours}_proj.{{p}}")
            for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        _rule(f"{_ROFORMER_LAYER}.attention.output.dense.{{p}}", f"{_LAYER}.self_attn.o_proj.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.attention.output.LayerNorm.{{p}}", f"{_LAYER}.post_attention_layernorm.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.intermediate.dense.{{p}}", f"{_LAYER}.mlp.up_proj.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.output.dense.{{p}}", f"{_LAYER}.mlp.down_proj.{{p}}"),
        _rule(f"{_ROFORMER_LAYER}.output.LayerNorm.{{p}}", f"{_LAYER}.post_feedforward_layernorm.{{p}}"),
        _rule("cls.predictions.transform.dense.{p}", "head_transform.dense.{p}"),
        _rule("cls.predictions.transform.LayerNorm.{p}", "head_transform.norm.{p}"),
        _rule("cls.predictions.bias", "lm_head.bias"),
    ),
    aliases={
        "cls.predictions.decoder.weight": "roformer.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    prefix="roformer.",
    ignored=("*encoder.embed_positions.weight", "*embeddings.position_ids"),
)

_BART_SIDE = "model.{side}"
_BART_LAYER = "model.{side}.layers.{i}"

BART = KeyMap(
    rules=tuple(
        _rule(name, name)
        for name in (
            "model.shared.weight",
            f"{_BART_SIDE}.embed_positions.weight",
            f"{_BART_SIDE}.layernorm_embedding.{{p}}",
            *(
                f"{_BART_LAYER}.{attention}.{name}_proj.{{p}}"
                for attention in ("self_attn", "encoder_attn")
                for name in ("q", "k", "v", "out")
            ),
            *(f"{_BART_LAYER}.{name}_layer_norm.{{p}}" for name in ("self_attn", "encoder_attn", "final")),
            *(f"{_BART_LAYER}.{name}.{{p}}" for name in ("fc1", "fc2")),
            "lm_head.weight",
            "final_logits_bias",
        )
    ),
    aliases=dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        "model.shared.weight",
    ),
    prefix="model.",
    ignored=("*encoder.version", "*decoder.version"),
    optional=frozenset({"final_logits_bias"}),
)

VOLVELLE = KeyMap(
    rules=(_rule("{rest}", "{rest}"),),
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    prefix="model.",
)
"""Our own files: every parameter under its own name."""

KEY_MAPS: dict[Family | Literal["bart"], KeyMap] = {
    "llama": LLAMA, "qwen2": LLAMA, "gpt2": GPT2, "roformer": ROFORMER, "volvelle": VOLVELLE, "bart": BART,
}  # fmt: skip
"""The map of each family; Qwen2 uses Llama's names."""
