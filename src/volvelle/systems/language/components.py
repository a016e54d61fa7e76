"""The modules a `LanguageConfig` names: norms, MLPs, position encodings, attention, and the two kinds of block.

Shapes: b batch, n new tokens, m tokens in reach (cache included), h heads, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.cache import KVCache
from volvelle.parts.position import rope_scaling
from volvelle.parts.position.alibi import ALiBi
from volvelle.parts.position.complex_order import ComplexPositions
from volvelle.parts.position.convolutional import ConvPositions
from volvelle.parts.position.encoding import Bias, PositionEncoding, Turning
from volvelle.parts.position.hierarchical import HierarchicalPositions
from volvelle.parts.position.learned import LearnedPositions
from volvelle.parts.position.multiplicative import MultiplicativePositions
from volvelle.parts.position.recurrent import RecurrentPositions
from volvelle.parts.position.rope import RotaryEmbedding
from volvelle.parts.position.shaw import ShawBias
from volvelle.parts.position.sinusoidal import SinusoidalPositions
from volvelle.parts.position.t5 import T5Bias
from volvelle.parts.position.transformer_xl import TransformerXLBias
from volvelle.systems.language import config as c


class Step(NamedTuple):
    """What all blocks of one forward share, prepared once.

    `mask` is bool, broadcastable to (b, h, n, m), True = may attend. `positions` of the queries, (n,) or (b, n), and of
    the keys, (m,) or (b, m), are there where a score bias asks for them; `bias` is the one that all layers share.
    """

    rotation: Turning | None
    mask: Tensor | None
    causal: bool
    cache: KVCache | None
    bias: Bias | None = None
    positions: tuple[Tensor, Tensor] | None = None


ACTIVATIONS: dict[c.Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def build_norm(spec: c.RMSNorm | c.LayerNorm, width: int) -> nn.Module:
    """The normalisation over the last dimension that `spec` names."""
    match spec:
        case c.RMSNorm():
            return nn.RMSNorm(width, eps=spec.eps)
        case c.LayerNorm():
            return nn.LayerNorm(width, eps=spec.eps)


def build_position(config: c.LanguageConfig) -> PositionEncoding:
    """The position encoding the configuration names, as far as all layers share it."""
    position, width = config.position, config.embedding_width
    match position:
        case c.Rope():
            scaling = _scaling(position.scaling, config.context)
            return RotaryEmbedding(config.rotated, base=position.base, layout=position.layout, scaling=scaling)
        case c.Learned():
            return LearnedPositions(config.context, width)
        case c.Sinusoidal():
            return SinusoidalPositions(width, base=position.base)
        case c.Hierarchical():
            return HierarchicalPositions(config.context, width, alpha=position.alpha)
        case c.Recurrent():
            return RecurrentPositions(width)
        case c.Multiplicative():
            return MultiplicativePositions(config.context, width)
        case c.Complex():
            return ComplexPositions(
                width, vocabulary=None if position.shared else config.vocabulary, base=position.base
            )
        case c.Convolutional():
            return ConvPositions(width, width=position.width, layers=position.layers)
        case c.T5():
            return T5Bias(
                config.heads,
                buckets=position.buckets,
                max_distance=position.max_distance,
                bidirectional=not config.causal,
            )
        case c.ALiBi():
            return ALiBi(config.heads)
        case c.NoPosition() | c.Shaw() | c.TransformerXL():
            return PositionEncoding()


def build_layer_position(config: c.LanguageConfig) -> PositionEncoding | None:
    """The position encoding that each layer has for itself, if the configuration names one."""
    position, d = config.position, config.head_width
    match position:
        case c.Shaw():
            right = 0 if config.causal else None
            return ShawBias(d, k=position.reach, right=right, value_width=d if position.values else None)
        case c.TransformerXL():
            return TransformerXLBias(config.heads, d, width=config.width, base=position.base)
        case _:
            return None


def _scaling(spec: c.RopeScaling | None, context: int) -> rope_scaling.Scaling | None:
    match spec:
        case None:
            return None
        case c.LinearScaling():
            return rope_scaling.LinearScaling(spec.factor)
        case c.DynamicScaling():
            return rope_scaling.DynamicNTKScaling(spec.factor, spec.original_context or context)
        case c.YarnScaling():
            return rope_scaling.YaRNScaling(
                spec.factor,
                spec.original_context,
                beta_fast=spec.beta_fast,
                beta_slow=spec.beta_slow,
                mscale=spec.mscale,
                mscale_all_dim=spec.mscale_all_dim,
                truncate=spec.truncate,
                given_attention_factor=spec.attention_factor,
            )
        case c.LongRopeScaling():
            return rope_scaling.LongRoPEScaling(
                spec.short_factors,
                spec.long_factors,
                spec.original_context,
                factor=context / spec.original_context if spec.factor is None else spec.factor,
                given_attention_factor=spec.attention_factor,
            )
        case c.Llama3Scaling():
            return rope_scaling.Llama3Scaling(
                spec.factor, spec.original_context, spec.low_frequency_factor, spec.high_frequency_factor
            )


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, spec: c.GatedMLP, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, spec.width, bias=spec.bias)
        self.up_proj = nn.Linear(width, spec.width, bias=spec.bias)
        self.down_proj = nn.Linear(spec.width, width, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, spec: c.MLP, width: int):
        super().__init__()
        self.up_proj = nn.Linear(width, spec.width, bias=spec.bias)
        self.down_proj = nn.Linear(spec.width, width, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        return self.down_proj(self.activation(self.up_proj(x)))


def build_mlp(spec: c.GatedMLP | c.MLP, width: int) -> nn.Module:
    """The feed-forward network that `spec` names."""
    return GatedMLP(spec, width) if isinstance(spec, c.GatedMLP) else MLP(spec, width)


class SelfAttention(nn.Module):
    """Multi-head attention with grouped key/value heads, rotary positions and a cache slot for its layer."""

    def __init__(self, config: c.LanguageConfig, index: int):
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.rotate_value = isinstance(config.position, c.Rope) and config.position.rotate_value
        self.dropout = config.dropout.attention
        width, inner, kv_inner = config.width, self.heads * self.head_width, self.kv_heads * self.head_width
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.out_bias)
        own = build_layer_position(config)
        if own is not None:
            self.position = own

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, -1, self.head_width).transpose(1, 2)  # (b, h, n, d)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if step.rotation is not None:
            q, k = step.rotation(q, k)
            v = step.rotation.turn(v) if self.rotate_value else v
        if step.cache is not None:
            k, v = step.cache.append(self.index, k, v)
        dropout = self.dropout if self.training else 0.0
        bias = self.position.bias() if "position" in self._modules else step.bias
        at, among = (None, None) if step.positions is None else step.positions
        out = attention(
            q, k, v, mask=step.mask, bias=bias, causal=step.causal, dropout=dropout, q_positions=at, k_positions=among
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Llama, GPT-2)."""

    def __init__(self, config: c.LanguageConfig, index: int):
        super().__init__()
        self.input_layernorm = build_norm(config.norm, config.width)
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = build_norm(config.norm, config.width)
        self.mlp = build_mlp(config.mlp, config.width)
        self.dropout = config.dropout.residual

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        x = x + drop(self.self_attn(self.input_layernorm(x), step), self.dropout, self.training)
        return x + drop(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)) (the original Transformer, BERT, RoFormer)."""

    def __init__(self, config: c.LanguageConfig, index: int):
        super().__init__()
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = build_norm(config.norm, config.width)
        self.mlp = build_mlp(config.mlp, config.width)
        self.post_feedforward_layernorm = build_norm(config.norm, config.width)
        self.dropout = config.dropout.residual

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        x = self.post_attention_layernorm(x + drop(self.self_attn(x, step), self.dropout, self.training))
        return self.post_feedforward_layernorm(x + drop(self.mlp(x), self.dropout, self.training))


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout at rate p while training; no kernel otherwise."""
    return F.dropout(x, p) if training and p else x


class HeadTransform(nn.Module):
    """norm(act(dense(x))), what BERT puts before the output projection."""

    def __init__(self, config: c.LanguageConfig, activation: c.Activation):
        super().__init__()
        self.dense = nn.Linear(config.width, config.embedding_width)
        self.norm = build_norm(config.norm, config.embedding_width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, n, width) -> (b, n, embedding_width)."""
        return self.norm(self.activation(self.dense(x)))
