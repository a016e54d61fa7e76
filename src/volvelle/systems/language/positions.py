"""The position encodings that a `LanguageConfig` names: what all layers share, and what each has for itself."""

from __future__ import annotations

from torch import nn

from volvelle.parts.position import rope_scaling
from volvelle.parts.position.alibi import ALiBi
from volvelle.parts.position.complex_order import ComplexPositions
from volvelle.parts.position.convolutional import ConvPositions
from volvelle.parts.position.deberta import DisentangledBias, RelativeVectors
from volvelle.parts.position.dynamic import DynamicBias
from volvelle.parts.position.encoding import PositionEncoding
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
        case c.Dynamic():
            return DynamicBias(
                config.heads, width=position.width, depth=position.depth, log_distance=position.log_distance
            )
        case c.DeBERTa():
            return RelativeVectors(position.reach, config.width)
        case c.ALiBi():
            return ALiBi(config.heads)
        case c.NoPosition() | c.Shaw() | c.TransformerXL():
            return PositionEncoding()


def build_layer_position(config: c.LanguageConfig) -> PositionEncoding | None:
    """The position encoding that each layer has for itself, if the configuration names one."""
    position, d, inner = config.position, config.head_width, config.heads * config.head_width
    match position:
        case c.Shaw():
            right = 0 if config.causal else None
            return ShawBias(d, k=position.reach, right=right, value_width=d if position.values else None)
        case c.TransformerXL():
            return TransformerXLBias(config.heads, d, width=config.width, base=position.base)
        case c.DeBERTa():
            # The released models' pos_proj has no bias (it would shift all scores of a row alike), their pos_q_proj has
            key = nn.Linear(config.width, inner, bias=False) if "c2p" in position.terms else None
            query = nn.Linear(config.width, inner) if "p2c" in position.terms else None
            return DisentangledBias(config.heads, key, query, k=None, max_position=position.max_position)
        case _:
            return None


def _scaling(spec: c.RopeScaling | None, context: int) -> rope_scaling.Scaling | None:
    match spec:
        case None:
            return None
        case c.LinearScaling():
            return rope_scaling.LinearScaling(spec.factor)
        case c.NtkScaling():
            return rope_scaling.NTKScaling(spec.factor)
        case c.ProportionalScaling():
            return rope_scaling.ProportionalScaling(spec.fraction, spec.factor)
        case c.DynamicScaling():
            return rope_scaling.DynamicNTKScaling(spec.factor, spec.original_context or context)
        case c.YarnScaling():
            return rope_scaling.YaRNScaling(
                spec.factor,
                spec.original_context or context,
                beta_fast=spec.beta_fast,
                beta_slow=spec.beta_slow,
                mscale=spec.mscale,
                mscale_all_dim=spec.mscale_all_dim,
                truncate=spec.truncate,
                given_attention_factor=spec.attention_factor,
            )
        case c.LongRopeScaling():
            original = spec.original_context or context
            return rope_scaling.LongRoPEScaling(
                spec.short_factors or (),
                spec.long_factors or (),
                original,
                factor=context / original if spec.factor is None else spec.factor,
                given_attention_factor=spec.attention_factor,
            )
        case c.Llama3Scaling():
            return rope_scaling.Llama3Scaling(
                spec.factor,
                spec.original_context or context,
                spec.low_frequency_factor,
                spec.high_frequency_factor,
            )
