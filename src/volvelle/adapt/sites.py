"""Adapters on one module: its class is exchanged for a subclass whose forward goes through the adapters seated on it.

This is the surgery of torch.nn.utils.parametrize. The module stays the same object with the same parameters under the
same names, whatever kind it is; an adapter adds `adapters.<name>.…` below it. The last one to leave gives the module
its own class back.

What sits there is an *update*: an nn.Module with update(layer, x, result) -> result, where x (b, …) is the module's
first input and result (b, …) what the adapters before it are not part of: the module's own result (the first entry,
where it returns a tuple). It may also have

- `merged(layer) -> Folded`, the weight with the update in it, and `unmerged(layer, folded) -> weight`, its inverse;
- `mixed(layer, x, result, rows) -> result`, one computation for a batch whose rows have different updates of its class
  (`rows[i]` is the update of row i, or None); where it is absent or returns None, the rows are grouped by update;
- `around(layer, chosen, forward, args, kwargs) -> output` in place of update, when it changes what the module gets;
  `chosen` is the update for all rows, or the list `rows`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.adapt.model import record_of
from volvelle.adapt.switch import Switch, check_rows
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.lora import Folded

Update = Any  # an nn.Module as described above
Forward = Callable[..., Any]


_REPLACED = "_forward_below_adapters"


class Host(nn.Module):
    """What a module's class is mixed with while adapters sit on it."""

    adapters: nn.ModuleDict
    adapter_switch: Switch
    base_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, through the adapters that are chosen for this batch."""
        return through_adapters(self, self.__dict__.get(_REPLACED, super().forward), args, kwargs)

    def __reduce__(self):
        # The subclass is made at run time, so that it can only be found again from the module's own class.
        return _new, (self.base_class,), self.__getstate__()


@functools.cache
def host_class(base: type[nn.Module]) -> type[Host]:
    """The subclass of `base` that stands in its place."""
    return type(f"Adapted{base.__name__}", (Host, base), {"base_class": base, "__module__": base.__module__})


def _new(base: type[nn.Module]) -> Host:
    cls = host_class(base)
    return cls.__new__(cls)


def through_adapters(host: Host, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the module's own `forward`, and let the chosen adapters change its result."""
    selection = host.adapter_switch.selection()
    if selection is None:
        return forward(*args, **kwargs)
    seated: dict[str, Update] = host.adapters._modules
    if isinstance(selection, str):
        chosen = seated.get(selection)
    else:
        rows = [seated.get(name) if name else None for name in selection]
        chosen = rows if any(row is not None for row in rows) else None
    if chosen is None:
        return forward(*args, **kwargs)
    around = _around(chosen)
    if around is not None:
        return around(host, chosen, forward, args, kwargs)
    x = _input(args, kwargs)
    output = forward(*args, **kwargs)
    if isinstance(output, tuple):
        return (_changed(host, chosen, x, output[0]), *output[1:])
    return _changed(host, chosen, x, output)


def _changed(host: Host, chosen: Update | list[Update | None], x: Tensor, result: Tensor) -> Tensor:
    if not isinstance(chosen, list):
        return chosen.update(host, x, result)
    check_rows(chosen, len(result), type(host).__name__.removeprefix("Adapted"))
    if all(row is chosen[0] for row in chosen):
        assert chosen[0] is not None
        return chosen[0].update(host, x, result)
    kinds = {type(row) for row in chosen if row is not None}
    mixed = getattr(next(iter(kinds)), "mixed", None) if len(kinds) == 1 else None
    together = None if mixed is None else mixed(host, x, result, chosen)
    return by_group(host, x, result, chosen) if together is None else together


def by_group(layer: nn.Module, x: Tensor, result: Tensor, rows: Sequence[Update | None]) -> Tensor:
    """Give every row its own update: those with the same one are computed together. All dim 0 is (b)."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row), []).append(index)
    parts, order = [], []
    for indices in groups.values():
        update = rows[indices[0]]
        at = torch.tensor(indices, device=result.device)
        part = result.index_select(0, at)
        parts.append(part if update is None else update.update(layer, x.index_select(0, at), part))
        order += indices
    joined = torch.cat(parts)
    if order == sorted(order):
        return joined
    return joined.index_select(0, torch.tensor(order, device=result.device).argsort())


def _around(chosen: Update | list[Update | None]) -> Forward | None:
    if not isinstance(chosen, list):
        return getattr(type(chosen), "around", None)
    found = {getattr(type(row), "around", None) for row in chosen if row is not None}
    if len(found) > 1:
        kinds = sorted({type(row).__name__ for row in chosen if row is not None})
        raise VolvelleError(f"adapters: {' and '.join(kinds)} on one layer cannot be mixed in one batch")
    return found.pop()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's first input, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


@dataclass(eq=False)
class Seat:
    """One update on one module: the AdapterLayer of every method that changes a module's result."""

    layer: nn.Module
    update: Update
    name: str
    switch: Switch
    original: nn.Parameter | None = None
    factor: Tensor | None = None

    def own(self) -> dict[str, nn.Parameter]:
        """The update's parameters, by their names below the module."""
        return {f"adapters.{self.name}.{name}": parameter for name, parameter in self.update.named_parameters()}

    def insert(self) -> None:
        """Seat the update; the first one on a module exchanges its class."""
        layer: Any = self.layer
        if not isinstance(layer, Host):
            layer.__class__ = host_class(type(layer))
            layer.adapters = nn.ModuleDict()
            layer.adapter_switch = self.switch
            if "forward" in vars(layer):
                # Put there by others, such as accelerate's hooks; it would come before the class's.
                setattr(layer, _REPLACED, vars(layer).pop("forward"))
        device = next((p.device for p in layer.parameters()), None)
        # The model may have moved while the adapter was out of it.
        layer.adapters[self.name] = moved(self.update, device=device).train(layer.training)

    def restore(self) -> None:
        """Take the update off; the last one to leave gives the module its class back."""
        layer: Any = self.layer
        del layer.adapters[self.name]
        if not layer.adapters:
            del layer.adapters, layer.adapter_switch
            layer.__class__ = layer.base_class
            if _REPLACED in vars(layer):
                layer.forward = vars(layer).pop(_REPLACED)

    def why_not_merge(self, model: nn.Module) -> str | None:
        """The reason why the update cannot be part of the weight, or None."""
        if not hasattr(self.update, "merged"):
            return "what it adds is no linear function of a weight"
        reason = self.update.why_not_merge(self.layer)
        if reason is not None:
            return reason
        names = [
            f"{path}.{name}".lstrip(".")
            for path, module in model.named_modules(remove_duplicate=False)
            for name, parameter in module._parameters.items()
            if parameter is self.layer.weight and module is not self.layer
        ]
        return f"its weight is shared with {names[0]}, merging would leave them different" if names else None

    @torch.no_grad()
    def merge(self, *, originals: bool) -> None:
        """Put the folded weight in the module and take the update off it."""
        layer: Any = self.layer
        folded: Folded = self.update.merged(layer)
        self.original, self.factor = (layer.weight, None) if originals else (None, folded.factor)
        layer.weight = nn.Parameter(folded.weight.contiguous(), requires_grad=layer.weight.requires_grad)
        self.restore()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, the very tensor, or compute it where it was not kept; seat the update again."""
        layer: Any = self.layer
        self.insert()
        if self.original is not None:
            self.original.data = self.original.data.to(layer.weight.device)
            layer.weight = self.original
        else:
            weight = self.update.unmerged(layer, Folded(layer.weight, self.factor))
            layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
        self.original = self.factor = None


def moved(module: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The module on that device and in that dtype, untouched where it already is: fake tensors cannot be replaced."""
    device_differs = device is not None and any(p.device != device for p in module.parameters())
    dtype_differs = dtype is not None and any(p.dtype != dtype for p in module.parameters())
    return module.to(device=device, dtype=dtype) if device_differs or dtype_differs else module


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by their path, without those that adapters brought."""
    record = record_of(model)
    own = set() if record is None else record.own(model)
    base, brought = (
        {".".join(parts[:end]) for parts in map(_split, names) for end in range(1, len(parts))}
        for names in ({name for name, _ in model.named_parameters()} - own, own)
    )
    return {path: module for path, module in model.named_modules() if path and (path in base or path not in brought)}


def _split(name: str) -> list[str]:
    return name.split(".")


def seat(model: nn.Module, path: str, update: nn.Module, name: str, switch: Switch) -> Seat:
    """Put `update` on the module at `path` as the adapter `name`."""
    seated = Seat(model.get_submodule(path), update, name, switch)
    seated.insert()
    return seated
