"""Wasserstein distances on a line, where sorting solves the transport. Villani 2003, "Topics in Optimal
Transportation", section 2.2.

    W_p^p(P, Q) = ∫_0^1 |F_P⁻¹(t) - F_Q⁻¹(t)|^p dt

with F⁻¹ the quantile functions. For as many points on both sides, all of equal mass, it is the mean of |x_(i) -
y_(i)|^p over sorted values. Costs a sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from volvelle.export import export
from volvelle.parts.transport.cost import masses


@export("functional.wasserstein_1d", stable=True)
def wasserstein_1d(
    u_values: Tensor,
    v_values: Tensor,
    u_weights: Tensor | None = None,
    v_weights: Tensor | None = None,
    p: float = 1,
) -> Tensor:
    """Return W_p^p between weighted points on a line (without the p-th root), one number a column.

    u_values (n) or (n, k), v_values (m) or (m, k): k problems side by side, so that projections of many points are one
    call; weights (n) and (m) are scaled to sum to 1, equal when absent. Differentiable in the values. fp16 and bf16 are
    computed in fp32. NaN gives NaN. Names and meaning are those of ot.wasserstein_1d; for p = 1 it is
    scipy.stats.wasserstein_distance.

    Raises ValueError for shapes that do not fit, no points, and negative weights. Villani 2003, remarks 2.19.

    >>> wasserstein_1d(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([5.0, 6.0, 8.0]))
    tensor(5.)
    >>> wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([0.0]), torch.tensor([3.0, 1.0]), p=2)
    tensor(0.2500)
    """
    if (
        u_values.shape[1:] != v_values.shape[1:]
        or u_values.ndim not in (1, 2)
        or not len(u_values)
        or not len(v_values)
    ):
        raise ValueError(
            f"wasserstein_1d: u_values and v_values must be (n) and (m), or (n, k) and (m, k), with n, m >= 1, got "
            f"{tuple(u_values.shape)} and {tuple(v_values.shape)}"
        )
    if not p >= 1:
        raise ValueError(f"wasserstein_1d: p must be at least 1, got {p}")
    wide = torch.promote_types(torch.promote_types(u_values.dtype, v_values.dtype), torch.float32)
    u, v = u_values.to(wide), v_values.to(wide)
    if len(u) == len(v) and u_weights is None and v_weights is None:
        return _power(u.sort(0).values - v.sort(0).values, p).mean(0)
    flat = u.ndim == 1
    u, v = (values[:, None] if flat else values for values in (u, v))
    (u, u_top), (v, v_top) = (
        _quantiles(values, masses("wasserstein_1d", weights, len(values), values.new_empty(0, dtype=torch.float64)))
        for values, weights in ((u, u_weights), (v, v_weights))
    )
    tops = torch.cat((u_top, v_top)).sort(0).values  # (n + m, k), where either quantile function steps
    widths = tops.diff(dim=0, prepend=torch.zeros_like(tops[:1]))
    middles = (tops - widths / 2).T.contiguous()
    steps = [_at(values, top, middles) for values, top in ((u, u_top), (v, v_top))]
    found = (widths * _power(steps[0] - steps[1], p)).sum(0).to(wide)
    return found[0] if flat else found


def _quantiles(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n, k) sorted, and up to which share of the mass (n, in fp64: shares must meet) each reaches."""
    ordered, order = values.sort(0)
    return ordered, weights[order].cumsum(0)


def _at(values: Tensor, tops: Tensor, shares: Tensor) -> Tensor:
    """The quantile function at `shares` (k, n), as (n, k)."""
    found = torch.searchsorted(tops.T.contiguous(), shares).clamp(max=len(values) - 1)
    return values.gather(0, found.T)


def _power(x: Tensor, p: float) -> Tensor:
    return x.abs() if p == 1 else x.square() if p == 2 else x.abs() ** p
