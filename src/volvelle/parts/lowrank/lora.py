"""Low-rank adaptation: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

Shapes: x (..., k), weight W (d, k), bias (d), a = A (r, k), b = B (d, r), result (..., d); other kinds of layers in
kinds.py. The update scale · B A has rank r; one of its factors starts at zero, so at step 0 the layer is the pretrained
one, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.lowrank.kinds import EMBEDDING, LINEAR, TRANSPOSED, factor_dtype, kind_of


@export("functional.lora_linear")
def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *, dropout: float = 0.0
) -> Tensor:
    """Apply a linear layer with a low-rank update: x Wᵀ + bias + scale · (x Aᵀ) Bᵀ.

    x (..., k); weight (d, k); bias (d) or None; a (r, k); b (d, r); the result is (..., d) in the dtype of x Wᵀ.
    `dropout` is the probability with which each input of the low-rank path is dropped (the frozen path sees all of x).
    The low-rank path is computed in x's dtype, so a and b may stay in fp32 as master weights of a bf16 layer.
    Raises ValueError when the shapes do not fit. Hu et al. 2021, section 4.1, with scale = α / r.

    >>> x, weight = torch.eye(3), torch.zeros(2, 3)
    >>> a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-1.0]])
    >>> lora_linear(x, weight, None, a, b, 0.5).T
    tensor([[ 0.5000,  1.0000,  1.5000],
            [-0.5000, -1.0000, -1.5000]])
    """
    check_factors("lora_linear", weight, a, b)
    low_input = F.dropout(x, dropout) if dropout else x
    return LINEAR.add(None, F.linear(x, weight, bias), low_input, a, b, scale)


def check_factors(call: str, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless a (r, k) and b (d, r) fit weight (d, k)."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise ValueError(
            f"{call}: a must be (r, {weight.shape[1]}) and b ({weight.shape[0]}, r) for weight of shape "
            f"{tuple(weight.shape)}, got a {tuple(a.shape)} and b {tuple(b.shape)}"
        )


def lora_rows(result: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add to every row of a batch its own low-rank update: result_i + (x_i A_iᵀ) B_iᵀ.

    result (b, ..., d); x (b, ..., k); a (b, r, k); b (b, d, r), with the scale in it; computed in result's dtype, or
    in that of a and b where there are so few tokens that converting them would take longer.

    >>> x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    >>> a, b = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.ones(2, 3, 1)
    >>> lora_rows(torch.zeros(2, 3), x, a, b)
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    """
    rows = len(x)
    flat = result.reshape(rows, -1, result.shape[-1])  # (b, n, d)
    dtype = result.dtype if flat.shape[1] > a.shape[1] else a.dtype
    low = torch.bmm(x.to(dtype).reshape(rows, -1, x.shape[-1]), a.to(dtype).transpose(1, 2))  # (b, n, r)
    return torch.baddbmm(flat.to(dtype), low, b.to(dtype).transpose(1, 2)).to(result.dtype).view(result.shape)


class Folded(NamedTuple):
    """A weight with an update in it, and the factor (d, 1) on the outputs of its matrix, where there is one."""

    weight: Tensor
    factor: Tensor | None = None


class LowRank(nn.Module):
    """The trained factors a = A and b = B for one layer, with their scale: alpha / rank, or alpha / √rank (rsLoRA).

    A starts uniform in ±1/√k (Kaiming with slope √5, as in the reference implementation) and B at zero; for an
    embedding A at zero and B normal. Both stay in fp32 when the layer's weight is bf16 or fp16. Raises TypeError for a
    layer that cannot have them, ValueError for a bad rank.
    """

    def __init__(
        self,
        layer: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"{type(self).__name__}: rank must be at least 1, got {rank}")
        self.kind = kind_of(layer)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        weight: Any = layer.weight
        shapes = self.kind.shapes(layer, rank)
        a, b = (torch.zeros(shape, dtype=factor_dtype(weight), device=weight.device) for shape in shapes)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        if self.kind == EMBEDDING:
            nn.init.normal_(self.b, generator=generator)
        else:
            bound = 1 / math.sqrt(a[0].numel())
            nn.init.uniform_(self.a, -bound, bound, generator=generator)
        self.begin(layer)

    def begin(self, layer: Any) -> None:
        """Make what else is trained, from the layer as it is and the factors as they start: here nothing."""

    def dropped(self, x: Tensor) -> Tensor:
        """The low-rank path's input: x with dropout while training."""
        return F.dropout(x, self.dropout) if self.drops(x) else x

    def drops(self, x: Tensor) -> bool:
        """Whether dropout acts on x: while training, and not on token numbers."""
        return self.training and self.dropout > 0 and x.is_floating_point()

    @torch.no_grad()
    def delta(self, layer: Any) -> Tensor:
        """The update scale · B A as a matrix (d, k), in fp32 (fp64 for fp64 parameters)."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return self.scale * self.kind.product(layer, self.a.to(dtype), self.b.to(dtype))

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        shapes = f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}"
        return f"{shapes}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout}"


class LoRAUpdate(LowRank):
    """LoRA as a change of a layer's result: result + scale · B A x."""

    def update(self, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """The result (b, …) of `layer` on x, with the update."""
        return self.kind.add(layer, result, self.dropped(x), self.a, self.b, self.scale)

    @staticmethod
    def mixed(layer: Any, x: Tensor, result: Tensor, rows: Sequence[LoRAUpdate | None]) -> Tensor | None:
        """The same where every row has its own update or none; None where that is not one computation."""
        updates = list(dict.fromkeys(row for row in rows if row is not None))
        if any(each.kind not in (LINEAR, TRANSPOSED) for each in updates):
            return None
        if len({each.dropout for each in updates if each.drops(x)}) > 1:
            return None
        a, b = stacked(updates, rows)
        return lora_rows(result, updates[0].dropped(x), a, b)

    def why_not_merge(self, layer: Any) -> str | None:
        """Every such update has the form of the weight."""
        return None

    @torch.no_grad()
    def merged(self, layer: Any) -> Folded:
        """W + scale · B A, summed in fp32 and rounded once to W's dtype."""
        total = widened_matrix(self, layer) + self.delta(layer)
        return Folded(self.kind.layout(total, layer.weight).to(layer.weight.dtype))

    @torch.no_grad()
    def unmerged(self, layer: Any, folded: Folded) -> Tensor:
        """The weight without the update, to the rounding of its dtype."""
        weight = folded.weight
        matrix = self.kind.matrix(weight).to(torch.promote_types(self.a.dtype, torch.float32))
        matrix = matrix if folded.factor is None else matrix / folded.factor
        return self.kind.layout(matrix - self.delta(layer), weight).to(weight.dtype)


def widened_matrix(update: LowRank, layer: Any) -> Tensor:
    """The layer's weight as a matrix (d, k) in fp32, or in fp64 where it or the factors are."""
    dtype = torch.promote_types(torch.promote_types(update.a.dtype, layer.weight.dtype), torch.float32)
    return update.kind.matrix(layer.weight).to(dtype)


def stacked(updates: Sequence[LowRank], rows: Sequence[LowRank | None]) -> tuple[Tensor, Tensor]:
    """Factors a (b, r, k) and b (b, d, r), times its scale, for every row; ranks below the largest are padded by 0."""
    most = max(each.rank for each in updates)
    a = [F.pad(each.a, (0, 0, 0, most - each.rank)) if each.rank < most else each.a for each in updates]
    b = [F.pad(each.b, (0, most - each.rank)) if each.rank < most else each.b for each in updates]
    scales = [each.scale for each in updates]
    if None in rows:
        a, b, scales = [*a, torch.zeros_like(a[0])], [*b, torch.zeros_like(b[0])], [*scales, 0.0]
    places = {id(each): place for place, each in enumerate(updates)}
    order = [places.get(id(row), len(updates)) for row in rows]
    factor = torch.tensor(scales, dtype=b[0].dtype, device=b[0].device)
    stacks = torch.stack(a), torch.stack(b) * factor[:, None, None]
    if order == list(range(len(a))):
        return stacks
    at = torch.tensor(order, device=a[0].device)
    return stacks[0].index_select(0, at), stacks[1].index_select(0, at)


@export("nn.LoRALinear", twin=lora_linear, stable=True)
class LoRALinear(LowRank):
    """A linear layer with a trainable low-rank update; it holds the base layer's own weight and bias.

    `base` is an nn.Linear, or transformers' Conv1D (its weight is stored transposed, (k, d)). The parameters `weight`
    and `bias` are the base's own objects under the base's own names, so a state dict keeps its keys and gains only
    `a` and `b`. scale = alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski 2023). A starts uniform in
    ±1/√k (Kaiming with slope √5, as in the reference implementation), B at zero. a and b are kept in fp32 when the
    weight is bf16 or fp16. Raises TypeError for a layer that is not a plain linear one, ValueError for a bad rank.

    >>> base = nn.Linear(6, 4)
    >>> layer = LoRALinear(base, rank=2, alpha=4.0)
    >>> x = torch.randn(3, 6)
    >>> bool((layer(x) == base(x)).all())
    True
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        try:
            linear = kind_of(base) in (LINEAR, TRANSPOSED)
        except TypeError as error:
            raise TypeError(f"LoRALinear: {error}") from None
        if not linear:
            raise TypeError(f"LoRALinear: a {type(base).__name__} is not linear; volvelle.adapt.apply adapts it too")
        super().__init__(base, rank, alpha, dropout=dropout, rslora=rslora, generator=generator)
        self.weight: nn.Parameter
        self.bias: nn.Parameter | None
        self.register_parameter("weight", base.weight)  # pyright: ignore[reportArgumentType]
        self.register_parameter("bias", base.bias)  # pyright: ignore[reportArgumentType]
        # In a tuple, so that the base is no submodule: its parameters would appear under two names.
        self._base = (base,)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., k) to (..., d)."""
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.kind.matrix(self.weight), self.bias, self.a, self.b, self.scale, dropout=dropout)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return the base layer with W + scale · B A as its weight, summed in fp32 and rounded once to W's dtype."""
        base: Any = self._base[0]
        total = self.kind.layout(widened_matrix(self, self) + self.delta(self), self.weight)
        base.weight = nn.Parameter(total.to(self.weight.dtype).contiguous(), requires_grad=self.weight.requires_grad)
        base.bias = self.bias
        return base.train(self.training)
