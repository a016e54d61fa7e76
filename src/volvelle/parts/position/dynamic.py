"""Dynamic position bias (Wang et al. 2022, "CrossFormer", section 3.2): a small network turns the distance into a bias.

    softmax_j(q_i · k_j / sqrt(d) + MLP(i - j)_h)
One number goes in and one a head comes out, so there is no table and no last distance. Log-spaced distances,
    sign(i - j) log(1 + |i - j|)
(Liu et al. 2022, "Swin Transformer V2", section 3.3), keep the input of far pairs near what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from volvelle.export import export
from volvelle.parts.position.encoding import DistanceBias, PositionEncoding, distances, exact

Layers = Sequence[tuple[Tensor, Tensor]]
"""(weight, bias) of each linear layer, SiLU between them: (width, 1), (width, width) .., (h, width)."""


def _network(distance: Tensor, layers: Layers, log_distance: bool, dtype: torch.dtype) -> Tensor:
    """Return MLP(distance) for distances (...), (..., h)."""
    x = distance.to(dtype).unsqueeze(-1)
    if log_distance:
        x = x.sign() * x.abs().log1p()
    with exact(x):
        for number, (weight, bias) in enumerate(layers):
            x = functional.linear(functional.silu(x) if number else x, weight.to(dtype), bias.to(dtype))
    return x


class _NetworkBias(DistanceBias):
    def __init__(self, layers: Layers, log_distance: bool) -> None:
        self.layers, self.log_distance = layers, log_distance

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for layer in self.layers for tensor in layer)

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        if not torch.compiler.is_compiling() and distance.numel():
            low, high = int(distance.min()), int(distance.max())
            if high - low < distance.numel():  # each distance once, then looked up
                reach = torch.arange(low, high + 1, device=distance.device)
                return functional.embedding(distance - low, self._of(reach, dtype)).movedim(-1, 0)
        return self._of(distance, dtype).movedim(-1, 0)

    def _of(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        return _network(distance, self.layers, self.log_distance, dtype)


@export("functional.dynamic_bias")
def dynamic_bias(q_positions: Tensor, k_positions: Tensor, layers: Layers, *, log_distance: bool = False) -> Tensor:
    """Return MLP(i - j), the score bias of queries at i and keys at j.

    Positions are integers (n_q,) or (b, n_q), and (n_k,) or (b, n_k); layers are (weight, bias) pairs with SiLU between
    them, from width 1 to h; the result is (b or 1, h, n_q, n_k) in their dtype. The network runs once for each distance
    that occurs, under torch.compile once for each pair. Wang et al. 2022, section 3.2; log-spaced: Liu et al. 2022.

    >>> line = [(torch.tensor([[2.0]]), torch.tensor([1.0]))]
    >>> dynamic_bias(torch.tensor([1]), torch.arange(3), line)
    tensor([[[[ 3.,  1., -1.]]]])
    """
    bias = _NetworkBias(layers, log_distance)
    return bias.at(distances(q_positions, k_positions)[:, 0], layers[0][0].dtype).transpose(0, 1)


@export("nn.DynamicBias", twin=dynamic_bias)
class DynamicBias(PositionEncoding):
    """`dynamic_bias` with its network: `depth` hidden layers of `width`.

    >>> module, q = DynamicBias(8), torch.randn(2, 8, 5, 16)
    >>> module.bias().tile(q, q, torch.arange(5), torch.arange(5)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(self, heads: int, *, width: int = 32, depth: int = 2, log_distance: bool = False) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"DynamicBias: depth must be at least 1, got {depth}")
        self.log_distance = log_distance
        sizes = [1, *[width] * depth, heads]
        self.network = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Linear does, for inputs as large as distances are."""
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each layer."""
        return [(layer.weight, layer.bias) for layer in self.network if isinstance(layer, nn.Linear)]

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return the bias (b or 1, h, n_q, n_k)."""
        return dynamic_bias(q_positions, k_positions, self.layers, log_distance=self.log_distance)

    def bias(self) -> DistanceBias:
        """Return the score bias."""
        return _NetworkBias(self.layers, self.log_distance)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"log_distance={self.log_distance}"
