"""Linear layers at decoding speed: q, k, v (and gate, up) in one product, and one row as a matrix-vector product.

At batch 1 a decoding step reads every weight once and computes almost nothing, so its time is memory traffic plus the
number of kernels started. `fuse_projections` lays the weights of layers that read the same input one below the other
in one storage; each layer's own weight becomes a view of its rows. No name changes, no memory is doubled, and
`unfuse_projections` undoes it.

Shapes: b batch, n tokens, k features in, d features out of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain(layer: nn.Module) -> bool:
    """Whether `layer` is an nn.Linear and nothing more: no adapter, no parametrisation, no hook."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def one_row(x: Tensor) -> bool:
    """Whether a linear layer on x (b, n, k) is better computed as a matrix-vector product.

    True for one row of bf16 on the CPU without gradients: torch's matrix-vector kernel reads bf16 weights at the full
    memory rate (1.6x F.linear on an AVX-512 machine) and returns the same bits. Not under autocast or tracing.
    """
    return (
        x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] * x.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def linear_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + bias for x (1, 1, k), weight (d, k): (1, 1, d)."""
    row = x.view(-1)
    out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return out.view(1, 1, -1)


def apply_linear(layer: nn.Module, x: Tensor, row: bool) -> Tensor:
    """layer(x), as a matrix-vector product when `row` is set and the layer is a plain linear one."""
    if row and isinstance(layer, nn.Linear) and is_plain(layer):
        return linear_row(x, layer.weight, layer.bias)
    return layer(x)


class Joined:
    """The parameters of several linear layers, one below the other in one storage."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, row: bool) -> Tensor:
        """Map x (b, n, k) -> the layers' outputs side by side, (b, n, sum of d); `row` as `one_row` said."""
        return linear_row(x, self.weight, self.bias) if row else F.linear(x, self.weight, self.bias)

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether every layer is plain and its parameters still are the rows of this storage.

        Addresses are compared, so a replaced layer, an assigned weight or a cast is noticed; a weight changed in place
        (an optimiser, load_state_dict) is the same memory, which the joined product reads.
        """
        weight, bias = self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr()
        for layer in layers:
            if not isinstance(layer, nn.Linear) or not is_plain(layer) or layer.weight.data_ptr() != weight:
                return False
            weight += layer.weight.nbytes
            if bias is not None:
                if layer.bias is None or layer.bias.data_ptr() != bias:
                    return False
                bias += layer.bias.nbytes
        return True

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model has parameters of its own, so it starts with separate layers."""


class JoinsLayers(nn.Module):
    """A module some of whose linear layers read the same input and may be joined."""

    def __init__(self):
        super().__init__()
        self._joined: Joined | None = None

    def layers_to_join(self) -> tuple[nn.Module, ...]:
        """The linear layers that read the same input, in the order of their outputs."""
        raise NotImplementedError

    def joined(self) -> Joined | None:
        """The joined layers if they are still true, and gradients and tracing are off; else None."""
        # Autograd sees the layers' own parameters, not the joined storage; a tracer sees no addresses.
        if self._joined is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self._joined if self._joined.holds(self.layers_to_join()) else None

    def fuse(self) -> bool:
        """Join the layers; False when they are not all plain and alike. Parameters keep identity, names and values."""
        layers = self.layers_to_join()
        plain = [layer for layer in layers if isinstance(layer, nn.Linear) and is_plain(layer)]
        kinds = {(layer.weight.dtype, layer.weight.device, layer.bias is None, layer.in_features) for layer in plain}
        if len(plain) != len(layers) or len(kinds) != 1 or plain[0].weight.device.type == "meta":
            return False
        if self._joined is None or not self._joined.holds(layers):
            weight = _lay([layer.weight for layer in plain])
            self._joined = Joined(weight, _lay([layer.bias for layer in plain]) if plain[0].bias is not None else None)
        return True

    def unfuse(self) -> None:
        """Give every layer a storage of its own again."""
        if self._joined is not None and self._joined.holds(self.layers_to_join()):
            for layer in self.layers_to_join():
                for parameter in layer.parameters(recurse=False):
                    parameter.data = parameter.data.clone()
        self._joined = None

    def _apply(self, fn, recurse: bool = True):
        # .to() gives every parameter a storage of its own: let go of the joined one, or it would live on beside them.
        self._joined = None
        return super()._apply(fn, recurse)


def fuse_projections(model: nn.Module) -> int:
    """Join q, k, v and gate, up in every block of `model`, for decoding; returns how many groups were joined.

    State dict, parameters and results stay as they are. The joined product is taken only without gradients and only
    where the layers are plain nn.Linear, so training and adapters are unaffected; after `.to(dtype)` the layers are
    separate again. Undone by `unfuse_projections`.
    """
    return sum(module.fuse() for module in model.modules() if isinstance(module, JoinsLayers))


def unfuse_projections(model: nn.Module) -> None:
    """Undo `fuse_projections`: every layer's parameters get a storage of their own."""
    for module in model.modules():
        if isinstance(module, JoinsLayers):
            module.unfuse()


def _lay(parameters: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = rows
    return whole
