"""One sample for each Module with a function twin: a module with weights that matter, inputs, and the function's call.

A row is `public name -> build(dtype) -> Sample`. Random numbers come from torch's seeded default generator. Choose
weights that are not at their initial zeros, more than one batch row, and sizes that differ from each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import volvelle.functional as functional
import volvelle.nn as parts


class Sample(NamedTuple):
    """`module(*inputs)` must equal `function()` bit for bit."""

    module: nn.Module
    inputs: tuple[Any, ...]
    function: Callable[[], Any]


def lora_linear(dtype: torch.dtype) -> Sample:
    layer = parts.LoRALinear(nn.Linear(5, 7, dtype=dtype), rank=3, alpha=6.0)
    nn.init.normal_(layer.b)
    x = torch.randn(2, 4, 5, dtype=dtype)
    return Sample(layer, (x,), lambda: functional.lora_linear(x, layer.weight, layer.bias, layer.a, layer.b, 2.0))


def quantized_linear(kind: type) -> Callable[[torch.dtype], Sample]:
    def sample(dtype: torch.dtype) -> Sample:
        layer = kind.from_linear(nn.Linear(64, 16, dtype=dtype))
        x = torch.randn(2, 3, 64, dtype=dtype)
        return Sample(layer, (x,), lambda: functional.quantized_linear(x, layer.tiles, layer.steps, layer.bias))

    return sample


def bottleneck_adapter(dtype: torch.dtype) -> Sample:
    layer = parts.BottleneckAdapter(5, 3, activation="gelu", scale=2.0, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, residual = torch.randn(2, 2, 4, 5, dtype=dtype)
    weights = (layer.down, layer.down_bias, layer.up, layer.up_bias)
    options = {"residual": residual, "scale": 2.0, "activation": "gelu"}
    return Sample(layer, (x, residual), lambda: functional.bottleneck_adapter(x, *weights, **options))


def group_sort(dtype: torch.dtype) -> Sample:
    x = torch.randn(2, 6, 5, dtype=dtype)
    return Sample(parts.GroupSort(3, dim=1), (x,), lambda: functional.group_sort(x, 3, dim=1))


def orthogonal_linear(dtype: torch.dtype) -> Sample:
    layer = parts.OrthogonalLinear(5, 7, rounds=3).to(dtype)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 4, 5, dtype=dtype)
    return Sample(layer, (x,), lambda: functional.orthogonal_linear(x, layer.weight, layer.bias, rounds=3))


def spectral_norm(dtype: torch.dtype) -> Sample:
    weight = torch.randn(5, 3, 2, 2, dtype=dtype)
    layer = parts.SpectralNorm(weight, start=2).eval()
    return Sample(layer, (weight,), lambda: functional.spectral_norm(weight, layer.u, layer.v))


def squeeze_excite(dtype: torch.dtype) -> Sample:
    layer = parts.SqueezeExcite(6, 3, activation="relu6").to(dtype)
    x = torch.randn(2, 6, 5, 4, dtype=dtype)
    first, second = layer.conv_reduce, layer.conv_expand
    weights = (first.weight, first.bias, second.weight, second.bias)
    return Sample(layer, (x,), lambda: functional.squeeze_excite(x, *weights, activation="relu6"))


def conv2d_same(dtype: torch.dtype) -> Sample:
    layer = parts.Conv2dSame(4, 6, 3, stride=2, groups=2).to(dtype)
    x = torch.randn(2, 4, 8, 7, dtype=dtype)
    return Sample(layer, (x,), lambda: functional.conv2d_same(x, layer.weight, layer.bias, 2, 1, 2))


def prefix_states(dtype: torch.dtype) -> Sample:
    layer = parts.PrefixStates(4, layers=2, kv_heads=3, head_width=2, hidden=5, start=torch.randn(4, 24)).to(dtype)
    nn.init.normal_(layer.second.weight)
    first, second = layer.first, layer.second
    mlp = (first.weight, first.bias, second.weight, second.bias)
    return Sample(layer, (), lambda: functional.prefix_states(layer.table, 2, 3, mlp=mlp, start=layer.start))


def rotary_embedding(dtype: torch.dtype) -> Sample:
    q, k = torch.randn(2, 6, 5, 16, dtype=dtype), torch.randn(2, 2, 5, 16, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 3, 9, 100]])
    layer = parts.RotaryEmbedding(16, base=500.0, layout="interleaved")
    options = {"base": 500.0, "layout": "interleaved"}
    return Sample(layer, (q, k, positions), lambda: functional.apply_rope(q, k, positions, **options))


def attention(dtype: torch.dtype) -> Sample:
    q = torch.randn(2, 6, 5, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 7, 8, dtype=dtype)
    layer = parts.Attention(causal=True, scale=0.3)
    return Sample(layer, (q, k, v), lambda: functional.attention(q, k, v, causal=True, scale=0.3))


def linear_attention(dtype: torch.dtype) -> Sample:
    q, k = torch.randn(2, 2, 3, 7, 8, dtype=dtype)
    v = torch.randn(2, 3, 7, 5, dtype=dtype)
    layer = parts.LinearAttention(causal=True, chunk=3)
    return Sample(layer, (q, k, v), lambda: functional.linear_attention(q, k, v, causal=True, chunk=3))


def sinusoidal_positions(dtype: torch.dtype) -> Sample:
    positions = torch.tensor([[0, 1, 2], [9, 4, 1000]])
    layer = parts.SinusoidalPositions(6, base=50.0, layout="half")
    options = {"base": 50.0, "layout": "half", "dtype": dtype}
    return Sample(layer, (positions, dtype), lambda: functional.sinusoidal_positions(positions, 6, **options))


def learned_positions(dtype: torch.dtype) -> Sample:
    positions = torch.tensor([[0, 1, 2], [6, 3, 3]])
    layer = parts.LearnedPositions(7, 5).to(dtype)
    return Sample(layer, (positions,), lambda: functional.learned_positions(positions, layer.weight))


POSITIONS = torch.tensor([[0, 1, 2, 3, 4], [7, 3, 3, 9, 30]])


def heads(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 6, 5, 8, dtype=dtype), torch.randn(2, 2, 5, 8, dtype=dtype)


def hierarchical_positions(dtype: torch.dtype) -> Sample:
    layer = parts.HierarchicalPositions(7, 5, alpha=0.3).to(dtype)
    options = {"alpha": 0.3}
    return Sample(layer, (POSITIONS,), lambda: functional.hierarchical_positions(POSITIONS, layer.weight, **options))


def multiplicative_positions(dtype: torch.dtype) -> Sample:
    layer, x = parts.MultiplicativePositions(31, 4).to(dtype), torch.randn(2, 5, 4, dtype=dtype)
    return Sample(layer, (x, POSITIONS), lambda: functional.multiplicative_positions(x, POSITIONS, layer.weight))


def complex_positions(dtype: torch.dtype) -> Sample:
    layer, x = parts.ComplexPositions(6, vocabulary=9).to(dtype), torch.randn(2, 5, 6, dtype=dtype)
    nn.init.normal_(layer.weight)
    ids = torch.tensor([[0, 1, 8, 3, 4], [7, 3, 3, 1, 5]])
    return Sample(layer, (x, POSITIONS, ids), lambda: functional.complex_positions(x, POSITIONS, layer.weight[ids]))


def recurrent_positions(dtype: torch.dtype) -> Sample:
    layer = parts.RecurrentPositions(4, hidden=3, delta=0.2, solver="euler").to(dtype)
    options = {"delta": 0.2, "solver": "euler"}
    return Sample(
        layer,
        (POSITIONS,),
        lambda: functional.recurrent_positions(POSITIONS, layer.start, layer.dynamics, **options),
    )


def conv_positions(dtype: torch.dtype) -> Sample:
    layer = parts.ConvPositions(4, width=5, layers=3).to(dtype)
    return Sample(layer, (POSITIONS,), lambda: functional.conv_positions(POSITIONS, layer.kernels, layer.biases))


def alibi(dtype: torch.dtype) -> Sample:
    layer = parts.ALiBi(3, right_slopes=(1.0, 2.0, 3.0))
    slopes = functional.alibi_slopes(3, dtype=torch.float64)
    right = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return Sample(
        layer,
        (POSITIONS, POSITIONS[0]),
        lambda: functional.alibi_bias(POSITIONS, POSITIONS[0], slopes, right_slopes=right),
    )


def t5_bias(dtype: torch.dtype) -> Sample:
    layer = parts.T5Bias(3, buckets=8, max_distance=20, bidirectional=False).to(dtype)
    options = {"max_distance": 20, "bidirectional": False}
    return Sample(
        layer,
        (POSITIONS, POSITIONS[0]),
        lambda: functional.t5_bias(POSITIONS, POSITIONS[0], layer.weight, **options),
    )


def dynamic_bias(dtype: torch.dtype) -> Sample:
    layer = parts.DynamicBias(3, width=4, log_distance=True).to(dtype)
    options = {"log_distance": True}
    return Sample(
        layer,
        (POSITIONS, POSITIONS[0]),
        lambda: functional.dynamic_bias(POSITIONS, POSITIONS[0], layer.layers, **options),
    )


def shaw_bias(dtype: torch.dtype) -> Sample:
    layer, (q, _) = parts.ShawBias(8, k=3, right=1, scale=0.3).to(dtype), heads(dtype)
    options = {"left": 3, "scale": 0.3}
    return Sample(
        layer,
        (q, POSITIONS, POSITIONS[0]),
        lambda: functional.shaw_key_bias(q, POSITIONS, POSITIONS[0], layer.key, **options),
    )


def transformer_xl_bias(dtype: torch.dtype) -> Sample:
    layer, (q, k) = parts.TransformerXLBias(6, 8, width=10, scale=0.3, base=50.0).to(dtype), heads(dtype)
    options = {"u": layer.u, "v": layer.v, "weight": layer.weight, "scale": 0.3, "base": 50.0}
    return Sample(
        layer,
        (q, k, POSITIONS, POSITIONS[0]),
        lambda: functional.transformer_xl_bias(q, k, POSITIONS, POSITIONS[0], **options),
    )


def disentangled_bias(dtype: torch.dtype) -> Sample:
    (q, k), key, query = heads(dtype), nn.Linear(10, 48, dtype=dtype), nn.Linear(10, 48, dtype=dtype)
    layer = parts.DisentangledBias(6, key, query, k=8, max_position=20).to(dtype)

    def table(projection: nn.Linear) -> torch.Tensor:
        return projection(layer.table).view(16, 6, 8).transpose(0, 1)

    return Sample(
        layer,
        (q, k, POSITIONS, POSITIONS[0]),
        lambda: functional.disentangled_bias(
            q, k, POSITIONS, POSITIONS[0], pos_key=table(key), pos_query=table(query), max_position=20
        ),
    )


def axial_rotary_embedding(dtype: torch.dtype) -> Sample:
    (q, k), positions = heads(dtype), torch.stack((POSITIONS, POSITIONS.flip(0)), dim=-1)
    layer = parts.AxialRotaryEmbedding(8, base=50.0, layout="interleaved")
    options = {"base": 50.0, "layout": "interleaved"}
    return Sample(layer, (q, k, positions), lambda: functional.apply_axial_rope(q, k, positions, **options))


def axial_positions(dtype: torch.dtype) -> Sample:
    layer = parts.AxialPositions((31, 40), 5, join="concat").to(dtype)
    positions = torch.stack((POSITIONS, POSITIONS.flip(0)), dim=-1)
    return Sample(
        layer, (positions,), lambda: functional.axial_positions(positions, tuple(layer.weights), join="concat")
    )


def multimodal_rotary_embedding(dtype: torch.dtype) -> Sample:
    q, k = heads(dtype)
    positions = torch.stack((POSITIONS, POSITIONS.flip(0), POSITIONS + 1), dim=-1)
    options = {"sections": (2, 1, 1), "interleaved": True, "base": 50.0}
    layer = parts.MultimodalRotaryEmbedding(**options)
    return Sample(layer, (q, k, positions), lambda: functional.apply_mrope(q, k, positions, **options))


def convolution(kind: str, axes: int, **options: Any) -> Callable[[torch.dtype], Sample]:
    """A convolution of three channels to four that has its options both as a Module and as a function."""

    def sample(dtype: torch.dtype) -> Sample:
        layer = getattr(parts, kind)(3, 4, 3, **options).to(dtype)
        x = torch.randn(2, 3, *(7, 10)[:axes], dtype=dtype)
        function = getattr(functional, FUNCTIONS[kind])
        return Sample(layer, (x,), lambda: function(x, layer.weight, layer.bias, **options))

    return sample


FUNCTIONS = {"AtrousConv1d": "atrous_conv1d", "AtrousConv2d": "atrous_conv2d", "CausalConv1d": "causal_conv1d"}


def boundary_refinement(dtype: torch.dtype) -> Sample:
    layer, scores = parts.BoundaryRefinement(3).to(dtype), torch.randn(2, 3, 5, 7, dtype=dtype)
    convolutions = [functools.partial(F.conv2d, weight=c.weight, bias=c.bias, padding=1) for c in layer.children()]
    return Sample(layer, (scores,), lambda: functional.boundary_refinement(scores, *convolutions))


def global_convolution(dtype: torch.dtype) -> Sample:
    layer, x = parts.GlobalConvolution(3, 4, 5).to(dtype), torch.randn(2, 3, 6, 7, dtype=dtype)
    convolutions = [
        functools.partial(F.conv2d, weight=c.weight, bias=c.bias, padding=c.padding) for c in layer.children()
    ]
    return Sample(
        layer, (x,), lambda: functional.global_convolution(x, tuple(convolutions[:2]), tuple(convolutions[2:]))
    )


def pointwise_conv2d(dtype: torch.dtype) -> Sample:
    layer, x = parts.PointwiseConv2d(3, 4).to(dtype), torch.randn(2, 3, 5, 7, dtype=dtype)
    return Sample(layer, (x,), lambda: functional.pointwise_conv2d(x, layer.weight, layer.bias))


def depthwise_separable_conv2d(dtype: torch.dtype) -> Sample:
    layer = parts.DepthwiseSeparableConv2d(3, 4, 3, stride=2, dilation=2, multiplier=2).to(dtype)
    x, options = torch.randn(2, 3, 7, 10, dtype=dtype), {"stride": 2, "dilation": 2}
    weights = (layer.depthwise.weight, layer.pointwise.weight, layer.pointwise.bias)
    return Sample(layer, (x,), lambda: functional.depthwise_separable_conv2d(x, *weights, **options))


def inception_block(dtype: torch.dtype) -> Sample:
    layer = parts.InceptionBlock(3, 2, 2, 3, 2, 4, 2, factor="stacked").to(dtype)
    x = torch.randn(2, 3, 5, 7, dtype=dtype)
    branches = (layer.branch1, layer.branch2, layer.branch3, layer.branch4)
    return Sample(layer, (x,), lambda: functional.inception_block(x, branches))


def upsample2d(dtype: torch.dtype) -> Sample:
    layer = parts.Upsample2d(3, 2, 3, method="pixel_shuffle").to(dtype)
    x, options = torch.randn(2, 3, 5, 7, dtype=dtype), {"method": "pixel_shuffle"}
    return Sample(layer, (x,), lambda: functional.upsample2d(x, layer.weight, layer.bias, 3, **options))


def deform_conv2d(dtype: torch.dtype) -> Sample:
    layer = parts.DeformConv2d(4, 6, (3, 2), stride=2, padding=1, groups=2).to(dtype)
    x, offset = torch.randn(2, 4, 7, 9, dtype=dtype), torch.randn(2, 24, 4, 5, dtype=dtype)
    mask = torch.rand(2, 12, 4, 5, dtype=dtype)
    weights = (offset, layer.weight, layer.bias, 2, 1, 1, mask)
    return Sample(layer, (x, offset, mask), lambda: functional.deform_conv2d(x, *weights))


ROIS = torch.tensor([[1.0, 3, 2, 30, 21], [0.0, 0, 9, 17, 40]])


def roi_align(dtype: torch.dtype) -> Sample:
    x, options = torch.randn(2, 3, 8, 9, dtype=dtype), ((2, 3), 0.25, 2, True)
    return Sample(parts.RoIAlign(*options), (x, ROIS), lambda: functional.roi_align(x, ROIS, *options))


def ps_roi_align(dtype: torch.dtype) -> Sample:
    x, options = torch.randn(2, 18, 8, 9, dtype=dtype), {"reduce": "max", "convention": "thundernet"}
    layer = parts.PSRoIAlign((2, 3), 0.25, 2, **options)
    return Sample(layer, (x, ROIS), lambda: functional.ps_roi_align(x, ROIS, (2, 3), 0.25, 2, **options))


def vector_quantizer(dtype: torch.dtype) -> Sample:
    layer = parts.VectorQuantizer(9, 4, commitment=0.5, codebook_weight=2.0, dtype=dtype)
    nn.init.normal_(layer.embedding.weight)
    z, options = torch.randn(2, 4, 3, 5, dtype=dtype), {"dim": 1, "commitment": 0.5, "codebook_weight": 2.0}
    return Sample(layer, (z,), lambda: functional.vector_quantize(z, layer.embedding.weight, **options))


def ema_vector_quantizer(dtype: torch.dtype) -> Sample:
    layer = parts.EMAVectorQuantizer(9, 4, dim=-1, commitment=0.5, dtype=dtype)
    nn.init.normal_(layer.embedding.weight)
    z, options = torch.randn(2, 7, 4, dtype=dtype), {"commitment": 0.5, "codebook_weight": 0.0}
    return Sample(layer, (z,), lambda: functional.vector_quantize(z, layer.embedding.weight, **options))


SAMPLES: dict[str, Callable[[torch.dtype], Sample]] = {
    "nn.ALiBi": alibi,
    "nn.Attention": attention,
    "nn.AtrousConv1d": convolution("AtrousConv1d", 1, stride=2, dilation=2),
    "nn.AtrousConv2d": convolution("AtrousConv2d", 2, stride=(1, 2), dilation=2),
    "nn.AxialPositions": axial_positions,
    "nn.AxialRotaryEmbedding": axial_rotary_embedding,
    "nn.BoundaryRefinement": boundary_refinement,
    "nn.CausalConv1d": convolution("CausalConv1d", 1, dilation=3),
    "nn.ComplexPositions": complex_positions,
    "nn.ConvPositions": conv_positions,
    "nn.DeformConv2d": deform_conv2d,
    "nn.DepthwiseSeparableConv2d": depthwise_separable_conv2d,
    "nn.DisentangledBias": disentangled_bias,
    "nn.DynamicBias": dynamic_bias,
    "nn.EMAVectorQuantizer": ema_vector_quantizer,
    "nn.GlobalConvolution": global_convolution,
    "nn.GroupSort": group_sort,
    "nn.HierarchicalPositions": hierarchical_positions,
    "nn.InceptionBlock": inception_block,
    "nn.LearnedPositions": learned_positions,
    "nn.LinearAttention": linear_attention,
    "nn.BottleneckAdapter": bottleneck_adapter,
    "nn.SqueezeExcite": squeeze_excite,
    "nn.Conv2dSame": conv2d_same,
    "nn.Int4Linear": quantized_linear(parts.Int4Linear),
    "nn.Int8Linear": quantized_linear(parts.Int8Linear),
    "nn.LoRALinear": lora_linear,
    "nn.MultimodalRotaryEmbedding": multimodal_rotary_embedding,
    "nn.MultiplicativePositions": multiplicative_positions,
    "nn.PointwiseConv2d": pointwise_conv2d,
    "nn.OrthogonalLinear": orthogonal_linear,
    "nn.PSRoIAlign": ps_roi_align,
    "nn.PrefixStates": prefix_states,
    "nn.RecurrentPositions": recurrent_positions,
    "nn.RoIAlign": roi_align,
    "nn.RotaryEmbedding": rotary_embedding,
    "nn.ShawBias": shaw_bias,
    "nn.SinusoidalPositions": sinusoidal_positions,
    "nn.T5Bias": t5_bias,
    "nn.TransformerXLBias": transformer_xl_bias,
    "nn.SpectralNorm": spectral_norm,
    "nn.Upsample2d": upsample2d,
    "nn.VectorQuantizer": vector_quantizer,
}
