"""Which back end serves which kind of call, in which dtype, how often differentiated: asked of the back ends.

The table on docs/attention.md is `table` for each device (`python -m benchmarks.tables` writes it); the tests make one
real call for every cell of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from volvelle.parts.attention.attention import BACKENDS
from volvelle.parts.attention.spec import Backend, Shape, Spec

KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "boolean mask": {"masked": True},
    "window": {"window": True},
    "packed segments": {"segments": True},
    "bias, a tensor": {"biased": True},
    "bias by distance": {"biased": True},
    "learnable bias, a tensor": {"biased": True, "learnable_bias": True},
    "learnable bias by distance": {"biased": True, "learnable_bias": True},
    "bias from q and k": {"biased": True, "learnable_bias": True, "computed_bias": True, "blockwise": lambda: True},
    "bias with a value term": {
        "biased": True,
        "learnable_bias": True,
        "value_term": True,
        "computed_bias": True,
        "blockwise": lambda: True,
    },
    "dropout": {"dropout": True},
    "log-sum-exp": {"lse": True},
}
"""What a call may have besides q, k and v: the facts in which its `Spec` differs from that of a plain call."""

DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SMALL, LARGE = 64, 2048
"""Queries and keys of a call that a back end may serve with all scores at once, and of one that it may not."""


class Level(NamedTuple):
    """What is asked of a call's derivatives."""

    name: str
    order: int
    tangents: bool = False


LEVELS = (Level("values", 0), Level("gradients", 1), Level("second", 2), Level("forward mode", 0, True))


def spec(
    kind: str, dtype: torch.dtype, level: Level, *, device: str = "cpu", n: int = SMALL, shape: Shape | None = None
) -> Spec:
    """Return the facts of a call of this kind: 4 heads over 2, n queries and keys, or the shape given."""
    plain = Spec(shape or Shape(2, 4, 2, n, n, 64, 64), device, dtype, False, False, False, False, False)
    facts = dict(KINDS[kind])
    if level.order == 0:  # with gradients off nothing is learnt
        facts.pop("learnable_bias", None)
    return plain._replace(**facts, order=level.order, tangents=level.tangents)


def table(device: str) -> list[str]:
    """Return the lines of a Markdown table: kinds of call down, back ends across, and the reasons for every gap."""
    serving = {name: one for name, one in BACKENDS.items() if _levels(one, "plain", torch.float32, device, SMALL)}
    lines = [f"| call on {device} | {' | '.join(f'`{name}`' for name in serving)} |", "|---" * (len(serving) + 1) + "|"]
    for kind in KINDS:
        lines.append(f"| {kind} | {' | '.join(_cell(one, kind, device) for one in serving.values())} |")
    for name, one in serving.items():
        reasons = _reasons(one, device)
        if reasons:
            lines += ["", f"Not `{name}`: {'; '.join(reasons)}."]
    return lines


def _levels(backend: Backend, kind: str, dtype: torch.dtype, device: str, n: int) -> tuple[str, ...]:
    return tuple(x.name for x in LEVELS if backend.supports(spec(kind, dtype, x, device=device, n=n)) is None)


def _cell(backend: Backend, kind: str, device: str) -> str:
    """The levels served, for all dtypes or for each group of them, and up to which size."""
    groups: dict[str, list[str]] = {}
    for dtype, name in DTYPES.items():
        small, large = (_levels(backend, kind, dtype, device, n) for n in (SMALL, LARGE))
        said = _said(small) if small == large else f"{_said(small)}; of many keys {_said(large)}"
        groups.setdefault(said, []).append(name)
    if len(groups) == 1:
        return next(iter(groups))
    return ", ".join(f"{'/'.join(names)}: {said}" for said, names in groups.items())


def _said(levels: tuple[str, ...]) -> str:
    if levels == tuple(level.name for level in LEVELS):
        return "all"
    if levels[:1] == ("values",) and len(levels) > 1:
        levels = levels[1:]  # who has gradients has values
    return " + ".join(levels) or "–"


def _reasons(backend: Backend, device: str) -> list[str]:
    """Every reason that the back end gives for any cell, once."""
    asked = (
        backend.supports(spec(kind, dtype, level, device=device, n=n))
        for kind in KINDS
        for dtype in DTYPES
        for n in (SMALL, LARGE)
        for level in LEVELS
    )
    return list(dict.fromkeys(reason for reason in asked if reason is not None))
