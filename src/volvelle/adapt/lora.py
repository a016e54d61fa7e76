"""LoRA as a rewrite of a model: find the target layers, replace each by a `LoRALinear` that shares its weight."""

from __future__ import annotations

import torch
from torch import nn

from volvelle.adapt.methods import LoRA
from volvelle.adapt.targets import ALL_LINEAR, select
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.lora import LoRALinear, why_not_linear


def install(model: nn.Module, method: LoRA, generator: torch.Generator | None = None) -> dict[str, nn.Module]:
    """Put a `LoRALinear` in the place of every targeted layer; return them by path. Nothing changes on an error."""
    paths = target_paths(model, method)
    layers: dict[str, nn.Module] = {}
    for path in paths:
        layers[path] = LoRALinear(
            model.get_submodule(path),
            method.rank_of(path),
            method.alpha_of(path),
            dropout=method.dropout,
            rslora=method.rslora,
            generator=generator,
        )
    for path, layer in layers.items():
        layer.train(model.get_submodule(path).training)
        model.set_submodule(path, layer)
    return layers


def target_paths(model: nn.Module, method: LoRA) -> list[str]:
    """The layers that `method` adapts in `model`, in the model's order, each checked to be a linear layer."""
    modules = {path: module for path, module in model.named_modules() if path}
    linear = [path for path, module in modules.items() if why_not_linear(module) is None]
    if isinstance(method.targets, str) and method.targets.lower() == ALL_LINEAR:
        head = _output_head(model)
        linear = [path for path in linear if modules[path] is not head]
        if not linear:
            raise VolvelleError(f"targets={ALL_LINEAR!r}: this model has no nn.Linear or Conv1D layer")
        return select(linear, tuple(linear), exclude=method.exclude, layers=method.layers)
    chosen = select(list(modules), method.targets, exclude=method.exclude, layers=method.layers, offer=linear)
    for path in chosen:
        reason = why_not_linear(modules[path])
        if reason is not None:
            raise VolvelleError(
                f"LoRA: cannot adapt {path}: {reason}", tip='target layers by name, or targets="all-linear"'
            )
    return chosen


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None
