"""The modules a `LanguageConfig` names: norms, MLPs, position encodings, attention, and the two kinds of block.

Shapes: b batch, n new tokens, m tokens in reach (cache included), h heads, d features a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.before import Past
from volvelle.parts.attention.linear import linear_attention
from volvelle.parts.attention.state_cache import StateCache
from volvelle.parts.position.deberta import DisentangledBias
from volvelle.parts.position.encoding import Bias, PositionEncoding, Turning
from volvelle.systems.language import config as c
from volvelle.systems.language.gated import gated_product
from volvelle.systems.language.norms import RMSNorm
from volvelle.systems.language.positions import build_layer_position


class Step(NamedTuple):
    """What all blocks of one forward share, prepared once.

    `mask` is bool, broadcastable to (b, h, n, m), True = may attend. `positions` of the queries, (n,) or (b, n), and of
    the keys, (m,) or (b, m), are there where a score bias asks for them; `bias` is the one that all layers share,
    `vectors` what each layer makes its own of. `cache` is of the kind that the attention of the layers needs.
    `documents` (b, n) are the numbers of the texts packed into a row, each of which sees itself only.
    """

    rotation: Turning | None
    mask: Tensor | None
    causal: bool
    cache: Past | StateCache | None
    bias: Bias | None = None
    positions: tuple[Tensor, Tensor] | None = None
    vectors: Tensor | None = None
    documents: Tensor | None = None


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
            return RMSNorm(width, eps=spec.eps)
        case c.LayerNorm():
            return nn.LayerNorm(width, eps=spec.eps)


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
        return self.down_proj(gated_product(self.activation, self.gate_proj(x), self.up_proj(x)))


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
        return self.o_proj(self.attend(q, k, v, step).transpose(1, 2).reshape(b, n, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Return (b, h, n, d) for q (b, h, n, d), k and v (b, h_kv, n, d), before any rotation."""
        if step.rotation is not None:
            q, k = step.rotation(q, k)
            v = step.rotation.turn(v) if self.rotate_value else v
        if step.cache is not None:
            k, v = cast("Past", step.cache).append(self.index, k, v)
        dropout = self.dropout if self.training else 0.0
        at, among = (None, None) if step.positions is None else step.positions
        return attention(
            q,
            k,
            v,
            mask=step.mask,
            bias=self._bias(step),
            causal=step.causal,
            segments=step.documents,
            dropout=dropout,
            q_positions=at,
            k_positions=among,
        )

    def _bias(self, step: Step) -> Bias | None:
        own = self._modules.get("position")
        if isinstance(own, DisentangledBias):
            return own.bias(step.vectors)
        return own.bias() if isinstance(own, PositionEncoding) else step.bias


class LinearSelfAttention(SelfAttention):
    """Multi-head linear attention with a state of fixed size for its layer; rotary positions turn the numerator."""

    def __init__(self, config: c.LanguageConfig, index: int, spec: c.LinearAttention):
        super().__init__(config, index)
        self.chunk, self.eps = spec.chunk, spec.eps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Return (b, h, n, d) for q (b, h, n, d), k and v (b, h_kv, n, d), before any rotation."""
        if step.rotation is not None and self.rotate_value:
            v = step.rotation.turn(v)
        mask = step.mask
        if mask is not None:  # (b, 1, 1, n) hides padding, (b or 1, 1, n, n) stands in the place of causal order
            mask = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0]
        options: dict[str, Any] = {"rotation": step.rotation, "mask": mask, "chunk": self.chunk, "eps": self.eps}
        if step.cache is None:
            return linear_attention(q, k, v, causal=step.causal, segments=step.documents, **options)
        if not isinstance(step.cache, StateCache):
            raise no_keys()
        out, after = linear_attention(q, k, v, state=step.cache.state(self.index), **options)
        step.cache.append(self.index, after, k, v, step.rotation)
        return out


def no_keys() -> VolvelleError:
    """The error of keys that should come before a text which is attended to linearly."""
    return VolvelleError(
        "linear attention keeps a state in place of keys: no keys can come before a text",
        tip="prefix and prompt tuning need softmax attention; adapt with lora",
    )


def build_attention(config: c.LanguageConfig, index: int) -> SelfAttention:
    """The attention of layer `index`, of the kind that the configuration names."""
    match config.attention:
        case c.SoftmaxAttention():
            return SelfAttention(config, index)
        case c.LinearAttention():
            return LinearSelfAttention(config, index, config.attention)


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Llama, GPT-2)."""

    def __init__(self, config: c.LanguageConfig, index: int):
        super().__init__()
        self.input_layernorm = build_norm(config.norm, config.width)
        self.self_attn = build_attention(config, index)
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
        self.self_attn = build_attention(config, index)
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


def standing_alone(
    ids: Tensor, mask: Tensor | None, causal: bool, *, merged: bool = True
) -> tuple[Tensor, Tensor | None, bool]:
    """Positions, attention mask and causality of a text (b, n) that nothing comes before; mask as in `Decoder.hidden`.

    A position is the number of real tokens before it. The mask comes back broadcastable to (b, h, n, n): that of
    padding with causal order in it, unless it should not be `merged`, for layers that hold no pairs.
    """
    n = ids.shape[1]
    if mask is None:
        return torch.arange(n, device=ids.device), None, causal
    if mask.dtype != torch.bool:
        return places(mask), written_out(mask, causal)[:, None], False
    if mask.ndim == 3:
        return (mask.sum(-1) - 1).clamp(min=0), mask[:, None], False
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    allowed = mask[:, None, None]
    if causal and merged:
        allowed = allowed & torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
    return positions, allowed, causal and not merged


def places(documents: Tensor) -> Tensor:
    """Number the tokens of each text of a packed row from 0; documents are those of `Decoder.hidden`, (b, n)."""
    place = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff() != 0
    return place - torch.where(begins, place, 0).cummax(1).values


def written_out(documents: Tensor, causal: bool) -> Tensor:
    """The mask (b, n, n) of packed rows, for what needs one: True where a token may attend to another."""
    same = documents[:, :, None] == documents[:, None]
    return same.tril() if causal else same


def check_ids(what: str, ids: Tensor, mask: Tensor | None) -> None:
    """Raise VolvelleError where token ids are not integers (b, n), or the mask is none of `Decoder.hidden`."""
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        raise VolvelleError(f"{what} must be integers of shape (b, n), got {ids.dtype} {tuple(ids.shape)}")
    b, n = ids.shape
    if mask is None or (mask.dtype == torch.int64 and tuple(mask.shape) == (b, n)):
        return
    if mask.dtype != torch.bool or tuple(mask.shape) not in {(b, n), (b, n, n)}:
        raise VolvelleError(
            f"mask must be bool of shape {(b, n)} or {(b, n, n)}, or int64 of {(b, n)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
