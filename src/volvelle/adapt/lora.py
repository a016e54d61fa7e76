"""LoRA and DoRA on a model: find the target layers, and seat a low-rank update on each."""

from __future__ import annotations

import torch
from torch import nn

from volvelle.adapt.methods import AdapterLayer, DoRA, LoRA
from volvelle.adapt.sites import modules_of, seat
from volvelle.adapt.switch import Switch
from volvelle.adapt.targets import ALL_LINEAR, select
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.dora import DoRAUpdate
from volvelle.parts.lowrank.kinds import is_linear, why_not
from volvelle.parts.lowrank.lora import LoRAUpdate


def install(
    model: nn.Module, method: LoRA, name: str, switch: Switch, generator: torch.Generator | None = None
) -> dict[str, AdapterLayer]:
    """Seat an update on every targeted layer; return the seats by path. Nothing changes on an error."""
    kind = DoRAUpdate if isinstance(method, DoRA) else LoRAUpdate
    updates: dict[str, LoRAUpdate] = {}
    for path in target_paths(model, method):
        try:
            updates[path] = kind(
                model.get_submodule(path),
                method.rank_of(path),
                method.alpha_of(path),
                dropout=method.dropout,
                rslora=method.rslora,
                generator=generator,
            )
        except ValueError as error:
            raise VolvelleError(f"{method.label}: cannot adapt {path}: {error}") from None
    return {path: seat(model, path, update, name, switch) for path, update in updates.items()}


def target_paths(model: nn.Module, method: LoRA) -> list[str]:
    """The layers that `method` adapts in `model`, in the model's order, each checked to have the right form."""
    modules = modules_of(model)
    linear = [path for path, module in modules.items() if is_linear(module)]
    if isinstance(method.targets, str) and method.targets.lower() == ALL_LINEAR:
        head = _output_head(model)
        linear = [path for path in linear if modules[path] is not head and bypassed(model, path) is None]
        if not linear:
            raise VolvelleError(f"targets={ALL_LINEAR!r}: this model has no nn.Linear or Conv1D layer")
        return select(linear, tuple(linear), exclude=method.exclude, layers=method.layers)
    chosen = select(list(modules), method.targets, exclude=method.exclude, layers=method.layers, offer=linear)
    for path in chosen:
        reason = why_not(modules[path]) or bypassed(model, path)
        if reason is not None:
            raise VolvelleError(
                f"{method.label}: cannot adapt {path}: {reason}", tip='target layers by name, or targets="all-linear"'
            )
    return chosen


def bypassed(model: nn.Module, path: str) -> str | None:
    """Why an adapter at `path` would be passed by without a word, or None."""
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weights directly when it does not train"
    return None


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None
