"""A certified lower bound of the Wasserstein distance, from a critic that is Lipschitz by construction.

Kantorovich & Rubinstein 1958; Villani 2003, "Topics in Optimal Transportation", theorem 1.14; as a critic's objective
Arjovsky et al. 2017, equation 2; critics of known constant: Anil, Lucas & Grosse 2019, section 5.1.

    W_1(P, Q) = sup over 1-Lipschitz f of E_P f - E_Q f  >=  (E_P s - E_Q s) / K,     K a Lipschitz constant of s

A critic whose slopes are held by a penalty or by clipping has no known K, and its E_P s - E_Q s is neither a lower nor
an upper bound. Where K is known from the weights, as with orthogonal layers and GroupSort, no critic can promise too
much, however it was trained; training it longer only makes the bound tighter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from volvelle.export import export

ROUNDING = 1e-9
"""What is taken off, relative to the scores' size, for what fp64 loses in a forward pass."""


@runtime_checkable
class Lipschitz(Protocol):
    """A critic that knows a constant K with |s(x) - s(y)| <= K ‖x - y‖, from its weights."""

    def lipschitz(self) -> float:
        """K."""
        ...


@export("functional.certified_w1")
@torch.no_grad()
def certified_w1(critic: nn.Module, x: Tensor, y: Tensor, *, batch: int = 1024) -> float:
    """Return a lower bound of W_1 between points x (n, …) and y (m, …): (mean s(x) - mean s(y)) / K, at least 0.

    `critic` is a Module with a method `lipschitz()` that maps points to scores (n) or (n, 1). It is evaluated in fp64,
    on a copy, whatever its own dtype is (K is that of its exact function, which the rounding of a forward pass in fp32
    would step outside), and what fp64 itself can lose is taken off. For a critic without such a method raises
    TypeError; `dual_bound` makes a lower bound of any scores, by comparing all pairs. Villani 2003, theorem 1.14.

    Raises ValueError for no points, for scores that are not one a point, and for a K that is not finite.

    >>> from volvelle.parts.adversarial.orthogonal import OrthogonalLinear
    >>> critic = OrthogonalLinear(1, 1)
    >>> _ = nn.init.ones_(critic.weight)
    >>> bound = certified_w1(critic, torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    >>> bound <= 1, round(bound, 6)
    (True, 1.0)
    """
    if not isinstance(critic, Lipschitz):
        raise TypeError(
            f"certified_w1: the critic must have a method lipschitz() that gives its constant, {type(critic).__name__} "
            "has none; dual_bound(scores, costs) is a lower bound for any"
        )
    if not len(x) or not len(y):
        raise ValueError(f"certified_w1: needs points on both sides, got {tuple(x.shape)} and {tuple(y.shape)}")
    wide = copy.deepcopy(critic).double().eval()
    constant = wide.lipschitz()
    if not 0 < constant < float("inf"):
        raise ValueError(f"certified_w1: the critic's Lipschitz constant must be finite and above 0, got {constant}")
    first, second = (_scores(wide, points, batch) for points in (x, y))
    # The scores' own offset is no part of what is compared.
    size = max(float((scores - first[0]).abs().max()) for scores in (first, second)) + float(first[0].abs())
    found = float(first.mean() - second.mean()) - ROUNDING * size
    return max(0.0, found / (constant * (1 + ROUNDING)))


def _scores(critic: Callable[[Tensor], Tensor], points: Tensor, batch: int) -> Tensor:
    """Scores (n) in fp64."""
    found = torch.cat([critic(part.double()) for part in points.split(batch)])
    if found.shape not in ((len(points),), (len(points), 1)):
        raise ValueError(f"certified_w1: wanted one score a point, got {tuple(found.shape)} for {len(points)}")
    return found.reshape(-1)
