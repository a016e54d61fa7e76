"""Batch normalisation folded into the convolutions before it: the same function with fewer passes over memory.

In evaluation mode a norm is a fixed scale and shift of each channel, and so part of the convolution that feeds it:

    s = γ / √(σ² + ε),   w' = s w,   b' = β + s (b - μ)

`fold` finds the pairs by tracing the network and changes it in place; `unfold` puts everything back, bit by bit. A
folded network is for inference: its norms are gone, so it can neither train further nor be written in a foreign format.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from volvelle.errors import VolvelleError


class Folded(nn.Identity):
    """Stands where a norm stood and keeps what `unfold` puts back: the convolution, the norm, weight and bias."""

    def __init__(self, layer: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        self.kept = (layer, norm, layer.weight, layer.bias)  # in a tuple: not part of the state dict


class _Tracer(fx.Tracer):
    """Looks only into modules that hold a norm; all others are one node, whatever they do inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inner = (part for part in m.modules() if part is not m)
        return isinstance(m, nn.BatchNorm2d) or not any(isinstance(part, nn.BatchNorm2d) for part in inner)


@torch.no_grad()
def fold(model: nn.Module) -> int:
    """Fold every norm that is the only reader of a convolution, in place, and return how many there were.

    The results differ by the rounding of the products only (1e-5 of the logits' size in fp32). Raises VolvelleError
    when the network trains, or when its forward cannot be traced.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> fold(net), unfold(net), fold(net)
    (1, 1, 1)
    """
    if model.training:
        raise VolvelleError("fold: the network is in training mode, where norms are not fixed", tip="call eval() first")
    pairs = find_pairs(model)
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        stand = Folded(layer, norm)
        weight, bias = folded(layer, norm)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        _replace(model, norm_name, stand)
    return len(pairs)


def unfold(model: nn.Module) -> int:
    """Undo `fold` and return how many norms came back; where the network was moved or cast since, they follow it."""
    stands = [(name, module) for name, module in model.named_modules() if isinstance(module, Folded)]
    for name, stand in stands:
        layer, norm, weight, bias = stand.kept
        like = layer.weight
        layer.weight = _like(weight, like)
        layer.bias = None if bias is None else _like(bias, like)
        _replace(model, name, norm.to(device=like.device, dtype=like.dtype))
    return len(stands)


def find_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(convolution, norm) by name, for each norm that reads a convolution which nobody else reads.

    Raises VolvelleError when the network's forward cannot be traced.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise VolvelleError(f"fold: {type(model).__name__} cannot be traced ({error})") from error
    modules = dict(model.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        names = str(before.target), str(node.target)
        layer, norm = modules[names[0]], modules[names[1]]
        once = calls[names[0]] == calls[names[1]] == 1
        if once and isinstance(layer, nn.Conv2d) and norm.running_var is not None:
            pairs.append(names)
    return pairs


def folded(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does both, computed in fp64."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias
    scale = gain.double() / (variance.double() + norm.eps).sqrt()
    before = mean.new_zeros(()) if layer.bias is None else layer.bias
    weight = layer.weight.double() * scale[:, None, None, None]
    bias = shift.double() + scale * (before.double() - mean.double())
    kind = layer.weight.dtype
    return weight.to(kind, memory_format=torch.preserve_format), bias.to(kind)


def _like(parameter: Tensor, other: Tensor) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and (parameter.device, parameter.dtype) == (other.device, other.dtype):
        return parameter
    return nn.Parameter(parameter.detach().to(other), requires_grad=parameter.requires_grad)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
