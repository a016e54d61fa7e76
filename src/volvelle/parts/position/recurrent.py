"""Recurrent positions, FLOATER (Liu et al. 2020, "Learning to encode position for Transformer with continuous dynamical
model", section 3): a small network generates each position's vector from the one before.

    p(t) = p(s) + ∫_s^t h(τ, p(τ)) dτ,    p_m = p(mΔ),    h(τ, p) = W_2 tanh(W_1 [p, τ] + b_1) + b_2
The vectors follow an ordinary differential equation, so there is no last position. Solved with "rk4" (the classical
fourth-order method), or with "euler": then p_{m+1} = p_m + Δ h(mΔ, p_m), a residual recurrent network.

The network is the paper's form, a time-dependent two-layer one; tanh keeps it smooth. The paper feeds p to each block;
here `embed` adds it once, and a model may call `embed` in each block with a start of its own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from volvelle.export import export
from volvelle.parts.position.encoding import PositionEncoding, widened
from volvelle.parts.position.learned import LearnedPositions

Solver = Literal["rk4", "euler"]


class Dynamics(NamedTuple):
    """The network h: w_1 (hidden, dim + 1), whose last column meets the time; b_1 (hidden,); w_2 (dim, hidden); b_2."""

    w_1: Tensor
    b_1: Tensor
    w_2: Tensor
    b_2: Tensor

    def __call__(self, time: float, p: Tensor) -> Tensor:
        """Return dp/dt at this time for p (dim,)."""
        hidden = torch.mv(self.w_1[:, :-1], p) + self.w_1[:, -1] * time + self.b_1
        return torch.mv(self.w_2, hidden.tanh()) + self.b_2


@export("functional.recurrent_positions")
def recurrent_positions(
    positions: Tensor,
    start: Tensor,
    dynamics: Dynamics,
    *,
    delta: float = 0.1,
    solver: Solver = "rk4",
    length: int | None = None,
) -> Tensor:
    """Return p_m = p(mΔ) for each position m, where dp/dt = h(t, p) and p(0) = start.

    positions are integers (n,) or (b, n), start is (dim,), dynamics the weights of h; the result is (n, dim) or
    (b, n, dim). One step of the solver a position, `length` of them: by default up to the largest position, which is
    read from the tensor, so give it under torch.compile. The work is sequential in the largest position, and each call
    begins at 0; `RecurrentPositions.frozen` makes a table for decoding.
    Raises ValueError on a position outside 0 .. length - 1, or on an unknown solver. Liu et al. 2020, section 3.

    >>> still = Dynamics(torch.zeros(3, 2), torch.zeros(3), torch.zeros(1, 3), torch.ones(1))  # dp/dt = 1
    >>> recurrent_positions(torch.tensor([0, 5]), torch.zeros(1), still, delta=0.1).flatten()
    tensor([0.0000, 0.5000])
    """
    if solver not in {"rk4", "euler"}:
        raise ValueError(f"recurrent_positions: solver must be 'rk4' or 'euler', got {solver!r}")
    if torch.compiler.is_compiling():
        if length is None:
            raise ValueError("recurrent_positions: give length under torch.compile: it cannot depend on the positions")
    elif positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or (length is not None and high >= length):
            bad = low if low < 0 else high
            raise ValueError(f"recurrent_positions: positions must be from 0 to below length {length}, got {bad}")
        length = high + 1
    return _trajectory(start, dynamics, length or 1, delta, solver)[positions]


def _trajectory(start: Tensor, h: Dynamics, length: int, delta: float, solver: Solver) -> Tensor:
    """Return p at times 0, Δ, .. (length - 1) Δ: (length, dim)."""
    dtype = start.dtype  # 16-bit weights: a long recurrence in fp32, rounded at the end
    h, p = Dynamics(*(widened(weight) for weight in h)), widened(start)
    states = [p]
    for m in range(length - 1):
        t = m * delta
        k_1 = h(t, p)
        if solver == "euler":
            p = p + delta * k_1
        else:
            k_2 = h(t + delta / 2, p + delta / 2 * k_1)
            k_3 = h(t + delta / 2, p + delta / 2 * k_2)
            k_4 = h(t + delta, p + delta * k_3)
            p = p + delta / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        states.append(p)
    return torch.stack(states).to(dtype)


@export("nn.RecurrentPositions", twin=recurrent_positions)
class RecurrentPositions(PositionEncoding):
    """`recurrent_positions` with its weights; `embed` adds the vectors to the token embeddings.

    >>> module = RecurrentPositions(8, hidden=16)
    >>> module.embed(torch.zeros(1, 3, 8), torch.arange(3)).shape
    torch.Size([1, 3, 8])
    >>> torch.equal(module.frozen(10)(torch.arange(10)), module(torch.arange(10)))
    True
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        delta: float = 0.1,
        solver: Solver = "rk4",
        length: int | None = None,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.delta, self.length = delta, length
        self.solver: Solver = solver
        self.start = nn.Parameter(torch.empty(dim))
        self.inner = nn.Linear(dim + 1, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start from N(0, 0.02) and the networks' weights as Glorot and Bengio do, biases 0."""
        nn.init.normal_(self.start, std=0.02)
        for layer in (self.inner, self.outer):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def dynamics(self) -> Dynamics:
        """The weights of h."""
        return Dynamics(self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the vectors of these positions, (n, dim) or (b, n, dim)."""
        return recurrent_positions(
            positions, self.start, self.dynamics, delta=self.delta, solver=self.solver, length=self.length
        )

    def embed(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return x (b, n, dim) plus the vectors of its positions."""
        return x + self(positions)

    def frozen(self, length: int) -> LearnedPositions:
        """Return the first `length` vectors as a table, so that a decoding step does not run the recurrence again."""
        table = LearnedPositions(length, self.start.shape[0]).to(self.start.device, self.start.dtype)
        with torch.no_grad():
            table.weight.copy_(_trajectory(self.start, self.dynamics, length, self.delta, self.solver))
        return table.requires_grad_(False)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.start.shape[0]}, delta={self.delta}, solver={self.solver!r}, length={self.length}"
