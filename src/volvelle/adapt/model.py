"""Adapters are transforms of a model: apply one, merge it into the weights, take it out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from volvelle.adapt.methods import Method
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.lora import LoRALinear

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

    @classmethod
    def of(cls, model: nn.Module, record: Record) -> Adapted:
        """Describe the adapter whose note is `record`."""
        return cls(model, record.method, record.parameters(), sum(p.numel() for p in model.parameters()))

    @property
    def trainable_count(self) -> int:
        """The number of trained values."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    def __str__(self) -> str:
        share = 100 * self.trainable_count / max(1, self.total_count)
        count = f"{self.trainable_count:,} of {self.total_count:,} parameters"
        return f"{self.method.label}: trains {count} ({share:.2g} %)"


@dataclass
class Record:
    """The note an adapted model carries: which modules belong to the adapter, and what was frozen for it."""

    method: Method
    modules: dict[str, LoRALinear]
    frozen: frozenset[str]
    merged: bool = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, by their name in the model."""
        return {f"{path}.{name}": getattr(layer, name) for path, layer in self.modules.items() for name in ("a", "b")}


def apply(model: nn.Module, method: Method, *, generator: torch.Generator | None = None) -> Adapted:
    """Rewrite `model` in place for `method`, freeze the rest, and return what to train.

    Works on any nn.Module, ours or another library's. The output at step 0 is the base model's, bit for bit.
    `generator` seeds the new parameters (default: torch's global one). Raises VolvelleError when the model already
    carries an adapter, or when a target layer does not exist (the close names are listed); the model is then unchanged.

    >>> from volvelle.adapt.methods import LoRA
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> adapted = apply(model, LoRA(rank=2, targets=("0",)))
    >>> list(adapted.trainable), adapted.trainable_count
    (['0.a', '0.b'], 32)
    """
    if record_of(model) is not None:
        raise VolvelleError(
            "apply: this model already carries an adapter",
            tip="merge it with volvelle.adapt.merge(model), or take it out with volvelle.adapt.remove(model)",
        )
    modules = method.install(model, generator)
    layers = {path: layer for path, layer in modules.items() if isinstance(layer, LoRALinear)}
    own = {f"{path}.{name}" for path in layers for name in ("a", "b")}
    frozen = frozenset(name for name, p in model.named_parameters() if p.requires_grad and name not in own)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    record = Record(method, layers, frozen)
    setattr(model, _RECORD, record)
    return Adapted.of(model, record)


def adapted(model: nn.Module) -> Adapted | None:
    """Describe the adapter that `model` carries, or None when it carries none."""
    record = record_of(model)
    return None if record is None else Adapted.of(model, record)


def merge(model: nn.Module, *, keep: bool = True) -> nn.Module:
    """Fold the adapter into the weights, W ← W + scale · B A, and return the model with exactly the base's modules.

    The sum is taken in fp32 and rounded once to the weight's dtype, so fp32 logits equal the unmerged ones to rounding.
    With `keep` the original weights stay in memory and `unmerge` restores them bit for bit; `keep=False` frees them and
    the adapter is gone. Raises VolvelleError when a merged weight is shared with another layer.
    """
    record = _require(model, "merge")
    if record.merged:
        raise VolvelleError("merge: the adapter of this model is already merged")
    _refuse_shared(model, record)
    for path, layer in record.modules.items():
        model.set_submodule(path, layer.merge())
    record.merged = True
    if not keep:
        _forget(model, record)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: the adapter is beside the weights again, and these are the original ones, bit for bit."""
    record = _require(model, "unmerge")
    if not record.merged:
        raise VolvelleError("unmerge: the adapter of this model is not merged")
    for path, layer in record.modules.items():
        base = model.get_submodule(path)
        # The model may have moved to another device while the adapter was out of it.
        layer.to(next(base.parameters()).device)
        layer.train(base.training)
        layer.restore()
        model.set_submodule(path, layer)
    record.merged = False
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take the adapter out, merged or not: the model has its original modules, weights and `requires_grad` flags."""
    record = _require(model, "remove")
    for path, layer in record.modules.items():
        model.set_submodule(path, layer.restore())
    _forget(model, record)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context the model computes what its base computes; for a before-and-after comparison."""
    record = _require(model, "disabled")
    if record.merged:
        raise VolvelleError("disabled: the adapter is merged into the weights", tip="call volvelle.adapt.unmerge first")
    for layer in record.modules.values():
        layer.active = False
    try:
        yield model
    finally:
        for layer in record.modules.values():
            layer.active = True


def record_of(model: nn.Module) -> Record | None:
    """The note that `apply` left on the model, or None for a model without an adapter."""
    return getattr(model, _RECORD, None)


def _require(model: nn.Module, call: str) -> Record:
    record = record_of(model)
    if record is None:
        raise VolvelleError(
            f"{call}: this model carries no adapter", tip="volvelle.adapt.apply(model, LoRA()) adds one"
        )
    return record


def _refuse_shared(model: nn.Module, record: Record) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, layer in record.modules.items():
        shared = [name for name in names[id(layer.weight)] if name != f"{path}.weight"]
        if shared:
            raise VolvelleError(
                f"merge: {path}.weight is shared with {shared[0]}, merging would leave them different",
                tip="give the layer its own weight first, or do not target it",
            )


def _forget(model: nn.Module, record: Record) -> None:
    for name, parameter in model.named_parameters():
        if name in record.frozen:
            parameter.requires_grad_(True)
    delattr(model, _RECORD)
