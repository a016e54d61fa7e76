"""What a low-rank update B A means for each kind of layer: where A and B act, and how their product lies in the weight.

Every such layer maps through one matrix W (d, k), d outputs of k inputs each:

| layer                  | its weight         | A                  | B               | B A x              |
|------------------------|--------------------|--------------------|-----------------|--------------------|
| nn.Linear              | (d, k)             | (r, k)             | (d, r)          | two linear layers  |
| Conv1D of transformers | (k, d)             | (r, k)             | (d, r)          | two linear layers  |
| nn.Conv2d, g groups    | (d, c/g, k_y, k_x) | (r, c/g, k_y, k_x) | (d, r/g, 1, 1)  | a conv, then 1 x 1 |
| nn.Embedding           | (v, d)             | (r, v)             | (d, r)          | a row of Aᵀ, then B |

A convolution's A keeps its stride, padding, dilation and groups, so that B A has the form of its weight for any groups.
Parameter shapes are PEFT's, but for convolutions of several groups: there PEFT's A sees all channels (r, c, k_y, k_x),
and what it learns is in general no weight of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Kind(Protocol):
    """One row of the table above. Without fields: a copy equals the original."""

    def shapes(self, layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B; ValueError for a rank that the layer cannot have."""
        ...

    def add(self, layer: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Return result + scale · B A x, in x's dtype."""
        ...

    def plain(self, layer: Any, x: Tensor) -> Tensor:
        """W x, without bias."""
        ...

    def product(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        """B A as a matrix (d, k)."""
        ...

    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as a matrix (d, k): a view."""
        ...

    def layout(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix (d, k) laid out as the weight `like` is."""
        ...

    def channels(self, v: Tensor) -> Tensor:
        """A vector (d,) shaped to be multiplied with the layer's result."""
        ...


@dataclass(frozen=True)
class LinearKind:
    """nn.Linear."""

    def shapes(self, layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, k) and B (d, r)."""
        d, k = self.matrix(layer.weight).shape
        return (rank, k), (d, rank)

    def add(self, layer: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Result (..., d) + scale · (x Aᵀ) Bᵀ."""
        low = F.linear(x, a.to(x.dtype))  # (..., r)
        # addmm adds the update while the result is copied: no third (..., d) tensor.
        rows = result.reshape(-1, result.shape[-1])
        flat = torch.addmm(rows, low.reshape(-1, low.shape[-1]), b.to(x.dtype).t(), alpha=scale)
        return flat.view(result.shape)

    def plain(self, layer: Any, x: Tensor) -> Tensor:
        """X Wᵀ."""
        return F.linear(x, self.matrix(layer.weight))

    def product(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        """B A."""
        return b @ a

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def layout(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The matrix itself."""
        return matrix

    def channels(self, v: Tensor) -> Tensor:
        """The vector itself."""
        return v


@dataclass(frozen=True)
class TransposedKind(LinearKind):
    """Conv1D of transformers: a linear layer that stores Wᵀ."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Its transpose."""
        return weight.t()

    def layout(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Its transpose."""
        return matrix.t()


@dataclass(frozen=True)
class EmbeddingKind(TransposedKind):
    """nn.Embedding: a linear layer on one-hot inputs that stores Wᵀ."""

    def add(self, layer: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Result (..., d) + scale · Aᵀ[x] Bᵀ for numbers x (...)."""
        low = F.embedding(x, a.t(), padding_idx=layer.padding_idx).to(result.dtype)
        rows = result.reshape(-1, result.shape[-1])
        flat = torch.addmm(rows, low.reshape(-1, low.shape[-1]), b.to(result.dtype).t(), alpha=scale)
        return flat.view(result.shape)

    def plain(self, layer: Any, x: Tensor) -> Tensor:
        """W[x]."""
        return F.embedding(x, layer.weight, padding_idx=layer.padding_idx)


@dataclass(frozen=True)
class Conv2dKind:
    """nn.Conv2d, with any stride, padding, dilation and groups."""

    def shapes(self, layer: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, c/g, k_y, k_x) and B (d, r/g, 1, 1): a share of the rank for every group."""
        d, *window = layer.weight.shape
        if rank % layer.groups:
            raise ValueError(f"rank must be a multiple of its {layer.groups} groups, got {rank}")
        return (rank, *window), (d, rank // layer.groups, 1, 1)

    def add(self, layer: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Result (b, d, y, x) + scale · B * (A * x)."""
        low = layer._conv_forward(x, a.to(x.dtype), None)
        return torch.add(result, F.conv2d(low, b.to(low.dtype), groups=layer.groups), alpha=scale)

    def plain(self, layer: Any, x: Tensor) -> Tensor:
        """W * x."""
        return layer._conv_forward(x, layer.weight, None)

    def product(self, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        """B A, group by group."""
        groups = layer.groups
        return torch.bmm(b.reshape(groups, -1, b.shape[1]), a.reshape(groups, b.shape[1], -1)).flatten(0, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """(d, c/g · k_y · k_x)."""
        return weight.flatten(1)

    def layout(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The shape of a convolution's weight."""
        return matrix.reshape(like.shape)

    def channels(self, v: Tensor) -> Tensor:
        """(d, 1, 1)."""
        return v[:, None, None]


LINEAR, TRANSPOSED, EMBEDDING, CONV2D = LinearKind(), TransposedKind(), EmbeddingKind(), Conv2dKind()


def kind_of(layer: nn.Module) -> Kind:
    """The kind of a layer; TypeError says why a low-rank update cannot be added to it.

    >>> type(kind_of(nn.Linear(2, 2))).__name__
    'LinearKind'
    """
    name = type(layer).__name__
    found = next((kind for cls, kind in _CLASSES.items() if isinstance(layer, cls)), None)
    if found is None and _is_conv1d(layer):
        return TRANSPOSED
    if found is None:
        raise TypeError(f"a {name} has no weight that it only multiplies with: Linear, Conv1D, Conv2d, Embedding do")
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError("nn.MultiheadAttention reads its out_proj.weight directly, an adapter there would be ignored")
    base = next(cls for cls in _CLASSES if isinstance(layer, cls))
    if any("forward" in vars(cls) for cls in type(layer).__mro__ if issubclass(cls, base) and cls is not base):
        raise TypeError(f"{name} overrides nn.{base.__name__}.forward, which a low-rank update would bypass")
    if nn.utils.parametrize.is_parametrized(layer):
        raise TypeError(f"this {name} computes its weight from others (a parametrization); remove that first")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise TypeError("its max_norm changes the weight whenever it is used")
    return found


def why_not(layer: nn.Module) -> str | None:
    """Say why a low-rank update cannot be added to `layer`, or None when it can.

    >>> why_not(nn.Conv2d(1, 1, 1)) is None, why_not(nn.ReLU())
    (True, 'a ReLU has no weight that it only multiplies with: Linear, Conv1D, Conv2d, Embedding do')
    """
    try:
        kind_of(layer)
    except TypeError as error:
        return str(error)
    return None


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is an nn.Linear or a Conv1D that an update can be added to."""
    return why_not(layer) is None and kind_of(layer) in (LINEAR, TRANSPOSED)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Trained values of a half-precision layer stay in fp32: small steps would be rounded away."""
    return torch.float32 if weight.dtype in {torch.bfloat16, torch.float16} else weight.dtype


_CLASSES: dict[type[nn.Module], Kind] = {nn.Linear: LINEAR, nn.Conv2d: CONV2D, nn.Embedding: EMBEDDING}


def _is_conv1d(layer: nn.Module) -> bool:
    named = any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)
    return named and getattr(layer, "weight", torch.empty(0)).ndim == 2
