"""Small random models of transformers, one a family, and the same weights in our Decoder."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import from_tensors

VOCABULARY = 97
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_SIZES = _SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 1024}
_ROFORMER_SIZES = _SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 600}
_GPT2_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}

# name -> (model class, configuration class, configuration)
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA_SIZES),
    "smollm2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA_SIZES | {"tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5},
    ),
    "llama-biased": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA_SIZES | {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA_SIZES | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2_SIZES),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", _GPT2_SIZES | {"n_inner": 60, "tie_word_embeddings": False}),
    "roformer-causal": (
        "RoFormerForCausalLM",
        "RoFormerConfig",
        _ROFORMER_SIZES | {"embedding_size": 24, "is_decoder": True},
    ),
    "roformer-masked": ("RoFormerForMaskedLM", "RoFormerConfig", _ROFORMER_SIZES | {"embedding_size": 24}),
    "roformer-value": (
        "RoFormerForCausalLM",
        "RoFormerConfig",
        _ROFORMER_SIZES | {"rotary_value": True, "is_decoder": True, "hidden_act": "relu"},
    ),
}
CAUSAL = [name for name in PEERS if name != "roformer-masked"]


def make_peer(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers model with random weights, every bias and norm included, in evaluation mode."""
    import transformers

    model_class, config_class, values = PEERS[name]
    config = getattr(transformers, config_class)(**(values | changes))
    torch.manual_seed(7)
    peer = getattr(transformers, model_class)(config).eval()
    for key, parameter in peer.named_parameters():
        if parameter.requires_grad:
            centre = 1.0 if "norm" in key.lower() or ".ln_" in key else 0.0
            torch.nn.init.normal_(parameter, mean=centre if key.endswith("weight") else 0.0, std=0.12)
    if dtype == torch.float64:
        _make_exact(peer.double())
    return peer.to(dtype)


def as_ours(peer: Any, dtype: torch.dtype | None = None) -> Decoder:
    """The peer's weights in a Decoder."""
    return from_tensors(peer.config.to_dict(), peer.state_dict(), source="peer", dtype=dtype)


def peer_logits(peer: Any, ids: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
    """The peer's logits; RoFormer takes no positions and counts slots."""
    options = {} if positions is None or peer.config.model_type == "roformer" else {"position_ids": positions}
    return peer(ids, attention_mask=mask.long(), **options).logits


def _make_exact(peer: Any) -> None:
    """Take out the fp32 steps inside the peers' layers, so that fp64 compares everything else at fp64."""
    for module in peer.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = types.MethodType(_rms_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = types.MethodType(_rotary, module)
        elif kind.startswith("RoFormerSinusoidal"):
            positions, dim = module.weight.shape
            angle = torch.arange(positions).double()[:, None] / 10000 ** (torch.arange(0, dim, 2).double() / dim)
            module.weight.data = torch.cat((angle.sin(), angle.cos()), dim=-1)


def _rms_norm(self, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    config = self.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    angle = position_ids[..., None].double() * theta
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()
