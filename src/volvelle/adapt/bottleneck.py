"""Bottleneck adapters on a model: find the sublayers by the names of the model's family, and seat one on each.

Behind a sublayer means behind its last linear layer, which projects back to the model's width: that is where Houlsby et
al. put it, before dropout and the residual sum. Beside one means from the sublayer's input to its result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from volvelle.adapt.methods import AdapterLayer, Bottleneck
from volvelle.adapt.sites import modules_of, seat
from volvelle.adapt.switch import Switch
from volvelle.adapt.targets import matches, select
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.bottleneck import BottleneckAdapter
from volvelle.parts.lowrank.kinds import factor_dtype, is_linear


class Behind(BottleneckAdapter):
    """A bottleneck on what a layer gives."""

    def update(self, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """Result + scale · up(f(down(result)))."""
        return self(result)


class Beside(BottleneckAdapter):
    """A bottleneck on what a module gets, added to what it gives."""

    def update(self, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """Result + scale · up(f(down(x)))."""
        return self(x, result)


class Family(NamedTuple):
    """How a family of models names, in every block: the last layers of attention and of the feed-forward network, and
    the module that is the feed-forward network, where one is.
    """

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    module: str | None


FAMILIES = (
    Family(("self_attn.o_proj",), ("mlp.down_proj",), "mlp"),  # Llama, Qwen, Mistral, Gemma, our Decoder
    Family(("attn.c_proj",), ("mlp.c_proj",), "mlp"),  # GPT-2
    Family(("attn.out_proj",), ("mlp.c_proj",), "mlp"),  # GPT-Neo
    Family(("attention.dense",), ("mlp.dense_4h_to_h",), "mlp"),  # GPT-NeoX, Pythia
    Family(("self_attention.dense",), ("mlp.dense_4h_to_h",), "mlp"),  # Bloom, Falcon
    Family(("attention.output.dense",), ("output.dense",), None),  # BERT, RoBERTa, RoFormer
    Family(("attention.out_lin",), ("ffn.lin2",), "ffn"),  # DistilBERT
    Family(("self_attn.out_proj", "encoder_attn.out_proj"), ("fc2",), None),  # BART
    Family(("self_attn.out_proj",), ("fc2",), None),  # OPT
    Family(("SelfAttention.o", "EncDecAttention.o"), ("DenseReluDense.wo",), "DenseReluDense"),  # T5
    Family(("SelfAttention.o",), ("DenseReluDense.wo",), "DenseReluDense"),  # T5's encoder
)


def install(
    model: nn.Module, method: Bottleneck, name: str, switch: Switch, generator: torch.Generator | None = None
) -> dict[str, AdapterLayer]:
    """Seat a bottleneck on every chosen layer or module; return the seats by path. Nothing changes on an error."""
    modules = modules_of(model)
    kind = Beside if method.form == "parallel" else Behind
    updates = {}
    for path in target_paths(model, method):
        weight = _last_weight(modules[path])
        if weight is None:
            raise VolvelleError(
                f"{method.label}: cannot adapt {path}: a {type(modules[path]).__name__} has no linear layer",
                tip="target the last linear layer of a sublayer, or with form=parallel the sublayer itself",
            )
        if kind is Behind and not is_linear(modules[path]):
            raise VolvelleError(
                f"{method.label}: cannot adapt {path}: a {type(modules[path]).__name__} is no linear layer",
                tip="target the last linear layer of a sublayer; form=parallel takes the sublayer itself",
            )
        width, parameter = weight
        updates[path] = kind(
            width,
            method.width or max(1, width // method.reduction),
            activation=method.activation,
            scale=method.scale,
            dropout=method.dropout,
            dtype=factor_dtype(parameter),
            device=parameter.device,
            generator=generator,
        )
    return {path: seat(model, path, update, name, switch) for path, update in updates.items()}


def target_paths(model: nn.Module, method: Bottleneck) -> list[str]:
    """The layers that the adapters go behind, or the modules they go beside, in the model's order."""
    paths, targets = list(modules_of(model)), method.targets
    if targets is None:
        family = family_of(model)
        if method.form == "houlsby":
            targets = family.attention + family.feed_forward
        elif method.form == "pfeiffer":
            # BERT's "attention.output.dense" ends with "output.dense" too.
            behind = [path for path in paths if matches(family.feed_forward, path)]
            targets = tuple(path for path in behind if not matches(family.attention, path))
        elif family.module is None:
            raise VolvelleError(
                f"{method.label}: {type(model).__name__} has no module that is its whole feed-forward network",
                tip="form=houlsby or form=pfeiffer, or name modules with targets=",
            )
        else:
            targets = (family.module,)
    return select(paths, targets, exclude=method.exclude, layers=method.layers)


def family_of(model: nn.Module) -> Family:
    """The first family all of whose names the model has; VolvelleError when there is none."""
    paths = [path for path, module in modules_of(model).items() if is_linear(module)]
    for family in FAMILIES:
        if all(any(matches((name,), path) for path in paths) for name in family.attention + family.feed_forward):
            return family
    raise VolvelleError(
        f"adapters: {type(model).__name__} names its attention and feed-forward layers as no family that is known",
        tip='name the last linear layer of each sublayer with targets=, for example ("o_proj", "down_proj")',
    )


def width_of(module: nn.Module) -> int | None:
    """The width of what a module gives: that of its last linear layer; None where it has none."""
    weight = _last_weight(module)
    return None if weight is None else weight[0]


def _last_weight(module: nn.Module) -> tuple[int, nn.Parameter] | None:
    """The width of what a module gives, that of its last linear layer, and that layer's weight."""
    layers: list[Any] = [each for each in module.modules() if is_linear(each)]
    if not layers:
        return None
    weight = layers[-1].weight
    return weight.shape[0] if isinstance(layers[-1], nn.Linear) else weight.shape[1], weight
