"""A decoder's blocks, laid out for the compiled step, and the calls of it.

The sums behind a row run in one order whatever else is in the step, so a token gets the same bits whether it comes
alone, in a chain of drafts, or in a batch: the greedy answer of a speculating decoder is that of a plain one, bit for
bit. (In a tree other branches lie between a token and what it attends to, and their gaps turn last bits.)

Shapes: b texts, n tokens, rows = b n <= 32, h heads, g key/value heads, d features a head, m keys in reach.
"""

from __future__ import annotations

import copy
import ctypes
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from volvelle.parts.attention.cache import KVCache
from volvelle.parts.attention.seat_cache import SeatCache
from volvelle.parts.position.rope import Rotation
from volvelle.parts.quantization.int4 import Int4Linear
from volvelle.parts.quantization.int8 import Int8Linear
from volvelle.parts.quantization.weight_only import WeightOnlyLinear
from volvelle.systems.language import config as c
from volvelle.systems.language.components import GatedMLP, PreNormBlock, SelfAttention, Step
from volvelle.systems.language.native.library import library

if TYPE_CHECKING:
    from volvelle.systems.language.decoder import Decoder

MOST = 32
"""Rows of one step."""
GROUP, OUTPUTS, WIDEST, LONGEST = 32, 16, 128, 1 << 18
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_VERSION = operator.attrgetter("_version")
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, _NUMBER) for name in ("kind", "out", "features", "numbers")),
        *((name, _POINTER) for name in ("data", "grid", "bias")),
    ]


_PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")


class _Block(ctypes.Structure):
    _fields_ = [("norm1", _POINTER), ("norm2", _POINTER), *((name, _Weight) for name in _PRODUCTS)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((x, _NUMBER) for x in ("depth", "width", "heads", "kv_heads", "head_width", "mlp_width", "half")),
        ("eps", ctypes.c_float),
        ("none", ctypes.c_float),
        ("blocks", _POINTER),
    ]


_COUNTS = (
    *("b", "n", "past", "rotated", "interleaved", "rotation_stride", "layer_stride", "value_stride", "text_stride"),
    *("head_stride", "mask_text", "mask_token", "causal", "threads"),
)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _NUMBER) for name in _COUNTS),
        *((name, _POINTER) for name in ("x", "cache", "cos", "sin", "mask", "starts")),
    ]


class Copies:
    """What the code reads in fp32 of tensors that are stored otherwise (norms, biases), kept true to them.

    Weights may change in place, by an optimiser or load_state_dict, and then the model is still the same to whoever
    looks at its tensors: only their versions tell.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._counted: list[Tensor] = []  # those that have versions: tensors made in inference mode have none
        self._versions: list[int] = []

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor's own memory where it is fp32 in one piece, else a copy."""
        values = tensor.detach().float().contiguous()
        if values.data_ptr() != tensor.data_ptr():
            self._pairs.append((tensor, values))
            self._counted += [] if tensor.is_inference() else [tensor]
            self._versions = list(map(_VERSION, self._counted))
        return values

    def renew(self, *, always: bool = False) -> None:
        """Copy anew where a version has changed: some 5 µs for 60 tensors; `always`: where it has not, too."""
        versions = list(map(_VERSION, self._counted))
        if always or versions != self._versions:
            self._versions = versions
            with torch.inference_mode():  # the copies may have been made in it
                for source, values in self._pairs:
                    values.copy_(source)


class NativeLinear:
    """One layer's matrix for the compiled kernels: y = x Wᵀ + bias for any number of rows on the CPU."""

    def __init__(self, layer: nn.Linear | WeightOnlyLinear):
        found = library()
        assert found is not None
        self.layer, self.out = layer, layer.out_features
        self._call, self.held, self.copies = found.linear, [], Copies()
        self.weight = _weight(layer, self.held, self.copies)

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out); of other dtypes than fp32 and bf16 by the layer itself."""
        if x.dtype not in _KINDS:
            return self.layer(x)
        self.copies.renew()
        rows = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out))
        count, half = rows.numel() // rows.shape[-1], int(x.dtype is torch.bfloat16)
        self._call(ctypes.addressof(self.weight), rows.data_ptr(), y.data_ptr(), count, half, torch.get_num_threads())
        return y


class NativeStep:
    """Blocks of a decoder in one call; it holds pointers to their weights, so it is made anew when these move."""

    def __init__(self, model: Decoder, blocks: Sequence[nn.Module]):
        found = library()
        assert found is not None
        config = model.config
        self.held: list[object] = []
        self.copies = Copies()
        self.table = (_Block * len(blocks))(*(_block(block, self.held, self.copies) for block in blocks))
        mlp, norm = config.mlp, config.norm
        assert isinstance(mlp, c.GatedMLP)
        sizes = (len(blocks), config.width, config.heads, config.kv_heads, config.head_width, mlp.width)
        half = int(model.dtype is torch.bfloat16)
        self.model = _Model(*sizes, half, norm.eps, 0.0, ctypes.addressof(self.table))
        self.dtype, self._call = model.dtype, found.step

    def some(self, layers: Sequence[int]) -> NativeStep:
        """The step of these blocks only, over a cache of as many layers."""
        other = copy.copy(self)
        other.table = (_Block * len(layers))(*(self.table[layer] for layer in layers))
        other.model = _Model.from_buffer_copy(self.model)
        other.model.depth, other.model.blocks = len(layers), ctypes.addressof(other.table)
        return other

    def takes(self, x: Tensor, step: Step) -> bool:
        """Whether this step, of x (b, n, width), is one for it; longer ones belong to torch's matrix products."""
        cache, rotation = step.cache, step.rotation
        return (
            x.shape[0] * x.shape[1] <= MOST
            and x.dtype is self.dtype
            and (isinstance(cache, KVCache) or (isinstance(cache, SeatCache) and cache.in_turn))
            and cache.storage.dtype is self.dtype
            and cache.length + x.shape[1] <= LONGEST
            and cache.reach is None
            and (rotation is None or isinstance(rotation, Rotation))
        )

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """Map x (b, n, width) -> (b, n, width), and write the step's keys and values into its cache."""
        self.copies.renew()
        b, n, _ = x.shape
        x = x.clone(memory_format=torch.contiguous_format)  # written to
        call, cache = _Call(b=b, n=n, causal=int(step.causal), threads=torch.get_num_threads()), step.cache
        assert isinstance(cache, KVCache | SeatCache)
        if isinstance(cache, SeatCache):
            call.starts = cache.starts.data_ptr()
        call.x, call.past, call.cache = x.data_ptr(), cache.length, cache.storage.data_ptr()
        call.layer_stride, call.value_stride, call.text_stride, call.head_stride = cache.storage.stride()[:4]
        rotation = step.rotation
        if isinstance(rotation, Rotation):
            cos, sin = rotation.cos.float().contiguous(), rotation.sin.float().contiguous()
            call.rotated, call.cos, call.sin = cos.shape[-1], cos.data_ptr(), sin.data_ptr()
            call.interleaved = int(rotation.layout == "interleaved")
            call.rotation_stride = n * call.rotated if cos.dim() == 4 and len(cos) > 1 else 0
        if step.mask is not None:  # (b or 1, 1, n or 1, m)
            mask = step.mask if step.mask.stride(-1) == 1 else step.mask.contiguous()
            call.mask = mask.data_ptr()
            call.mask_text, call.mask_token = (mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 2))
        self._call(ctypes.addressof(self.model), ctypes.addressof(call))
        return x


def why_not(model: Decoder, blocks: Sequence[nn.Module] | None = None) -> str | None:
    """Why the compiled step does not serve this decoder's blocks, or others like them; None: it does."""
    config, blocks = model.config, list(model.model.layers) if blocks is None else blocks
    mlp = config.mlp
    reasons = {
        "it runs on CPUs": model.device.type != "cpu",
        "it knows fp32 and bf16": model.dtype not in _KINDS,
        "it knows softmax attention": isinstance(config.attention, c.LinearAttention),
        "it knows blocks with RMSNorm before attention and MLP": not isinstance(config.norm, c.RMSNorm)
        or not all(type(block) is PreNormBlock for block in blocks),
        "it knows the gated MLP with SiLU": not isinstance(mlp, c.GatedMLP) or mlp.activation != "silu",
        "it knows no score bias": model.model.position.bias() is not None,
        "it rotates queries and keys only": isinstance(config.position, c.Rope) and config.position.rotate_value,
        "its heads have a multiple of 16 features, at most 128": config.head_width % OUTPUTS > 0
        or config.head_width > WIDEST,
        "it knows matrices with inputs in groups of 32 and outputs in groups of 16": not all(
            fits(layer) for block in blocks for layer in _layers(block)
        ),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or ("the code is not compiled here" if library() is None else None)


def fits(layer: nn.Module) -> bool:
    """Whether the kernels can multiply with this layer's matrix as it is stored."""
    if isinstance(layer, WeightOnlyLinear):
        known = layer.group == GROUP and layer.steps.dtype is torch.float16 and layer.steps.device.type == "cpu"
    elif type(layer) is nn.Linear:
        known = layer.weight.dtype in _KINDS and layer.weight.device.type == "cpu" and layer.weight.is_contiguous()
    else:
        return False
    return known and layer.in_features % GROUP == 0 and layer.out_features % OUTPUTS == 0


def _layers(block: nn.Module) -> Sequence[nn.Module]:
    """The seven products, in the order of `_PRODUCTS`."""
    attention, mlp = block.self_attn, block.mlp
    if not isinstance(attention, SelfAttention) or not isinstance(mlp, GatedMLP):
        return ()
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _block(block: nn.Module, held: list[object], copies: Copies) -> _Block:
    assert isinstance(block, PreNormBlock)
    norms = (block.input_layernorm, block.post_attention_layernorm)
    gains = [copies.of(norm.get_parameter("weight")) for norm in norms]
    held += gains
    weights = [_weight(layer, held, copies) for layer in _layers(block)]
    return _Block(*(gain.data_ptr() for gain in gains), *weights)


def _weight(layer: nn.Module, held: list[object], copies: Copies) -> _Weight:
    assert isinstance(layer, nn.Linear | WeightOnlyLinear)
    bias = None if layer.bias is None else copies.of(layer.bias)
    if isinstance(layer, WeightOnlyLinear):
        assert isinstance(layer, Int4Linear | Int8Linear)
        kind, numbers = 3 if isinstance(layer, Int4Linear) else 2, layer.steps.shape[2]
        tensors = (layer.tiles, layer.steps, bias)
    else:
        weight = layer.weight.detach()
        kind, numbers, tensors = _KINDS[weight.dtype], 0, (weight, None, bias)
    held += tensors
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return _Weight(kind, layer.out_features, layer.in_features, numbers, *pointers)
