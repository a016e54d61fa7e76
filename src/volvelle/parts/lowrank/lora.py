"""Low-rank adaptation of a linear layer: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", 4.1.

Shapes: x (..., k), weight W (d, k), bias (d), a = A (r, k), b = B (d, r), result (..., d).
The update scale * B A has rank r; B starts at zero, so at step 0 the layer is the pretrained one, bit for bit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle.export import export


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
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise ValueError(
            f"lora_linear: a must be (r, {weight.shape[1]}) and b ({weight.shape[0]}, r) for weight of shape "
            f"{tuple(weight.shape)}, got a {tuple(a.shape)} and b {tuple(b.shape)}"
        )
    frozen = F.linear(x, weight, bias)
    low = F.linear(F.dropout(x, dropout) if dropout else x, a.to(x.dtype))  # (..., r)
    # addmm adds the update while the frozen result is copied: no third (..., d) tensor.
    rows = frozen.reshape(-1, frozen.shape[-1])
    flat = torch.addmm(rows, low.reshape(-1, low.shape[-1]), b.to(x.dtype).t(), alpha=scale)
    return flat.view(frozen.shape)


@export("nn.LoRALinear", twin=lora_linear)
class LoRALinear(nn.Module):
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
        super().__init__()
        reason = why_not_linear(base)
        if reason is not None:
            raise TypeError(f"LoRALinear: {reason}")
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be at least 1, got {rank}")
        self.transposed = not isinstance(base, nn.Linear)
        self.weight: nn.Parameter
        self.bias: nn.Parameter | None
        self.register_parameter("weight", base.weight)  # pyright: ignore[reportArgumentType]
        self.register_parameter("bias", base.bias)  # pyright: ignore[reportArgumentType]
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.active = True
        # In a tuple, so that the base is no submodule: its parameters would appear under two names.
        self._base = (base,)
        d, k = self.weight.shape[::-1] if self.transposed else self.weight.shape
        dtype = torch.float32 if self.weight.dtype in {torch.bfloat16, torch.float16} else self.weight.dtype
        self.a = nn.Parameter(torch.empty(rank, k, dtype=dtype, device=self.weight.device))
        self.b = nn.Parameter(torch.zeros(d, rank, dtype=dtype, device=self.weight.device))
        nn.init.uniform_(self.a, -1 / math.sqrt(k), 1 / math.sqrt(k), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., k) to (..., d); without the update while `active` is False."""
        weight = self.weight.t() if self.transposed else self.weight
        if not self.active:
            return F.linear(x, weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, weight, self.bias, self.a, self.b, self.scale, dropout=dropout)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update scale · B A in the weight's own layout, in fp32 (fp64 for fp64 parameters)."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        delta = self.scale * (self.b.to(dtype) @ self.a.to(dtype))
        return delta.t() if self.transposed else delta

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Return the base layer with W + scale · B A as its weight, summed in fp32 and rounded once to W's dtype.

        This layer keeps the original weight, so `restore` undoes the merge bit for bit.
        """
        delta = self.delta()
        merged = (self.weight.to(torch.promote_types(delta.dtype, self.weight.dtype)) + delta).to(self.weight.dtype)
        return self._rebase(nn.Parameter(merged.contiguous(), requires_grad=self.weight.requires_grad))

    def restore(self) -> nn.Module:
        """Return the base layer with its original weight: the very tensor, so bitwise equal."""
        return self._rebase(self.weight)

    def extra_repr(self) -> str:
        """The numbers shown by print(model)."""
        shape = f"in={self.a.shape[1]}, out={self.b.shape[0]}"
        return f"{shape}, rank={self.rank}, scale={self.scale:g}, dropout={self.dropout}"

    def _rebase(self, weight: nn.Parameter) -> nn.Module:
        base = self._base[0]
        base.register_parameter("weight", weight)
        base.register_parameter("bias", self.bias)
        base.train(self.training)
        return base


def why_not_linear(module: nn.Module) -> str | None:
    """Say why a low-rank update cannot wrap `module`, or None when it can.

    >>> why_not_linear(nn.Linear(2, 2)) is None, why_not_linear(nn.ReLU())
    (True, 'a ReLU has no weight matrix; nn.Linear and Conv1D layers have')
    """
    kind = type(module).__name__
    if kind == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2:
        return None
    if not isinstance(module, nn.Linear):
        return f"a {kind} has no weight matrix; nn.Linear and Conv1D layers have"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its out_proj.weight directly, an adapter there would be ignored"
    if type(module).forward is not nn.Linear.forward:
        return f"{kind} overrides nn.Linear.forward, which a low-rank update would bypass"
    if nn.utils.parametrize.is_parametrized(module):
        return f"this {kind} computes its weight from others (a parametrization); remove that first"
    return None
