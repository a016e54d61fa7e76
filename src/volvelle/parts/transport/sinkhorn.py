"""Entropic transport by Sinkhorn's algorithm on logarithms, with a temperature that falls.

Cuturi 2013, "Sinkhorn Distances"; Peyré & Cuturi 2019, "Computational Optimal Transport", sections 4.2 to 4.4; scaling
of ε: Schmitzer 2019, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems", section 3.

    min_P ⟨P, M⟩ + ε KL(P | a bᵀ),        P_ij = a_i b_j exp((f_i + g_j - M_ij) / ε)

    f_i ← -ε log Σ_j b_j exp((g_j - M_ij) / ε),    g_j ← -ε log Σ_i a_i exp((f_i - M_ij) / ε)

On logarithms nothing under- or overflows, however small ε is. The number of rounds grows as max M / ε; beginning at a
large ε that shrinks by a constant factor, each from the potentials of the one before, needs far fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.export import export


class Entropic(NamedTuple):
    """What `sinkhorn` found: `cost` ⟨P, M⟩ (…), `plan` (…, n, m), potentials `f` (…, n) and `g` (…, m).

    `value` (…) is the regularised objective, whose gradient in M is the plan; `error` the largest error of the plan's
    row sums, `rounds` how many were taken over all temperatures.
    """

    cost: Tensor
    plan: Tensor
    f: Tensor
    g: Tensor
    value: Tensor
    error: float
    rounds: int


@export("functional.sinkhorn", stable=True)
def sinkhorn(
    a: Tensor | None,
    b: Tensor | None,
    M: Tensor,
    reg: float,
    *,
    rounds: int = 1000,
    tolerance: float = 1e-6,
    scaling: float = 0.5,
) -> Entropic:
    """Return the entropic plan between masses a (…, n) and b (…, m) at costs M (…, n, m), with ε = `reg`.

    Masses are scaled to sum to 1, equal ones when None; zero masses are allowed. `tolerance` is the largest error of
    row sums, relative to the largest mass, at which it ends, `rounds` the most at the last temperature; `error` says
    what was reached. `scaling` in (0, 1) is the factor between temperatures; 1 begins at `reg`. The first four
    arguments are those of ot.sinkhorn. `cost` and `value` are differentiable in M with the plan held (the exact
    gradient of `value`). fp16 and bf16 are computed in fp32.

    Raises ValueError for shapes that do not fit, reg <= 0, and masses that are negative or all zero. Peyré & Cuturi
    2019, remark 4.23.

    >>> M = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> found = sinkhorn(None, None, M, 0.05)
    >>> found.plan.round(decimals=3), found.error < 1e-6
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]]), True)
    """
    if M.ndim < 2 or not M.numel() or not reg > 0 or not 0 < scaling <= 1 or rounds < 1:
        raise ValueError(
            "sinkhorn: wanted costs M (…, n, m), reg > 0, scaling in (0, 1] and rounds >= 1, got "
            f"{tuple(M.shape)}, reg {reg}, scaling {scaling} and rounds {rounds}"
        )
    costs = M.to(torch.promote_types(M.dtype, torch.float32))
    with torch.no_grad():
        log_a, log_b = (_logarithm(w, M.shape, dim, costs) for w, dim in ((a, -2), (b, -1)))
        plan, f, g, error, taken = _solve(costs.detach(), log_a, log_b, reg, rounds, tolerance, scaling)
        product = (log_a[..., :, None] + log_b[..., None, :]).expand_as(plan)
        divergence = (torch.special.xlogy(plan, plan) - plan * product.masked_fill(plan == 0, 0)).sum((-2, -1))
    cost = (plan * costs).sum((-2, -1))
    return Entropic(cost, plan, f, g, cost + reg * divergence, error, taken)


def _solve(
    M: Tensor, log_a: Tensor, log_b: Tensor, reg: float, rounds: int, tolerance: float, scaling: float
) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """Plan, potentials, error and rounds, over falling temperatures."""
    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    epsilon = max(reg, float(M.abs().max())) if scaling < 1 else reg
    taken, error, plan = 0, float("inf"), torch.empty(0)
    most = log_a.exp().amax()
    while True:
        last = epsilon == reg
        for _ in range(rounds if last else 20):  # a rough answer is enough to begin the next temperature with
            f = -epsilon * torch.logsumexp((g[..., None, :] - M) / epsilon + log_b[..., None, :], -1)
            g = -epsilon * torch.logsumexp((f[..., :, None] - M) / epsilon + log_a[..., :, None], -2)
            taken += 1
            exponent = (f[..., :, None] + g[..., None, :] - M) / epsilon
            plan = (exponent + log_a[..., :, None] + log_b[..., None, :]).exp()
            error = float(((plan.sum(-1) - log_a.exp()).abs().amax()) / most)
            if not error > tolerance:
                break
        if last:
            return plan, f, g, error, taken
        epsilon = max(reg, epsilon * scaling)


def _logarithm(weights: Tensor | None, shape: torch.Size, dim: int, like: Tensor) -> Tensor:
    """Logarithms of masses that sum to 1, for the rows (dim -2) or columns (-1) of costs of this shape."""
    wanted = shape[:-2] + shape[dim : dim + 1 or None]
    if weights is None:
        weights = like.new_ones(wanted)
    if weights.shape not in (wanted, wanted[-1:]):
        raise ValueError(
            f"sinkhorn: wanted masses {tuple(wanted)} for costs {tuple(shape)}, got {tuple(weights.shape)}"
        )
    weights = weights.detach().to(like.dtype).expand(wanted)
    if not (weights >= 0).all() or not (weights.sum(-1) > 0).all():
        raise ValueError("sinkhorn: masses must not be negative, nor all zero")
    return (weights / weights.sum(-1, keepdim=True)).log()
