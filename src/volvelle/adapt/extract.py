"""The low-rank adapter that a full fine-tune amounts to: a truncated SVD of every weight's difference.

For W (d, k) before and W' after, the rank-r matrix nearest to Δ = W' - W, in Frobenius and in spectral norm, is the sum
of its r largest singular parts (Eckart & Young 1936). It becomes B A with B = U √S (d, r) and A = √S Vᵀ (r, k). The
energy kept is Σ_{i ≤ r} s_i² / Σ s_i² = 1 - ‖Δ - B A‖² / ‖Δ‖².
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from volvelle.adapt.files import save, some
from volvelle.adapt.lora import bypassed
from volvelle.adapt.methods import LoRA
from volvelle.adapt.model import DEFAULT, Adapted, apply, record_of
from volvelle.adapt.names import LowRank, spelled_out
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.lowrank.kinds import CONV2D, Kind, kind_of, why_not

ENERGY = 0.99
LARGE = 1024
"""Matrices whose smaller side exceeds this are sketched where the rank is at most an eighth of it."""
SETTLED = 1e-6
"""A sketch is done when an iteration adds less than this share of the energy that it has found."""


class Kept(NamedTuple):
    """What was kept of one layer: the rank, its share of the energy, and the change's norm over the weight's."""

    rank: int
    energy: float
    change: float
    shape: tuple[int, int]


@dataclass(frozen=True)
class Extraction:
    """A fine-tune as an adapter: what `adapted` says of it, and what was kept, layer by layer.

    `unchanged` are layers without a difference. `left_out` are the parameters that changed and that an adapter cannot
    hold (norms, biases), with the norm of the change over that of the parameter.
    """

    adapted: Adapted
    layers: dict[str, Kept]
    unchanged: list[str]
    left_out: dict[str, float]

    @property
    def energy(self) -> float:
        """The smallest share of the energy that a layer kept."""
        return min(kept.energy for kept in self.layers.values())

    def save(self, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
        """Write the adapter in PEFT's format; `base` names the model that it belongs to."""
        return save(self.adapted.model, folder, name=self.adapted.name, base=base)

    def __str__(self) -> str:
        ranks = [kept.rank for kept in self.layers.values()]
        text = f"LoRA of {len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}, at least {self.energy:.2%} kept"
        return text + (f"; {len(self.left_out)} changed parameters left out" if self.left_out else "")


@torch.no_grad()
def extract_lora(
    base: nn.Module, tuned: nn.Module, rank: int | None = None, *, energy: float | None = None, name: str = DEFAULT
) -> Extraction:
    """Put the LoRA on `base` that is nearest to `tuned`, and report what it keeps: base + B A ≈ tuned.

    Every layer gets the same `rank`, or the smallest one that keeps `energy` of its difference (default 0.99). The
    layers are those that LoRA knows (linear, Conv1D, Conv2d, embeddings) and whose weight changed; a weight that two
    layers share is put on both. `base` is rewritten in place, `tuned` is only read. Computed in fp64.
    Raises VolvelleError when parameters of the two do not fit (named), when nothing changed, or when one of the models
    carries an adapter that could be merged first.

    >>> base, tuned = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    >>> _ = tuned.load_state_dict(base.state_dict())
    >>> with torch.no_grad():
    ...     _ = tuned[0].weight.add_(torch.outer(torch.arange(8.0), torch.ones(8)))
    >>> extract_lora(base, tuned).layers["0"].rank
    1
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(base(x), tuned(x), atol=1e-4)
    True
    """
    if rank is not None and energy is not None:
        raise UsageError("extract_lora: give a rank or an energy, not both")
    if rank is not None and rank < 1:
        raise UsageError(f"extract_lora: rank must be at least 1, got {rank}")
    energy = ENERGY if energy is None else energy
    if not 0 < energy <= 1:
        raise UsageError(f"extract_lora: energy must lie in (0, 1], got {energy}")
    _check_models(base, tuned)
    others: dict[str, Any] = dict(tuned.named_modules(remove_duplicate=False))
    factors: dict[str, LowRank] = {}
    layers, unchanged, held = dict[str, Kept](), list[str](), set[str]()
    modules: dict[str, Any] = dict(base.named_modules())
    for path, layer in modules.items():
        if why_not(layer) is not None or bypassed(base, path) is not None:
            continue
        kind, weight = kind_of(layer), layer.weight
        held.add(f"{path}.weight".lstrip("."))
        delta = _matrix(kind, others[path].weight) - _matrix(kind, weight)
        total = float(delta.square().sum())
        if total == 0:
            unchanged.append(path)
            continue
        groups = layer.groups if kind == CONV2D else 1
        a, b, kept = _factored(delta, groups, rank, energy)
        shapes = kind.shapes(layer, len(a))
        factors[path] = LowRank(a.reshape(shapes[0]), b.reshape(shapes[1]), 1.0)
        change = (total / max(float(_matrix(kind, weight).square().sum()), 1e-300)) ** 0.5
        layers[path] = Kept(len(a), kept / total, change, (delta.shape[0], delta.shape[1]))
    if not factors:
        raise VolvelleError("extract_lora: no layer that an adapter can go to has changed")
    adapted = _installed(base, factors, name)
    return Extraction(adapted, layers, unchanged, _left_out(base, tuned, held))


def _check_models(base: nn.Module, tuned: nn.Module) -> None:
    if record_of(base) is not None:
        raise VolvelleError("extract_lora: the base carries an adapter", tip="remove it, or merge(model, keep=False)")
    record = record_of(tuned)
    if record is not None and record.own(tuned):
        raise VolvelleError("extract_lora: the tuned model carries an adapter", tip="merge(model, keep=False) it first")
    ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (base, tuned))
    wrong = [f"{name} (base {_size(p)}, tuned {_size(theirs.get(name))})" for name, p in ours.items()
             if name not in theirs or theirs[name].shape != p.shape]  # fmt: skip
    wrong += [f"{name} (base has none, tuned {_size(p)})" for name, p in theirs.items() if name not in ours]
    if wrong:
        raise VolvelleError(
            f"extract_lora: the two models do not fit: {some(wrong)}", tip="was it tuned from this base?"
        )
    broken = [name for name, p in theirs.items() if p.is_floating_point() and not p.isfinite().all()]
    if broken:
        raise VolvelleError(f"extract_lora: the tuned model has NaN or infinite values: {some(broken)}")


def _size(parameter: Tensor | None) -> str:
    return "has none" if parameter is None else " x ".join(map(str, parameter.shape))


def _matrix(kind: Kind, weight: Tensor) -> Tensor:
    return kind.matrix(weight.detach()).to("cpu", torch.float64)


def _factored(delta: Tensor, groups: int, rank: int | None, energy: float) -> tuple[Tensor, Tensor, float]:
    """A (r, k), B (d, r / groups) and the energy kept; every group of rows has its own share of the rank."""
    blocks = delta.chunk(groups)
    most = max(1, rank // groups) if rank is not None else None
    parts = [_singular(block, most) for block in blocks]
    if most is None:
        most = max(
            _enough(s, float(block.square().sum()), energy) for (_, s, _), block in zip(parts, blocks, strict=True)
        )
    most = min(most, len(parts[0][1]))
    roots = [s[:most].clamp(min=0).sqrt() for _, s, _ in parts]
    a = torch.cat([root[:, None] * vt[:most] for root, (_, _, vt) in zip(roots, parts, strict=True)])
    b = torch.cat([u[:, :most] * root for root, (u, _, _) in zip(roots, parts, strict=True)])
    return a, b, sum(float(s[:most].square().sum()) for _, s, _ in parts)


def _enough(s: Tensor, total: float, energy: float) -> int:
    """The smallest rank that keeps the share `energy` of `total`; 1 where there is nothing to keep."""
    found = s.square().cumsum(0)
    # The last sum is the total but for rounding.
    return 1 + int((found < min(energy * total, float(found[-1]) * (1 - 1e-14))).sum())


def _singular(delta: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values in falling order with U (d, m) and Vᵀ (m, k): all of them, or at least the first `rank`."""
    small = min(delta.shape)
    if rank is not None and small > LARGE and 8 * rank <= small:
        sketch = _sketched(delta, rank)
        if sketch is not None:
            return sketch
    if small < 512:
        return torch.linalg.svd(delta, full_matrices=False)
    return _by_gram(delta)


def _by_gram(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the eigenvectors of the smaller of Δ Δᵀ and Δᵀ Δ: several times faster.

    In fp64 the error is 1e-16 of the largest squared singular value, far below what the weights' own rounding left.
    """
    if delta.shape[0] > delta.shape[1]:
        u, s, vt = _by_gram(delta.T)
        return vt.T, s, u.T
    u = torch.linalg.eigh(delta @ delta.T).eigenvectors.flip(1)
    rows = u.T @ delta  # S Vᵀ
    s, order = rows.norm(dim=1).sort(descending=True)
    return u[:, order], s, rows[order] / s.clamp(min=1e-300)[:, None]


def _sketched(delta: Tensor, rank: int, *, most: int = 12) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first singular parts by subspace iteration on a random sketch (Halko et al. 2011, algorithm 4.4).

    The energy in the sketch grows with every iteration towards the best; None when it has not settled after `most`.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(delta.shape[1], rank + 10, dtype=delta.dtype, generator=generator)
    q = torch.linalg.qr(delta @ start).Q
    before = 0.0
    for _ in range(most):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
        u, s, vt = torch.linalg.svd(q.T @ delta, full_matrices=False)
        found = float(s[:rank].square().sum())
        if found - before <= SETTLED * found:
            return q @ u, s, vt
        before = found
    return None


def _installed(base: nn.Module, factors: Mapping[str, LowRank], name: str) -> Adapted:
    """Seat the factors on the base, as `load` does with those of a file."""
    rank = max(len(layer.a) for layer in factors.values())
    adapted = apply(base, spelled_out(LoRA(rank=rank, alpha=rank), factors), name=name)
    for path, layer in factors.items():
        adapted.trainable[f"{path}.adapters.{name}.a"].copy_(layer.a)
        adapted.trainable[f"{path}.adapters.{name}.b"].copy_(layer.b)
    return adapted


def _left_out(base: nn.Module, tuned: nn.Module, held: set[str]) -> dict[str, float]:
    """Parameters outside the adapter that changed, with how much: the largest change first."""
    theirs, found = dict(tuned.named_parameters()), {}
    record = record_of(base)
    brought = set() if record is None else record.own(base)
    kept = {id(p) for name, p in base.named_parameters(remove_duplicate=False) if name in held}
    for name, ours in base.named_parameters():
        if name in brought or id(ours) in kept or not ours.is_floating_point():
            continue
        before, after = ours.detach().double().cpu(), theirs[name].detach().double().cpu()
        change = float((after - before).norm())
        if change:
            found[name] = change / max(float(before.norm()), 1e-300)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
