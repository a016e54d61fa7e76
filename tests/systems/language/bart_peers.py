"""Small random BARTs of transformers, and the same weights in our EncoderDecoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.huggingface import from_tensors

VOCABULARY, CONTEXT = 97, 64
SIZES = {
    "vocab_size": VOCABULARY, "d_model": 48, "max_position_embeddings": CONTEXT, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "dropout": 0.0,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "bart": {},
    "scaled": {"scale_embedding": True, "activation_function": "gelu_new"},
    "lopsided": {
        "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 6, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 40, "activation_function": "relu",
    },
}  # fmt: skip


def make_bart(name: str = "bart", dtype: torch.dtype = torch.float32, seed: int = 7, **changes: Any) -> Any:
    """A transformers BART with random weights, every bias, norm and the bias of the logits included, in eval mode."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BartConfig(**(SIZES | VARIANTS[name] | changes))
    peer = transformers.BartForConditionalGeneration(config).eval()
    for key, parameter in peer.named_parameters():
        centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    torch.nn.init.normal_(peer.final_logits_bias, std=0.3)
    return peer.to(dtype)


def as_ours(peer: Any, dtype: torch.dtype | None = None) -> EncoderDecoder:
    """The peer's weights in an EncoderDecoder."""
    model = from_tensors(peer.config.to_dict(), peer.state_dict(), source="peer", dtype=dtype)
    assert isinstance(model, EncoderDecoder)
    return model


def some_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed + length))


def padding(batch: int, length: int, side: str) -> Tensor:
    """True = real: rows of different lengths, padded on one side; the first row is whole."""
    lengths = torch.tensor([max(1, length - (3 * row) % length) for row in range(batch)])
    slots = torch.arange(length)
    return slots < lengths[:, None] if side == "right" else slots >= length - lengths[:, None]
