"""The blocks of an encoder-decoder: attention over the own text, over the source, and the feed-forward network.

Modules carry the names of BART in transformers (q_proj, k_proj, v_proj, out_proj, fc1, fc2), which adapters go by.

Shapes: b rows of answers, s sources (b is a multiple of s), n new tokens, m tokens of the source, h heads, d features a
head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from volvelle.parts.attention.attention import attention
from volvelle.parts.attention.before import Before
from volvelle.systems.language.components import ACTIVATIONS, Step, build_norm, drop
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, Stack

if TYPE_CHECKING:
    from volvelle.parts.attention.before import Past

KeysValues = tuple[Tensor, Tensor]


class Source:
    """What the encoder wrote, for all layers of the decoder: `states` (s, m, width), and which of them are real.

    `mask` is bool (s, 1, 1, m), or None where all are real. With `keep` a layer's keys and values are made once and
    used by every later step; without it they are made each time, so that gradients reach them and a recomputed layer
    sees them again. Keys and values of `before`, a trained prefix, come first in every layer.
    """

    def __init__(self, states: Tensor, mask: Tensor | None = None, *, keep: bool = False, before: Before | None = None):
        self.states, self.before = states, before
        self.mask = mask if before is None else before.widened(mask, states.shape[1])
        self._kept: dict[int, KeysValues] | None = {} if keep else None

    def keys_values(self, layer: int, make: Callable[[Tensor], KeysValues]) -> KeysValues:
        """Keys and values (s, h, m, d) of a layer, which `make` projects from the states."""
        if self._kept is not None and layer in self._kept:
            return self._kept[layer]
        made = make(self.states)
        if self.before is not None:
            made = self.before.append(layer, *made)
        if self._kept is not None:
            self._kept[layer] = made
        return made


class MultiHead(nn.Module):
    """The projections of multi-head attention (Vaswani et al. 2017, section 3.2.2); heirs say what attends to what."""

    def __init__(self, width: int, heads: int, dropout: float, index: int):
        super().__init__()
        self.heads, self.dropout, self.index = heads, dropout, index
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """Lay out features as heads: (b, n, h d) -> (b, h, n, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, states: Tensor) -> KeysValues:
        """Keys and values (b, h, m, d) of states (b, m, width)."""
        return self.split(self.k_proj(states)), self.split(self.v_proj(states))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention as configured, (b, h, n, d); weights drop out while training."""
        return attention(q, k, v, mask=mask, causal=causal, dropout=self.dropout if self.training else 0.0)

    def merge(self, out: Tensor) -> Tensor:
        """Heads back to features, and the last projection: (b, h, n, d) -> (b, n, width)."""
        return self.out_proj(out.transpose(1, 2).flatten(2))


class OwnAttention(MultiHead):
    """Each token attends to those of its own text that the step allows, the cached ones included."""

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        q, (k, v) = self.split(self.q_proj(x)), self.keys_values(x)
        if step.cache is not None:
            k, v = cast("Past", step.cache).append(self.index, k, v)
        return self.merge(self.attend(q, k, v, step.mask, step.causal))


class SourceAttention(MultiHead):
    """Each token of an answer attends to all real tokens of its source.

    Answers to the same source lie side by side, b / s to each: they become further queries over its keys and values,
    which are not copied.
    """

    def forward(self, x: Tensor, source: Source) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        q, (k, v) = self.split(self.q_proj(x)), source.keys_values(self.index, self.keys_values)
        b, s, n = len(q), len(k), q.shape[2]
        if b == s:
            return self.merge(self.attend(q, k, v, source.mask, False))
        q = q.unflatten(0, (s, b // s)).transpose(1, 2).flatten(2, 3)  # (s, h, b/s n, d)
        out = self.attend(q, k, v, source.mask, False)
        return self.merge(out.unflatten(2, (b // s, n)).transpose(1, 2).flatten(0, 1))


class FeedForwardBlock(nn.Module):
    """What both kinds of block end with: norm(x + fc2(act(fc1(x))))."""

    def __init__(self, config: EncoderDecoderConfig, stack: Stack):
        super().__init__()
        self.fc1 = nn.Linear(config.width, stack.mlp.width, bias=stack.mlp.bias)
        self.fc2 = nn.Linear(stack.mlp.width, config.width, bias=stack.mlp.bias)
        self.final_layer_norm = build_norm(config.norm, config.width)
        self.activation = ACTIVATIONS[stack.mlp.activation]
        self.dropout, self.activation_dropout = config.dropout.residual, config.activation_dropout

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream x and a branch's result, which drops out while training."""
        return x + drop(branch, self.dropout, self.training)

    def feed(self, x: Tensor) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        inner = drop(self.activation(self.fc1(x)), self.activation_dropout, self.training)
        return self.final_layer_norm(self.added(x, self.fc2(inner)))


class EncoderBlock(FeedForwardBlock):
    """norm(x + attention(x)), then the feed-forward network."""

    def __init__(self, config: EncoderDecoderConfig, index: int):
        super().__init__(config, config.encoder)
        self.self_attn = OwnAttention(config.width, config.encoder.heads, config.dropout.attention, index)
        self.self_attn_layer_norm = build_norm(config.norm, config.width)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Map x (s, m, width) -> (s, m, width)."""
        return self.feed(self.self_attn_layer_norm(self.added(x, self.self_attn(x, step))))


class DecoderBlock(FeedForwardBlock):
    """norm(x + attention(x)), norm(x + attention(x, source)), then the feed-forward network."""

    def __init__(self, config: EncoderDecoderConfig, index: int):
        super().__init__(config, config.decoder)
        heads, dropout = config.decoder.heads, config.dropout.attention
        self.self_attn = OwnAttention(config.width, heads, dropout, index)
        self.self_attn_layer_norm = build_norm(config.norm, config.width)
        self.encoder_attn = SourceAttention(config.width, heads, dropout, index)
        self.encoder_attn_layer_norm = build_norm(config.norm, config.width)

    def forward(self, x: Tensor, step: Step, source: Source) -> Tensor:
        """Map x (b, n, width) -> (b, n, width)."""
        x = self.self_attn_layer_norm(self.added(x, self.self_attn(x, step)))
        x = self.encoder_attn_layer_norm(self.added(x, self.encoder_attn(x, source)))
        return self.feed(x)
