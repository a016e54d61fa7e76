"""Adaptation methods as frozen data. Importing this file does not import torch: the command line shows these fields.

A method is one dataclass here and one file beside it that rewrites the model; `install` and the two PEFT conversions
are the whole contract, so a new method touches nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from volvelle.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn


class Method(Protocol):
    """What `volvelle.adapt.apply` asks of an adaptation method."""

    @property
    def label(self) -> str:
        """The short name that messages use, such as "LoRA"."""
        ...

    def install(self, model: nn.Module, generator: torch.Generator | None) -> dict[str, nn.Module]:
        """Rewrite `model` in place and return the new modules by their path in it."""
        ...

    def to_peft(self) -> dict[str, Any]:
        """The fields of PEFT's adapter_config.json that describe this method."""
        ...


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al. 2021): W + scale · B A with trained A (rank, k) and B (d, rank).

    `targets` chooses the layers as PEFT does: a tuple of names, each a whole path or the end of one ("q_proj"); one
    string as a regular expression over the whole path; or "all-linear", every linear layer but the output head.
    `exclude` removes layers by the same rules. `layers` keeps only these block indices. scale = alpha / rank, or
    alpha / √rank with `rslora` (Kalajdzievski 2023). `rank_pattern` and `alpha_pattern` map regular expressions for
    the end of a path to another rank or alpha. `dropout` acts on the input of the low-rank path.

    >>> LoRA(rank=4, alpha=8).scale_of("model.layers.0.self_attn.q_proj")
    2.0
    """

    rank: int = 8
    """Rank of the update: rows of A, columns of B."""
    alpha: float = 16.0
    """Numerator of the scale; doubling it doubles the update."""
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Layers to adapt: ends of their names, a regular expression, or all-linear."""
    dropout: float = 0.0
    """Share of the low-rank path's inputs dropped while training."""
    rslora: bool = False
    """Scale by alpha / √rank, which keeps large ranks stable."""
    exclude: tuple[str, ...] | str = ()
    """Layers to leave out, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Block indices to adapt; None: all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some layers, by the end of their name."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some layers."""

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if rank < 1:
                raise UsageError(f"LoRA: {name} must be at least 1, got {rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"LoRA: dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise UsageError("LoRA: targets is empty", tip='name the layers, for example ("q_proj", "v_proj")')

    @property
    def label(self) -> str:
        """The short name that messages use."""
        return "LoRA"

    def rank_of(self, path: str) -> int:
        """The rank at the layer `path`."""
        return int(_from_pattern(self.rank_pattern, path, self.rank))

    def alpha_of(self, path: str) -> float:
        """The alpha at the layer `path`."""
        return _from_pattern(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """The factor on B A at the layer `path`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)

    def install(self, model: nn.Module, generator: torch.Generator | None = None) -> dict[str, nn.Module]:
        """Replace the targeted layers by `LoRALinear` modules that share their weights."""
        from volvelle.adapt import lora

        return lora.install(model, self, generator)

    def to_peft(self) -> dict[str, Any]:
        """The fields of PEFT's LoraConfig that differ between adapters."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
            "target_modules": self.targets if isinstance(self.targets, str) else list(self.targets),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "exclude_modules": (self.exclude if isinstance(self.exclude, str) else list(self.exclude)) or None,
            "layers_to_transform": None if self.layers is None else list(self.layers),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: _whole(alpha) for key, alpha in self.alpha_pattern.items()},
        }


def _from_pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    from volvelle.adapt.targets import matches_end

    return next((value for key, value in pattern.items() if matches_end(key, path)), default)


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value
