"""Adaptation methods as frozen data. Importing this file does not import torch: the command line shows these fields.

The contract, which is all that `model.py` and `files.py` know of a method:

- A **Method** is one frozen dataclass (here, or in a torch-free file of its own) and one file that rewrites the model.
  `install(model, name, switch, generator)` puts its layers into the model and returns them by their path in it.
- An **AdapterLayer** is what an adapter has at one place. `own` are its parameters, by their names below that place:
  `apply` trains exactly these. `restore` takes the layer out and `insert` puts it back; `merge` folds it into the
  weights, after `why_not_merge` has found nothing against it.
- The model's **Switch** (`switch.py`) says which adapter acts. A layer calls `switch.selection()` once in every forward
  and gets its adapter's name, another's, None (the base model), or a tuple with one of these for each row of the batch;
  wherever it is not named, it changes nothing.
- Several adapters, of any methods, live on one model under different names.
- A method whose adapters are files of their own adds a Format to `files.formats()`.

A layer may be anything that keeps this. Three ways, in order of preference:

- `sites.seat(model, path, update, name, switch)` for whatever changes the *result* of one module: LoRA, DoRA,
  bottlenecks. `update` is an nn.Module with update(layer, x, result) -> result; rows come for free.
- The same with an `update` that has `around(layer, forward, args, kwargs)`, for whatever changes what a module *gets*
  (prefixes); there the update sees the rows itself.
- Nothing at all: full fine-tuning installs no layer and sets `trains_base`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from volvelle.adapt.targets import one_rule
from volvelle.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from volvelle.adapt.switch import Switch


class AdapterLayer(Protocol):
    """What an adapter has at one place of a model."""

    def own(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by their names below the layer's path."""
        ...

    def restore(self) -> None:
        """Take this layer out: what stands at its place is what stood there before, bit for bit."""
        ...

    def insert(self) -> None:
        """Undo `restore`."""
        ...

    def why_not_merge(self, model: nn.Module) -> str | None:
        """The reason why this layer cannot be folded into the weights, or None."""
        ...

    def merge(self, *, originals: bool) -> None:
        """Fold into the weights and leave the tree; with `originals` keep what the weights were."""
        ...

    def unmerge(self) -> None:
        """Undo `merge`: bit for bit with originals, else by arithmetic."""
        ...


class Method(Protocol):
    """What `volvelle.adapt.apply` asks of an adaptation method."""

    @property
    def label(self) -> str:
        """The short name that messages use, such as "LoRA"."""
        ...

    @property
    def trains_base(self) -> bool:
        """Whether the model's own parameters are trained; True only for full fine-tuning."""
        ...

    @property
    def learning_rate(self) -> float:
        """The peak learning rate that a run starts from when none is given."""
        ...

    def install(
        self, model: nn.Module, name: str, switch: Switch, generator: torch.Generator | None
    ) -> dict[str, AdapterLayer]:
        """Put the adapter `name` into `model`; its layers by their path. On an error the model is unchanged."""
        ...


class Addition:
    """A method that adds to a model and leaves what it has as it is.

    What is added starts without effect and takes far larger steps than trained weights bear.
    """

    trains_base = False
    learning_rate = 1e-3


@dataclass(frozen=True)
class LoRA(Addition):
    """Low-rank adaptation (Hu et al. 2021): W + scale · B A with trained A (rank, k) and B (d, rank).

    Of linear layers, transformers' Conv1D, 2-D convolutions and embeddings. `targets` chooses the layers as PEFT does:
    a tuple of names, each a whole path or the end of one ("q_proj"); one string as a regular expression over the whole
    path; or "all-linear", every linear layer but the output head. `exclude` removes layers by the same rules. `layers`
    keeps only these block indices. scale = alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski 2023).
    `rank_pattern` and `alpha_pattern` map regular expressions for the end of a path to another rank or alpha. `dropout`
    acts on the input of the low-rank path (on embeddings, whose input are numbers, it does nothing).

    >>> LoRA(rank=4, alpha=8).scale_of("model.layers.0.self_attn.q_proj")
    2.0
    """

    label = "LoRA"

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
                raise UsageError(f"{self.label}: {name} must be at least 1, got {rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"{self.label}: dropout must be in [0, 1), got {self.dropout}")
        if not self.targets:
            raise UsageError(f"{self.label}: targets is empty", tip='name the layers, for example ("q_proj", "v_proj")')
        object.__setattr__(self, "targets", one_rule(self.targets))
        object.__setattr__(self, "exclude", one_rule(self.exclude))

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

    def install(
        self, model: nn.Module, name: str, switch: Switch, generator: torch.Generator | None
    ) -> dict[str, AdapterLayer]:
        """Seat a low-rank update on every targeted layer."""
        from volvelle.adapt import lora

        return lora.install(model, self, name, switch, generator)


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al. 2024): m · (W + scale · B A) / ‖W + scale · B A‖.

    The norm is taken of each output's weights, m starts as the norm of W and is trained; all other fields are LoRA's.
    As in section 4.3 of the paper the norm is treated as a constant when gradients are taken.
    """

    label = "DoRA"


Form = Literal["houlsby", "pfeiffer", "parallel"]


@dataclass(frozen=True)
class Bottleneck(Addition):
    """Bottleneck adapters: x + scale · up(f(down(x))) at the sublayers of every block, with up = 0 at the start.

    houlsby: behind attention and behind the feed-forward network, before the residual is added (Houlsby et al. 2019,
    figure 2). pfeiffer: behind the feed-forward network only (Pfeiffer et al. 2021). parallel: beside the feed-forward
    network, from its input to its output (He et al. 2022, "Towards a unified view", section 4.2, where scale = 4).
    """

    form: Form = "houlsby"
    """houlsby: two a block; pfeiffer: one; parallel: one, beside the feed-forward network."""
    width: int | None = None
    """Features in the bottleneck; None: the model's width / reduction."""
    reduction: int = 16
    """The model's width over the bottleneck's, where `width` is not given."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """The nonlinearity f."""
    scale: float = 1.0
    """Factor on what is added."""
    dropout: float = 0.0
    """Share of the bottleneck's features dropped while training."""
    targets: tuple[str, ...] | str | None = None
    """The layers behind (or modules beside) which adapters go; None: found by the names of the model's family."""
    exclude: tuple[str, ...] | str = ()
    """Layers to leave out, by the same rules as LoRA's."""
    layers: tuple[int, ...] | None = None
    """Block indices to adapt; None: all."""

    def __post_init__(self) -> None:
        for name in ("width", "reduction"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{self.label}: {name} must be at least 1, got {value}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"{self.label}: dropout must be in [0, 1), got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise UsageError(f"{self.label}: targets is empty", tip="leave it out to have them found by family")

    @property
    def label(self) -> str:
        """The short name that messages use."""
        return f"{self.form.capitalize()} adapters"

    def install(
        self, model: nn.Module, name: str, switch: Switch, generator: torch.Generator | None
    ) -> dict[str, AdapterLayer]:
        """Seat a bottleneck on every chosen layer."""
        from volvelle.adapt import bottleneck

        return bottleneck.install(model, self, name, switch, generator)


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: nothing is added, every parameter is trained. What is saved are the model's own weights."""

    label = "full fine-tuning"
    trains_base = True
    learning_rate = 3e-5  # trained weights bear small steps only

    def install(
        self, model: nn.Module, name: str, switch: Switch, generator: torch.Generator | None
    ) -> dict[str, AdapterLayer]:
        """Nothing to install."""
        return {}


def _from_pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    from volvelle.adapt.targets import matches_end

    return next((value for key, value in pattern.items() if matches_end(key, path)), default)
