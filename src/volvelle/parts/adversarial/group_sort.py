"""GroupSort: an activation that keeps the norm of the gradient. Anil, Lucas & Grosse 2019, "Sorting out Lipschitz
Function Approximation", section 4.1.

Features are parted into groups of neighbours, and each group is sorted. The Jacobian is a permutation, so the map is
1-Lipschitz in every p-norm and loses no slope, where ReLU halves it. Groups of 2 are MaxMin; one group of all features
sorts them; with absolute values and ReLU as special cases, 1-Lipschitz layers between GroupSorts approximate every
1-Lipschitz function (theorem 3).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from volvelle.export import export


@export("functional.group_sort")
def group_sort(x: Tensor, size: int = 2, *, dim: int = -1) -> Tensor:
    """Return x with each group of `size` neighbours along `dim` sorted upwards.

    x of any shape, whose length along `dim` is a multiple of `size`. Anil et al. 2019, section 4.1. Raises ValueError
    for lengths that do not divide.

    >>> group_sort(torch.tensor([3.0, 1.0, 2.0, 5.0]))
    tensor([1., 3., 2., 5.])
    """
    if size < 1 or x.ndim == 0 or x.shape[dim] % size:
        raise ValueError(
            f"group_sort: the length of dimension {dim} must be a multiple of size >= 1, got x of shape "
            f"{tuple(x.shape)} and size {size}"
        )
    groups = x.unflatten(dim, (x.shape[dim] // size, size))
    inner = dim if dim < 0 else dim + 1
    if size == 2:  # MaxMin, without a sort
        low, high = groups.unbind(inner)
        found = torch.stack((torch.minimum(low, high), torch.maximum(low, high)), inner)
    else:
        found = groups.sort(inner).values
    return found.flatten(inner - 1, inner)


@export("nn.GroupSort", twin=group_sort)
class GroupSort(nn.Module):
    """`group_sort` in groups of `size` along `dim`.

    >>> GroupSort(4)(torch.tensor([3.0, 1.0, 2.0, 5.0]))
    tensor([1., 2., 3., 5.])
    """

    def __init__(self, size: int = 2, *, dim: int = -1):
        super().__init__()
        self.size, self.dim = size, dim

    def forward(self, x: Tensor) -> Tensor:
        """Sort each group."""
        return group_sort(x, self.size, dim=self.dim)

    def extra_repr(self) -> str:
        """The options."""
        return f"size={self.size}, dim={self.dim}"
