"""Exact optimal transport with its proof: Kantorovich 1942; Villani 2003, "Topics in Optimal Transportation", theorem
1.3; Peyré & Cuturi 2019, "Computational Optimal Transport", sections 2.3 and 3.1.

    primal:  min_P ⟨P, M⟩,   P >= 0,  P 1 = a,  Pᵀ 1 = b
    dual:    max_{u, v} a·u + b·v,   u_i + v_j <= M_ij

    ⟨P, M⟩ - (a·u + b·v) = Σ P_ij (M_ij - u_i - v_j) >= 0        (complementary slackness: 0 exactly at the optimum)

Any feasible plan costs at least any feasible dual, so a pair with no gap between them proves itself, whoever found it.
The potentials returned are feasible by construction (v is the c-transform of u), so `dual` is a lower bound of the
exact cost even where the solver stopped early, and `gap` says by how much the plan may cost too much.

Who solves: for as many points on both sides, all of equal mass, the assignment algorithm of scipy (Crouse 2016; the
plan is a permutation by Birkhoff's theorem), and shortest paths give the potentials; otherwise HiGHS's dual simplex
through scipy. Both in fp64. Assignments of 2,000 points take seconds; general masses beyond some 300 x 300 take long,
and `sinkhorn` is the way then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.transport.c_transform import c_transform
from volvelle.parts.transport.cost import masses


class Transport(NamedTuple):
    """An optimal plan and the proof that it is one.

    `cost` ⟨P, M⟩, differentiable in M, a and b; `plan` (n, m); potentials `u` (n) and `v` (m); `dual` their value;
    `gap` cost - dual; `marginals` the largest error of the plan's sums. All but `cost` are without gradient, in fp64.
    """

    cost: Tensor
    plan: Tensor
    u: Tensor
    v: Tensor
    dual: float
    gap: float
    marginals: float


@export("functional.optimal_transport", stable=True)
def optimal_transport(a: Tensor | None, b: Tensor | None, M: Tensor) -> Transport:
    """Return the cheapest plan that moves masses a (n) onto b (m) at costs M (n, m), with its dual potentials.

    Masses are scaled to sum to 1, equal ones when None. M is any finite cost; `transport_cost(x, y)` gives W_1. The
    order of arguments is that of ot.emd. The gradient of the cost is the plan with respect to M, and the potentials
    with respect to a and b (up to a constant, since masses stay normalised). Solved on the CPU in fp64.

    Raises ValueError for shapes that do not fit, no points, negative masses and costs that are not finite, and
    RuntimeError where the solver fails. Peyré & Cuturi 2019, section 3.1.

    >>> from volvelle.parts.transport.cost import transport_cost
    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    >>> found = optimal_transport(None, None, transport_cost(x, y))
    >>> found.cost, found.plan.tolist(), found.gap
    (tensor(1.5000), [[0.5, 0.0], [0.0, 0.5]], 0.0)
    """
    if M.ndim != 2 or not M.numel():
        raise ValueError(f"optimal_transport: M must be (n, m) with n, m >= 1, got {tuple(M.shape)}")
    costs = M.detach().double().cpu()
    if not torch.isfinite(costs).all():
        raise ValueError("optimal_transport: M must be finite, got NaN or infinite costs")
    like = M.new_empty(0, dtype=torch.float64)
    p, q = (masses("optimal_transport", w, n, like) for w, n in zip((a, b), M.shape, strict=True))
    first, second = p.detach().cpu(), q.detach().cpu()
    if len(first) == len(second) and bool((first == first[0]).all()) and bool((second == second[0]).all()):
        plan, u = _assigned(costs)
    else:
        plan, u = _programmed(first, second, costs)
    v = c_transform(u, costs)
    dual = float(first @ u + second @ v)
    error = max(float((plan.sum(1) - first).abs().max()), float((plan.sum(0) - second).abs().max()))
    primal = float((plan * costs).sum())
    # The value, with the gradients that the envelope theorem gives: plan and potentials are constants.
    value = (plan.to(M) * M).sum()
    for mass, potential in ((p, u), (q, v)):
        if mass.requires_grad:
            value = value + ((mass - mass.detach()) @ potential.to(mass)).to(M.dtype)
    return Transport(value, plan.to(M.device), u.to(M.device), v.to(M.device), dual, primal - dual, error)


@export("functional.wasserstein_distance")
def wasserstein_distance(x: Tensor, y: Tensor, p: float = 1) -> Tensor:
    """Return W_p between points x (n, …) and y (m, …) of equal mass, exactly; differentiable in the points.

    The transport of Euclidean distances to the power of p, and the p-th root. Villani 2003, section 7.1.

    >>> x = torch.randn(30, 2)
    >>> bool(wasserstein_distance(x, x + torch.tensor([3.0, 4.0])) - 5 < 1e-5)
    True
    """
    from volvelle.parts.transport.cost import transport_cost

    found = optimal_transport(None, None, transport_cost(x, y, p)).cost
    return found if p == 1 else found ** (1 / p)


def _assigned(M: Tensor) -> tuple[Tensor, Tensor]:
    """The plan (n, n) of equal masses, and the potential u."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(M.numpy())
    n = len(M)
    plan = torch.zeros_like(M)
    plan[torch.from_numpy(rows), torch.from_numpy(columns)] = 1 / n
    matched = M[torch.from_numpy(rows), torch.from_numpy(columns)]
    # Potentials of an optimal assignment σ are lengths of shortest paths: from any v, v_j ← min_i M_ij - M_iσ(i) +
    # v_σ(i) until nothing moves (Bellman & Ford); without cycles of negative length n rounds are enough.
    lengths = M - matched[:, None]
    partner = torch.from_numpy(columns)
    v = torch.zeros(n, dtype=M.dtype)
    for _ in range(n):
        shorter = torch.minimum(v, (lengths + v[partner, None]).amin(0))
        if torch.equal(shorter, v):
            break
        v = shorter
    return plan, matched - v[partner]


def _programmed(a: Tensor, b: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """The plan (n, m) of any masses, and the potential u, by linear programming."""
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    n, m = M.shape
    rows = kron(eye_array(n), torch.ones(1, m, dtype=M.dtype).numpy())
    columns = kron(torch.ones(1, n, dtype=M.dtype).numpy(), eye_array(m))
    # Sums of masses agree within rounding only, and the last equation follows from the others: it is left out.
    equations = vstack([rows, columns]).tocsr()[:-1]
    found = linprog(
        M.numpy().ravel(),
        A_eq=equations,
        b_eq=torch.cat((a, b)).numpy()[:-1],
        bounds=(0, None),
        method="highs-ds",
    )
    if found.status != 0:
        raise RuntimeError(f"optimal_transport: the solver gave up ({found.message})")
    plan = torch.from_numpy(found.x).view(n, m).clamp(min=0)
    return plan, torch.from_numpy(found.eqlin.marginals[:n].copy()).to(M.dtype)
