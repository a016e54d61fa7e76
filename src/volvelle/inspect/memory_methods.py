"""The adaptation methods whose memory can be planned: the library's own, by name or with options, or a function's."""

from __future__ import annotations

from typing import Any

from torch import nn

from volvelle.adapt.bottleneck import family_of
from volvelle.adapt.methods import Bottleneck, LoRA
from volvelle.adapt.model import apply
from volvelle.adapt.prefix_methods import PrefixTuning
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.kinds import is_linear

PREFIX_LENGTH = 20


def adapt(model: nn.Module, method: Any) -> nn.Module:
    """Rewrite `model` for `method` (a name, a method of volvelle.adapt, or a function) and freeze what it freezes."""
    if method == "full":
        return model
    if method == "lora":
        return apply(model, LoRA(targets="all-linear")).model
    if method == "adapter":
        return apply(model, _bottlenecks(model)).model
    if method == "prefix":
        return apply(model, PrefixTuning(PREFIX_LENGTH, hidden=None, init="random")).model
    if hasattr(method, "install"):
        return apply(model, method).model
    rewritten = method(model)
    return model if rewritten is None else rewritten


def _bottlenecks(model: nn.Module) -> Bottleneck:
    """Adapters behind every attention and feed-forward network, in families that are not known behind the last linear
    layer of whatever is called so: good enough for a plan.

    Raises VolvelleError when the model has no submodule that is called so.
    """
    try:
        family_of(model)
    except VolvelleError:
        names = ("mlp", "self_attn", "attn", "attention", "output", "ffn", "feed_forward")
        found = [(path, m) for path, m in model.named_modules() if path.rpartition(".")[2] in names]
        # Of nested matches only the outermost counts.
        outer = [(path, m) for path, m in found if not any(path.startswith(f"{other}.") for other, _ in found)]
        last = [
            [f"{path}.{name}".rstrip(".") for name, m in top.named_modules() if is_linear(m)] for path, top in outer
        ]
        if not any(last):
            raise VolvelleError(
                f"adapter: {type(model).__name__} has no attention or MLP submodule",
                tip="plan a method=Bottleneck(targets=…), or a function that inserts the adapters",
            ) from None
        return Bottleneck(targets=tuple(paths[-1] for paths in last if paths))
    return Bottleneck()
