"""Adapters are transforms of a model: apply them, choose one, merge it into the weights, take it out again."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from volvelle.adapt.methods import AdapterLayer, Method
from volvelle.adapt.switch import Switch
from volvelle.errors import VolvelleError

DEFAULT = "default"
_RECORD = "_volvelle_adaptation"


@dataclass(frozen=True)
class Adapted:
    """What `apply` and `load` did: the model (rewritten in place), the method, and what is to be trained.

    `trainable` maps parameter names to the parameters that receive gradients; all others are frozen.
    """

    model: nn.Module
    method: Method
    trainable: dict[str, nn.Parameter]
    total_count: int
    name: str = DEFAULT

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Adapted:
        """Describe the model's adapter of that name."""
        adapter = require(model, "adapted").adapters[name]
        total = sum(p.numel() for p in model.parameters())
        return cls(model, adapter.method, adapter.parameters(model), total, name)

    @property
    def trainable_count(self) -> int:
        """The number of trained values."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    def __str__(self) -> str:
        share = 100 * self.trainable_count / max(1, self.total_count)
        count = f"{self.trainable_count:,} of {self.total_count:,} parameters"
        return f"{self.method.label}: trains {count} ({share:.2g} %)"


@dataclass
class Adapter:
    """One adapter on a model: its method, and its layers by their path."""

    method: Method
    layers: dict[str, AdapterLayer]

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What it trains, by name in the model."""
        if self.method.trains_base:
            return {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        return {
            f"{path}.{name}" if path else name: parameter
            for path, layer in self.layers.items()
            for name, parameter in layer.own().items()
        }


@dataclass
class Record:
    """The note an adapted model carries: its adapters by name, and which of its own parameters asked for gradients."""

    switch: Switch = field(default_factory=Switch)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    merged: list[str] = field(default_factory=list)  # in the order of merging

    def own(self, model: nn.Module) -> set[str]:
        """Names of all parameters that adapters brought."""
        adapters = [adapter for adapter in self.adapters.values() if not adapter.method.trains_base]
        return {name for adapter in adapters for name in adapter.parameters(model)}


def apply(
    model: nn.Module, method: Method, *, name: str = DEFAULT, generator: torch.Generator | None = None
) -> Adapted:
    """Put an adapter on `model` in place, choose it, freeze all other parameters, and return what to train.

    Works on any nn.Module, ours or another library's. At step 0 the output is the base model's (bit for bit where the
    method's page says so). Under another `name` a model carries several adapters: `using` and `activate` choose.
    `generator` seeds the new parameters (default: torch's global one). Raises VolvelleError when the name is taken, or
    when a target layer does not exist (the close names are listed); the model is then unchanged.

    >>> from volvelle.adapt.methods import LoRA
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> adapted = apply(model, LoRA(rank=2, targets=("0",)))
    >>> list(adapted.trainable), adapted.trainable_count
    (['0.adapters.default.a', '0.adapters.default.b'], 32)
    """
    known = record_of(model)
    record = known or Record()
    _check_new(record, method, name)
    before = {key for key, p in model.named_parameters() if p.requires_grad} if known is None else record.frozen
    layers = method.install(model, name, record.switch, generator)
    record.adapters[name] = Adapter(method, layers)
    record.frozen = frozenset(before)
    setattr(model, _RECORD, record)
    activate(model, name)
    return Adapted.of(model, name)


def adapted(model: nn.Module, name: str | None = None) -> Adapted | None:
    """Describe the adapter `name` (default: the chosen one) of `model`, or None when it carries none."""
    record = record_of(model)
    return None if record is None else Adapted.of(model, chosen(record, name, "adapted"))


def activate(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that acts from now on, and let its parameters alone ask for gradients; None: the base."""
    record = require(model, "activate")
    _check_names(record, [name], "activate")
    trained = set(record.adapters[name].parameters(model)) if name is not None else set()
    record.switch.chosen = name
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)


@contextlib.contextmanager
def using(model: nn.Module, adapters: str | Sequence[str | None] | None) -> Iterator[nn.Module]:
    """Within this context the model computes with the adapter of that name, with None as its base does.

    A list names one adapter (or None) for each row of the batch: one base product for all, and each row's own update.
    What asks for gradients does not change. With gradient checkpointing, backward() belongs inside the context.

    >>> from volvelle.adapt.methods import LoRA
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = apply(model, LoRA(targets=("0",)), name="a"), apply(model, LoRA(targets=("0",)), name="b")
    >>> with using(model, ["a", "b", None]):
    ...     model(torch.zeros(3, 8)).shape
    torch.Size([3, 8])
    """
    record = require(model, "using")
    _check_names(record, [adapters] if adapters is None or isinstance(adapters, str) else adapters, "using")
    with record.switch.using(adapters):
        yield model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model computes what its base computes; for a before-and-after comparison."""
    record = require(model, "disabled")
    if record.merged:
        raise VolvelleError("disabled: the adapter is merged into the weights", tip="call volvelle.adapt.unmerge first")
    if any(adapter.method.trains_base for adapter in record.adapters.values()):
        raise VolvelleError(
            "disabled: full fine-tuning changed the weights themselves", tip="load the base model again"
        )
    with record.switch.using(None):
        yield model


def merge(model: nn.Module, *, name: str | None = None, keep: bool = True, originals: bool = True) -> nn.Module:
    """Fold an adapter (default: the chosen one) into the weights; the model then has exactly the base's modules.

    The sum is taken in fp32 and rounded once to the weight's dtype, so fp32 logits equal the unmerged ones to rounding.
    With `originals` the old weights stay in memory and `unmerge` restores them bit for bit; without, it computes them,
    to the rounding of the weight's dtype. `keep=False` frees the adapter too: it is gone. Raises VolvelleError, and
    changes nothing, where a layer cannot be merged: it is no linear function of a weight, or shares it with another.
    """
    record = require(model, "merge")
    name = chosen(record, name, "merge")
    if name in record.merged:
        raise VolvelleError(f"merge: the adapter {name!r} of this model is already merged")
    layers = record.adapters[name].layers
    for path, layer in layers.items():
        reason = layer.why_not_merge(model)
        if reason is not None:
            raise VolvelleError(f"merge: {path}: {reason}", tip="leave the adapter beside the weights")
    for layer in layers.values():
        layer.merge(originals=keep and originals)
    record.merged.append(name)
    if not keep:
        _forget(model, record, name)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo the last `merge`: the adapter is beside the weights again."""
    record = require(model, "unmerge")
    if not record.merged:
        raise VolvelleError("unmerge: the adapter of this model is not merged")
    name = record.merged.pop()
    for layer in record.adapters[name].layers.values():
        layer.unmerge()
    return model


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter (default: all) out, merged or not.

    When the last one leaves, the model has its original modules, weights and `requires_grad` flags. Raises
    VolvelleError for full fine-tuning, which has nothing to take out.
    """
    record = require(model, "remove")
    names = list(record.adapters) if name is None else [chosen(record, name, "remove")]
    if any(record.adapters[each].method.trains_base for each in names):
        raise VolvelleError("remove: full fine-tuning changed the weights themselves", tip="load the base model again")
    while any(each in record.merged for each in names):
        if record.merged[-1] not in names:
            raise VolvelleError(f"remove: {record.merged[-1]!r} was merged later; unmerge it first")
        unmerge(model)
    for each in names:
        for layer in record.adapters[each].layers.values():
            layer.restore()
        _forget(model, record, each)
    return model


def record_of(model: nn.Module) -> Record | None:
    """The note that `apply` left on the model, or None for a model without an adapter."""
    return getattr(model, _RECORD, None)


def require(model: nn.Module, call: str) -> Record:
    """The model's note; raises VolvelleError when it carries no adapter."""
    record = record_of(model)
    if record is None:
        raise VolvelleError(
            f"{call}: this model carries no adapter", tip="volvelle.adapt.apply(model, LoRA()) adds one"
        )
    return record


def chosen(record: Record, name: str | None, call: str) -> str:
    """The adapter that a call is about: the one it names, else the one that acts, else the only one."""
    if name is None and isinstance(record.switch.chosen, str):
        return record.switch.chosen
    if name is None and len(record.adapters) == 1:
        return next(iter(record.adapters))
    if name is None:
        raise VolvelleError(f"{call}: which adapter? this model carries {', '.join(record.adapters)}", tip="give name=")
    _check_names(record, [name], call)
    return name


def _check_names(record: Record, names: Sequence[str | None], call: str) -> None:
    for name in names:
        if name is None:
            continue
        if name not in record.adapters:
            close = difflib.get_close_matches(name, record.adapters, n=1)
            tip = f"did you mean {close[0]}?" if close else f"it carries {', '.join(record.adapters)}"
            raise VolvelleError(f"{call}: this model carries no adapter {name!r}", tip=tip)
        if name in record.merged and call == "using":
            raise VolvelleError(f"{call}: the adapter {name!r} is merged", tip="call volvelle.adapt.unmerge first")


def _check_new(record: Record, method: Method, name: str) -> None:
    if name in record.adapters:
        raise VolvelleError(
            f"apply: this model already carries an adapter {name!r}",
            tip="give another name=, merge it with volvelle.adapt.merge(model), or take it out with "
            "volvelle.adapt.remove(model)",
        )
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise VolvelleError(f"apply: {name!r} cannot be an adapter's name", tip="a word without dots")
    full = [each for each, adapter in record.adapters.items() if adapter.method.trains_base]
    if full or (method.trains_base and record.adapters):
        raise VolvelleError("apply: full fine-tuning stands alone, it changes what other adapters add to")
    if record.merged:
        raise VolvelleError(
            f"apply: the adapter {record.merged[-1]!r} is merged, a new one would be learnt on top of it",
            tip="unmerge it first, or make it final with merge(model, keep=False)",
        )


def _forget(model: nn.Module, record: Record, name: str) -> None:
    del record.adapters[name]
    if name in record.merged:
        record.merged.remove(name)
    if record.switch.chosen == name:
        record.switch.chosen = None
    if not record.adapters:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in record.frozen)
        delattr(model, _RECORD)
