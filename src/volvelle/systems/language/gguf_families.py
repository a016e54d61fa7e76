"""What llama.cpp's metadata keys and tensor names are in Hugging Face's terms: one table a family.

Shapes are written with the letters v vocabulary, w width, q heads * head width, k kv heads * head width, f MLP width,
n context, as a Linear layer holds them (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from volvelle.errors import did_you_mean
from volvelle.parts.position.rope import convert_rope_layout
from volvelle.systems.language.gguf_file import GGUFFile

# llama.cpp stores q and k of these two with rows interleaved for its rotary kernel; "transpose" is GPT-2's Conv1D.
Change = Literal["same", "q_rows", "k_rows", "transpose"]


@dataclass(frozen=True)
class Rule:
    """`theirs` in the file is `hugging_face`; `{i}` is the layer; an `optional` tensor may be absent."""

    theirs: str
    hugging_face: str
    shape: str
    change: Change = "same"
    optional: bool = False


@dataclass(frozen=True)
class Placed:
    """A tensor found in the file: its stored name, and how its rows become Hugging Face's."""

    theirs: str
    change: Change


@dataclass(frozen=True)
class Family:
    """`config` turns metadata and sizes into the fields of config.json; `rules` name every tensor."""

    sizes: Callable[[GGUFFile], dict[str, int]]
    config: Callable[[GGUFFile, dict[str, int]], dict[str, Any]]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()


def number(file: GGUFFile, key: str, default: int | float | None = None) -> Any:
    """A metadata number. Raises VolvelleError when it is absent without default, or no finite positive number."""
    value = file.metadata.get(key, default)
    if value is None:
        raise file.error(f"metadata key {key} is missing")
    whole = default is None or isinstance(default, int)
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not 0 < value < (1 << 31) or not math.isfinite(value):
        raise file.error(f"metadata key {key} must be a positive number, got {str(value)[:80]}")
    # Metadata floats are fp32: the shortest decimal that means the same number is what the model's author wrote.
    return value if whole else float(str(np.float32(value)))


def real(file: GGUFFile, key: str) -> float:
    """A metadata number with a fraction, which must be there."""
    if key not in file.metadata:
        raise file.error(f"metadata key {key} is missing")
    return number(file, key, 1.0)


def family_of(file: GGUFFile) -> tuple[str, Family]:
    """The architecture's name and table. Raises VolvelleError that lists the known ones."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise file.error("metadata key general.architecture is missing")
    if name not in FAMILIES:
        known = f"known: {', '.join(FAMILIES)}"
        near = did_you_mean(name, FAMILIES)
        raise file.error(f"architecture {name[:80]!r} is not supported", tip=f"{near} {known}" if near else known)
    return name, FAMILIES[name]


def place(file: GGUFFile, family: Family, sizes: Mapping[str, int]) -> dict[str, Placed]:
    """Match every tensor of the file with the table: Hugging Face name -> where it lies.

    Raises VolvelleError for a missing or unknown tensor and for a shape that the metadata does not allow.
    """
    placed: dict[str, Placed] = {}
    used: set[str] = set()
    for rule, theirs, ours in _expand(family.rules, sizes["depth"]):
        info = file.tensors.get(theirs)
        if info is None:
            if rule.optional:
                continue
            raise file.error(f"tensor {theirs} is missing", tip="the file does not hold a whole model")
        shape = tuple(_size(term, sizes) for term in rule.shape.split())
        if info.shape != shape:
            raise file.error(f"tensor {theirs} has shape {info.shape}, the metadata asks for {shape}")
        placed[ours] = Placed(theirs, rule.change)
        used.add(theirs)
    unknown = [name for name in file.tensors if name not in used and name not in family.ignored]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise file.error(
            f"unknown tensors {', '.join(name[:80] for name in unknown[:3])}{more}",
            tip="the model uses parts (experts, extra norms) that are not built here",
        )
    return placed


def change_rows(tensor: Tensor, change: Change, heads: int, kv_heads: int) -> Tensor:
    """Undo what llama.cpp's converter did to a tensor."""
    if change == "transpose":
        return tensor.mT.contiguous() if tensor.ndim == 2 else tensor
    if change == "same":
        return tensor
    return convert_rope_layout(tensor, heads if change == "q_rows" else kv_heads, to="half")


def _expand(rules: tuple[Rule, ...], depth: int) -> Iterator[tuple[Rule, str, str]]:
    for rule in rules:
        for i in range(depth if "{i}" in rule.theirs else 1):
            yield rule, rule.theirs.format(i=i), rule.hugging_face.format(i=i)


def _size(term: str, sizes: Mapping[str, int]) -> int:
    return 3 * sizes[term[1:]] if term.startswith("3") else sizes[term]


def _common_sizes(file: GGUFFile, prefix: str) -> dict[str, int]:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.error("tensor token_embd.weight is missing", tip="the file does not hold a whole model")
    vocabulary = number(file, f"{prefix}.vocab_size", embedding.shape[0])
    heads = number(file, f"{prefix}.attention.head_count")
    width = number(file, f"{prefix}.embedding_length")
    if width % heads:
        raise file.error(f"{prefix}.embedding_length {width} is not a multiple of the {heads} heads")
    return {
        "v": vocabulary,
        "w": width,
        "f": number(file, f"{prefix}.feed_forward_length"),
        "n": number(file, f"{prefix}.context_length"),
        "depth": number(file, f"{prefix}.block_count"),
        "heads": heads,
    }


def _llama_sizes(prefix: str) -> Callable[[GGUFFile], dict[str, int]]:
    def sizes(file: GGUFFile) -> dict[str, int]:
        found = _common_sizes(file, prefix)
        kv_heads = number(file, f"{prefix}.attention.head_count_kv", found["heads"])
        head_width = number(file, f"{prefix}.attention.key_length", found["w"] // found["heads"])
        if number(file, f"{prefix}.attention.value_length", head_width) != head_width:
            raise file.error("heads whose values are wider or narrower than their keys are not supported")
        if number(file, f"{prefix}.rope.dimension_count", head_width) != head_width or head_width % 2:
            raise file.error("a rotary embedding over a part of the head is not supported")
        if found["heads"] % kv_heads:
            raise file.error(f"{found['heads']} heads do not divide into {kv_heads} groups of kv heads")
        both = {"q": found["heads"] * head_width, "k": kv_heads * head_width}
        return found | {"kv_heads": kv_heads, "head_width": head_width} | both

    return sizes


def _llama_config(prefix: str) -> Callable[[GGUFFile, dict[str, int]], dict[str, Any]]:
    def config(file: GGUFFile, sizes: dict[str, int]) -> dict[str, Any]:
        fields = {
            "model_type": prefix,
            "architectures": ["LlamaForCausalLM" if prefix == "llama" else "Qwen2ForCausalLM"],
            "hidden_size": sizes["w"],
            "intermediate_size": sizes["f"],
            "num_hidden_layers": sizes["depth"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": sizes["kv_heads"],
            "head_dim": sizes["head_width"],
            "hidden_act": "silu",
            "max_position_embeddings": sizes["n"],
            "rms_norm_eps": real(file, f"{prefix}.attention.layer_norm_rms_epsilon"),
            "rope_parameters": _rope(file, prefix, sizes),
        }
        biases = [name for name in file.tensors if name.startswith("blk.") and name.endswith(".bias")]
        if prefix == "llama":
            fields |= {"attention_bias": any(".attn_" in name for name in biases)}
            fields |= {"mlp_bias": any(".ffn_" in name for name in biases)}
            kinds = {name.split(".", 2)[2] for name in biases}
            whole = ({f"attn_{x}.bias" for x in ("q", "k", "v", "output")}, {f"ffn_{x}.bias" for x in _GATED})
            if any(kinds & group and group - kinds for group in whole):
                raise file.error(f"biases on a part of the layers are not supported: {', '.join(sorted(kinds))}")
        return fields

    return config


def _rope(file: GGUFFile, prefix: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Base and scaling. Llama 3.1's scaling is stored only as the divisors themselves, `rope_freqs.weight`."""
    theta = number(file, f"{prefix}.rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = file.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind in {"linear", "yarn"}:
        rope |= {"rope_type": kind, "factor": real(file, f"{prefix}.rope.scaling.factor")}
    elif kind != "none":
        raise file.error(f"rope scaling {str(kind)[:80]!r} is not supported", tip="known: none, linear, yarn")
    if kind == "yarn":
        original = f"{prefix}.rope.scaling.original_context_length"
        rope["original_max_position_embeddings"] = number(file, original)
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise file.error(f"rope_freqs.weight together with rope scaling {kind!r} is not supported")
        rope |= _llama3_scaling(file, theta, sizes["head_width"])
    return rope


def _llama3_scaling(file: GGUFFile, theta: float, head_width: int) -> dict[str, Any]:
    """Recover Llama 3.1's parameters from the stored divisors, and refuse divisors that they do not reproduce."""
    divisors = file.read("rope_freqs.weight", torch.float64)
    if tuple(divisors.shape) != (head_width // 2,) or not bool(torch.isfinite(divisors).all()):
        raise file.error(f"rope_freqs.weight must hold {head_width // 2} finite numbers")
    if bool((divisors == 1).all()):
        return {}
    low, high, original, factor = 1.0, 4.0, 8192, float(divisors.max())
    waves = 2 * math.pi * theta ** (torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    blend = ((original / waves - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    if not torch.allclose(divisors, expected, rtol=1e-4):
        raise file.error("rope_freqs.weight does not follow Llama 3.1's scaling, other tables are not supported")
    named = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {"rope_type": "llama3", "original_max_position_embeddings": original, **named}


_GATED = ("gate", "up", "down")
_HF = "model.layers.{i}"


def _llama_rules(permuted: bool) -> tuple[Rule, ...]:
    q_rows: Change = "q_rows" if permuted else "same"
    k_rows: Change = "k_rows" if permuted else "same"
    linear: tuple[tuple[str, str, str, Change], ...] = (
        ("attn_q", "self_attn.q_proj", "q w", q_rows),
        ("attn_k", "self_attn.k_proj", "k w", k_rows),
        ("attn_v", "self_attn.v_proj", "k w", "same"),
        ("attn_output", "self_attn.o_proj", "w q", "same"),
        ("ffn_gate", "mlp.gate_proj", "f w", "same"),
        ("ffn_up", "mlp.up_proj", "f w", "same"),
        ("ffn_down", "mlp.down_proj", "w f", "same"),
    )
    rules = [
        Rule("token_embd.weight", "model.embed_tokens.weight", "v w"),
        Rule("output_norm.weight", "model.norm.weight", "w"),
        Rule("output.weight", "lm_head.weight", "v w", optional=True),
        Rule("blk.{i}.attn_norm.weight", f"{_HF}.input_layernorm.weight", "w"),
        Rule("blk.{i}.ffn_norm.weight", f"{_HF}.post_attention_layernorm.weight", "w"),
    ]
    for theirs, ours, shape, change in linear:
        rules.append(Rule(f"blk.{{i}}.{theirs}.weight", f"{_HF}.{ours}.weight", shape, change))
        # Qwen2 always has biases on q, k and v and nowhere else; Llama models have them when the configuration says so.
        if permuted or theirs in {"attn_q", "attn_k", "attn_v"}:
            names = f"blk.{{i}}.{theirs}.bias", f"{_HF}.{ours}.bias"
            rules.append(Rule(*names, shape.split()[0], change, optional=permuted))
    return tuple(rules)


def _gpt2_config(file: GGUFFile, sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": sizes["w"],
        "n_inner": sizes["f"],
        "n_layer": sizes["depth"],
        "n_head": sizes["heads"],
        "n_positions": sizes["n"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": real(file, "gpt2.attention.layer_norm_epsilon"),
    }


def _gpt2_sizes(file: GGUFFile) -> dict[str, int]:
    sizes = _common_sizes(file, "gpt2")
    return sizes | {"kv_heads": sizes["heads"], "head_width": sizes["w"] // sizes["heads"]}


_GPT2_LINEAR = (
    ("attn_qkv", "attn.c_attn", "3w w"),
    ("attn_output", "attn.c_proj", "w w"),
    ("ffn_up", "mlp.c_fc", "f w"),
    ("ffn_down", "mlp.c_proj", "w f"),
)
_GPT2_RULES = (
    Rule("token_embd.weight", "transformer.wte.weight", "v w"),
    Rule("position_embd.weight", "transformer.wpe.weight", "n w"),
    Rule("output_norm.weight", "transformer.ln_f.weight", "w"),
    Rule("output_norm.bias", "transformer.ln_f.bias", "w"),
    Rule("output.weight", "lm_head.weight", "v w", optional=True),
    *(
        Rule(f"blk.{{i}}.{theirs}.{p}", f"transformer.h.{{i}}.{ours}.{p}", "w")
        for theirs, ours in (("attn_norm", "ln_1"), ("ffn_norm", "ln_2"))
        for p in ("weight", "bias")
    ),
    *(
        Rule(f"blk.{{i}}.{theirs}.weight", f"transformer.h.{{i}}.{ours}.weight", shape, "transpose")
        for theirs, ours, shape in _GPT2_LINEAR
    ),
    *(
        Rule(f"blk.{{i}}.{theirs}.bias", f"transformer.h.{{i}}.{ours}.bias", shape.split()[0])
        for theirs, ours, shape in _GPT2_LINEAR
    ),
)

FAMILIES = {
    "llama": Family(_llama_sizes("llama"), _llama_config("llama"), _llama_rules(True), ("rope_freqs.weight",)),
    "qwen2": Family(_llama_sizes("qwen2"), _llama_config("qwen2"), _llama_rules(False)),
    "gpt2": Family(_gpt2_sizes, _gpt2_config, _GPT2_RULES),
}
