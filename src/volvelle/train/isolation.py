"""Keeping players apart: while a phase plays, nothing that belongs to another one may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from volvelle.systems.buffers import Buffer
from volvelle.train.phase import Phase


class _Place(NamedTuple):
    module: nn.Module
    name: str


class Isolation:
    """Who owns which parameter and buffer of an objective's modules.

    A parameter belongs to the phases that name it. A buffer belongs to the phases that train its nearest enclosing
    module which trains at all: a batch norm's statistics go with its gain, a codebook's counts with the generator
    around it. Buffers of modules no phase trains belong to nobody and stay as they are.
    """

    def __init__(self, phases: Sequence[Phase], modules: Mapping[str, nn.Module]):
        self.modules = modules
        held = {id(p): p for module in modules.values() for p in module.parameters()}
        self._ids = {phase.name: {id(p) for p in phase.parameters.values()} for phase in phases}
        for phase in phases:
            for name, parameter in phase.parameters.items():
                if id(parameter) not in held:
                    raise ValueError(f"Phase {phase.name!r}: parameter {name} is in none of the objective's modules")
        self.parameters = list(held.values())
        self.trained = set().union(*self._ids.values())
        self._foreign: dict[str, list[_Place]] = {phase.name: [] for phase in phases}
        for module in modules.values():
            self._assign(module)

    def _assign(self, root: nn.Module) -> None:
        parts = dict(root.named_modules())
        for path, part in parts.items():
            if not part._buffers:
                continue
            owners: set[str] = set()
            while True:
                inside = {id(p) for p in parts[path].parameters()}
                owners = {name for name, ids in self._ids.items() if ids & inside}
                if owners or not path:
                    break
                path = path.rpartition(".")[0]
            for name in set(self._ids) - owners:
                self._foreign[name].extend(_Place(part, key) for key in part._buffers)

    @contextlib.contextmanager
    def turn(self, phase: Phase) -> Iterator[None]:
        """While the block runs only the phase's parameters ask for gradients; afterwards all gradients are dropped.

        Buffers of others that the forward pass moved (running statistics) are put back, whether or not it succeeds.
        """
        own = self._ids[phase.name]
        flags = [p.requires_grad for p in self.parameters]
        for p in self.parameters:
            p.requires_grad_(id(p) in own)
        found = [(place, place.module._buffers[place.name]) for place in self._foreign[phase.name]]
        saved = [Buffer(*place, tensor, tensor.clone()) for place, tensor in found if tensor is not None]
        try:
            yield
        finally:
            for p, flag in zip(self.parameters, flags, strict=True):
                p.grad = None
                p.requires_grad_(flag)
            for buffer in saved:
                buffer.restore()

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: every phase's parameters and every persistent buffer.

        A buffer that is not persistent is what its module can make again, and is left to it.
        """
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            kept = {
                key for key, value in module.state_dict(keep_vars=True).items() if not isinstance(value, nn.Parameter)
            }
            found |= {f"{name}.{key}": p for key, p in module.named_parameters() if id(p) in self.trained}
            found |= {f"{name}.{key}": b for key, b in module.named_buffers() if key in kept}
        return found

    def frozen(self) -> dict[str, list[float]]:
        """A cheap fingerprint of the weights that are not trained: shape and 16 values of each, at even distances.

        They are not saved (an adapter's base may be a hundred times its size), so a resume must find the same ones.
        """
        prints: dict[str, list[float]] = {}
        for name, module in self.modules.items():
            for key, p in module.named_parameters():
                if id(p) not in self.trained:
                    whole = getattr(p, "full_tensor", lambda p=p: p)()  # of a sharded weight every rank has a part
                    flat = whole.detach().reshape(-1)
                    probe = flat[:: max(1, flat.numel() // 16)][:16].double().tolist()
                    prints[f"{name}.{key}"] = [*map(float, p.shape), *probe]
        return prints
