"""Tiny models for the tests of prefixes and prompts."""

from __future__ import annotations

import torch
from torch import nn

from volvelle.systems.language import config as c
from volvelle.systems.language.decoder import Decoder

POSITIONS = (
    c.Rope(), c.Rope(dim=2, layout="interleaved", rotate_value=True), c.Learned(), c.Sinusoidal(), c.NoPosition(),
    c.Shaw(reach=3), c.TransformerXL(), c.T5(8, 16), c.ALiBi(), c.Recurrent(), c.Multiplicative(),
)  # fmt: skip
"""Encodings for which a text behind a trained prompt is the text behind the same words."""


def decoder(position: c.Position = POSITIONS[0], dtype=torch.float64, depth=2, seed=0, **changes) -> Decoder:
    """A random decoder of two blocks with grouped heads."""
    torch.manual_seed(seed)
    given = {"kv_heads": 2, "mlp": c.GatedMLP(12), "norm": c.RMSNorm(), "context": 32} | changes
    config = c.LanguageConfig("volvelle", 37, 16, depth, 4, position=position, **given)
    model = Decoder(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)  # so that attention is far from uniform
    return model


@torch.no_grad()
def shake(adapted, std=0.3, seed=1) -> None:
    """Move all trained parameters off their start."""
    torch.manual_seed(seed)
    for parameter in adapted.trainable.values():
        parameter.add_(torch.randn_like(parameter) * std)


def llama(dtype=torch.float32, **changes) -> nn.Module:
    """transformers' Llama with grouped heads."""
    import transformers

    sizes = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval().to(dtype)


def gpt2(dtype=torch.float32, **changes) -> nn.Module:
    """transformers' GPT-2."""
    import transformers

    sizes = {
        "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 48, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval().to(dtype)


def other(family: str) -> nn.Module:
    """Another of transformers' decoder families."""
    import transformers

    sizes = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "GPTNeoX":
        del sizes["num_key_value_heads"]  # it has as many as heads, and would keep the number without using it
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()
