"""Write small GGUF files for tests, with llama.cpp's names and its conversions restated independently of src/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def write(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray | tuple[np.ndarray, Q]],
    architecture: str = "llama",
) -> Path:
    """A GGUF file. Tensors are fp32 arrays, or (raw bytes, type); value types follow Python's."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_metadata(words: int = 40, control: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> dict[str, Any]:
    """A byte-level vocabulary of 256 bytes, a few merges and the control tokens: 256 + 2 * words entries at most."""
    alphabet = byte_alphabet()
    tokens, merges = list(alphabet), []
    for i in range(words):
        left, right = alphabet[97 - 33 + i % 26], alphabet[97 - 33 + (i * 7 + 3) % 26]
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    kinds = [1] * len(tokens) + [3] * len(control)
    tokens += control
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, printable bytes first."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in own] + [chr(256 + i) for i in range(256 - len(own))]


def export(model: Any, kind: Q = Q.F32) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a transformers model, as llama.cpp's converter writes them."""
    config = model.config
    arch = config.model_type
    permuted = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    tensors: dict[str, Any] = {}
    for name, parameter in model.state_dict().items():
        base, _, leaf = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = parameter.float().numpy()
        if base in OUTER:
            tensors[f"{OUTER[base]}.{leaf}"] = _stored(array, kind)
            continue
        layer, _, inner = base.split("layers." if ".layers." in base else ".h.", 1)[1].partition(".")
        part = inner.rpartition(".")[2]
        if arch == "llama" and part in permuted:
            # convert_hf_to_gguf: (heads, 2, d / 2, ...) -> (heads, d / 2, 2, ...)
            heads = permuted[part]
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if arch == "gpt2" and part.startswith("c_"):
            array = array.T
        tensors[f"blk.{layer}.{LINEAR[inner]}.{leaf}"] = _stored(array, kind)
    return _metadata(config, arch), tensors


def _stored(array: np.ndarray, kind: Q) -> Any:
    if array.ndim == 1 or kind == Q.F32:
        return np.ascontiguousarray(array, dtype=np.float32)
    return quantize(np.ascontiguousarray(array), kind), kind


def _metadata(config: Any, arch: str) -> dict[str, Any]:
    common = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
    }
    if arch == "gpt2":
        inner = config.n_inner or 4 * config.n_embd
        return common | {
            "gpt2.feed_forward_length": inner,
            "gpt2.attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    return common | {
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
    }
