"""GGUF models: the weights of the original come back bit by bit, and what does not fit is refused by name."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize
from tests.systems.language.gguf_writing import export, tokenizer_metadata, write

from volvelle.errors import VolvelleError
from volvelle.parts.position.rope import convert_rope_layout
from volvelle.systems.language.gguf import read_gguf
from volvelle.systems.language.huggingface import from_tensors


def llama_file(tmp_path, *, change=None, **config):
    """A tiny Llama without transformers: random tensors under llama.cpp's names."""
    rng = np.random.default_rng(0)
    words = tokenizer_metadata()
    count = len(words["tokenizer.ggml.tokens"])
    metadata = words | {
        "llama.block_count": 2,
        "llama.context_length": 32,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **{key: value for key, value in config.items() if not key.startswith("tensor ")},
    }
    shapes = {"token_embd.weight": (count, 32), "output_norm.weight": (32,)}
    for i in range(2):
        layer = {"attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
        layer |= {"attn_output": (32, 32), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if change:
        change(metadata, tensors)
    return write(tmp_path / "tiny.gguf", metadata, tensors), tensors


def tiny(family: str, vocabulary: int):
    """A transformers model with random weights, biases and norms that are not 0 and 1, and its shapes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shapes = {"vocab_size": vocabulary, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    gated = {"intermediate_size": 160, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if family == "llama":
        theta = {"rope_type": "default", "rope_theta": 5e4}
        config = transformers.LlamaConfig(**shapes, **gated, rope_parameters=theta, attention_bias=True)
        model = transformers.LlamaForCausalLM(config)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**shapes, **gated, tie_word_embeddings=True, rms_norm_eps=1e-5)
        model = transformers.Qwen2ForCausalLM(config)
    else:
        config = transformers.GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=96, n_layer=2, n_head=6)
        model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.peer
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_weights_and_logits_equal_the_original(tmp_path, family):
    words = tokenizer_metadata()
    theirs = tiny(family, len(words["tokenizer.ggml.tokens"]))
    metadata, tensors = export(theirs)
    file = read_gguf(write(tmp_path / "a.gguf", words | metadata, tensors, family))
    for name, tensor in theirs.state_dict().items():
        if name in file.tensors:
            torch.testing.assert_close(file.tensors[name], tensor, rtol=0, atol=0)
        else:
            assert name == "lm_head.weight"
            assert file.config["tie_word_embeddings"]
    ours = from_tensors(file.config, file.tensors, source="a.gguf")
    ids = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0], ids=lambda k: k.name)
def test_quantised_models_equal_transformers_own_reading(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    words = tokenizer_metadata()
    metadata, tensors = export(tiny("qwen2", len(words["tokenizer.ggml.tokens"])), kind)
    path = write(tmp_path / "a.gguf", words | metadata, tensors, "qwen2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    file = read_gguf(path)
    ours = from_tensors(file.config, file.tensors, source="a.gguf")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-4)


def test_config_and_dtype(tmp_path):
    path, _ = llama_file(tmp_path, **{"llama.rope.freq_base": 1e5})
    file = read_gguf(path, torch.bfloat16)
    config = file.config
    assert config["model_type"] == "llama"
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e5}
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 8)
    assert config["tie_word_embeddings"]
    assert config["eos_token_id"] == file.tokenizer.eos_ids[0]
    assert {tensor.dtype for tensor in file.tensors.values()} == {torch.bfloat16}
    assert len(file.tensors) == 20


def test_rows_of_q_and_k_are_put_back_and_blocks_are_raw(tmp_path):
    path, tensors = llama_file(tmp_path)
    file = read_gguf(path)
    for name, heads in (("q", 4), ("k", 2)):
        stored = torch.from_numpy(tensors[f"blk.1.attn_{name}.weight"])
        found = file.tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
        assert not torch.equal(found, stored)
        torch.testing.assert_close(convert_rope_layout(found, heads, to="interleaved"), stored, rtol=0, atol=0)
        raw = file.blocks(f"model.layers.1.self_attn.{name}_proj.weight").raw
        np.testing.assert_array_equal(dequantize(raw.view(np.float32), Q.F32), tensors[f"blk.1.attn_{name}.weight"])
    assert file.tensors.where("model.layers.0.self_attn.k_proj.weight").change == "k_rows"


def llama3_divisors(factor, base=10000.0, width=8, original=8192):
    """Llama 3.1's published rule, frequency by frequency."""
    found = []
    for i in range(0, width, 2):
        wave = 2 * np.pi * base ** (i / width)
        if wave < original / 4.0:
            found.append(1.0)
        elif wave > original / 1.0:
            found.append(factor)
        else:
            smooth = (original / wave - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def test_llama3_scaling_is_recovered_from_the_stored_divisors(tmp_path):
    def change(metadata, tensors):
        metadata["llama.rope.freq_base"] = 5e5
        tensors["rope_freqs.weight"] = llama3_divisors(32.0, 5e5)

    path, _ = llama_file(tmp_path, change=change)
    rope = read_gguf(path).config["rope_parameters"]
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == pytest.approx(32)
    assert (rope["original_max_position_embeddings"], rope["high_freq_factor"]) == (8192, 4.0)


def set_(key, value):
    return lambda metadata, tensors: metadata.__setitem__(key, value)


def reshape(name, array):
    return lambda metadata, tensors: tensors.__setitem__(name, array)


def drop(name):
    return lambda metadata, tensors: tensors.pop(name, None) is None and metadata.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
        (drop("token_embd.weight"), "tensor token_embd.weight is missing"),
        (drop("llama.block_count"), "metadata key llama.block_count is missing"),
        (drop("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon is missing"),
        (set_("llama.block_count", "two"), "llama.block_count must be a positive number, got two"),
        (set_("llama.block_count", 3), "tensor blk.2.attn_norm.weight is missing"),
        (set_("llama.block_count", 1), "unknown tensors blk.1"),
        (set_("llama.attention.head_count", 5), "not a multiple of the 5 heads"),
        (set_("llama.attention.head_count_kv", 3), "do not divide into 3 groups"),
        (set_("llama.attention.head_count_kv", 4), "tensor blk.0.attn_k.weight has shape"),
        (set_("llama.rope.dimension_count", 4), "part of the head"),
        (set_("llama.rope.scaling.type", "su"), "rope scaling 'su' is not supported"),
        (set_("llama.attention.layer_norm_rms_epsilon", float("nan")), "must be a positive number, got nan"),
        (set_("tokenizer.ggml.eos_token_id", 9999), "eos_token_id is none of the"),
        (reshape("blk.0.ffn_gate_inp.weight", np.ones((4, 32), np.float32)), "unknown tensors blk.0.ffn_gate_inp"),
        (reshape("rope_freqs.weight", np.array([1, 2, 3, 4], np.float32)), "does not follow Llama 3.1"),
        (reshape("blk.0.attn_q.bias", np.ones(32, np.float32)), "biases on a part"),
        (reshape("token_embd.weight", np.ones((7, 32), np.float32)), "eos_token_id is none of the 7 tokens"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, change, says):
    path, _ = llama_file(tmp_path, change=change)
    with pytest.raises(VolvelleError, match=says) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_unknown_architecture_lists_the_known(tmp_path):
    path = write(tmp_path / "a.gguf", {}, {"token_embd.weight": np.ones((2, 32), np.float32)}, "qwen3")
    with pytest.raises(VolvelleError, match="architecture 'qwen3' is not supported") as caught:
        read_gguf(path)
    assert caught.value.tip == "did you mean qwen2? known: llama, qwen2, gpt2"


def test_flipped_header_bits_never_crash(tmp_path):
    """A damaged header ends in a VolvelleError or in a model: no other exception, no runaway allocation."""
    path, _ = llama_file(tmp_path)
    content = path.read_bytes()
    header = content.index(b"blk.1.ffn_down.weight") + 60
    assert header < len(content) // 2
    rng = random.Random(0)
    messages = []
    for _ in range(400):
        damaged = bytearray(content)
        # Half of the flips fall on the first part, where lengths and counts lie closest together.
        for _ in range(rng.choice((1, 1, 3))):
            position = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(64)
            damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            file = read_gguf(path)
            assert file.tokenizer.vocabulary
            assert file.tensors["model.norm.weight"].shape == (file.config["hidden_size"],)
        except VolvelleError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 400
    assert all("tiny.gguf" in message for message in messages)


def test_flipped_bits_in_every_number_of_the_metadata(tmp_path):
    """Counts, sizes and ids, one bit at a time: the values that a reader is tempted to trust."""
    path, _ = llama_file(tmp_path)
    content = path.read_bytes()
    keys = ["llama.block_count", "llama.embedding_length", "llama.attention.head_count", "llama.context_length"]
    for key in [*keys, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.token_type", "tokenizer.ggml.tokens"]:
        start = content.index(key.encode()) + len(key)
        for bit in range(0, 8 * 16, 3):
            damaged = bytearray(content)
            damaged[start + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with contextlib.suppress(VolvelleError):
                assert read_gguf(path).tokenizer.vocabulary
