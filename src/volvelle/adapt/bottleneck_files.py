"""Bottleneck adapters on disk, in a format of our own: PEFT has none.

adapter_config.json holds `peft_type` "VOLVELLE_BOTTLENECK" (so that PEFT refuses it by name), `format` 1, the base
model's name and the fields of `Bottleneck`. The tensors of adapter_model.safetensors are `<path>.down` (m, d),
`<path>.down_bias` (m), `<path>.up` (d, m) and `<path>.up_bias` (d), where path is the adapted module's in the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from volvelle.adapt import names
from volvelle.adapt.bottleneck import width_of
from volvelle.adapt.files import WEIGHTS, Settings, Unpacked, refuse, some
from volvelle.adapt.methods import Bottleneck, Method
from volvelle.adapt.model import Adapter
from volvelle.adapt.sites import Seat, modules_of
from volvelle.errors import VolvelleError

FORMAT = 1
_PARTS = ("down", "down_bias", "up", "up_bias")


class BottleneckFormat:
    """The format of bottleneck adapters."""

    peft_types = ("VOLVELLE_BOTTLENECK",)

    def writes(self, method: Method) -> bool:
        """Bottleneck adapters."""
        return isinstance(method, Bottleneck)

    def pack(self, model: nn.Module, adapter: Adapter, bare: names.Shapes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The method's fields, and the four tensors of every layer."""
        assert isinstance(adapter.method, Bottleneck)
        fields = dataclasses.asdict(adapter.method)
        tensors = {
            f"{path}.{part}": getattr(layer.update, part)
            for path, layer in adapter.layers.items()
            if isinstance(layer, Seat)
            for part in _PARTS
        }
        return {"peft_type": self.peft_types[0], "format": FORMAT, **fields}, tensors

    def read_method(self, settings: Settings, path: Path) -> Method:
        """The method that the settings describe."""
        if settings.get("format") != FORMAT:
            raise VolvelleError(f"{path}: format {settings.get('format')!r} is not known; this version reads {FORMAT}")
        keys = [field.name for field in dataclasses.fields(Bottleneck)]
        fields: dict[str, Any] = {key: _tuple(settings[key]) for key in keys if key in settings}
        known = {*fields, "peft_type", "format", "base_model_name_or_path"}
        if unknown := sorted(set(settings) - known):
            raise VolvelleError(f"{path}: not supported: {', '.join(unknown)}")
        try:
            return Bottleneck(**fields)
        except (TypeError, VolvelleError) as error:
            raise VolvelleError(f"{path}: {error}") from None

    def unpack(
        self, model: nn.Module, method: Method, tensors: Mapping[str, Tensor], folder: Path, name: str
    ) -> Unpacked:
        """The layers that the file names, each checked against the model's."""
        assert isinstance(method, Bottleneck)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            path, _, part = key.rpartition(".")
            found.setdefault(path, {})[part] = tensor
        broken = [path for path, parts in found.items() if set(parts) != set(_PARTS)]
        if broken or not found:
            what = some(broken) if broken else "the file holds no tensors"
            raise VolvelleError(f"{folder / WEIGHTS}: not bottleneck adapters: {what}")
        modules, wrong = modules_of(model), []
        for path, parts in found.items():
            got = parts["down"].shape[1] if parts["down"].ndim == 2 else 0
            want = width_of(modules[path]) if path in modules else None
            if path not in modules:
                wrong.append(f"{path} (the model has no such layer)")
            elif want != got:
                wrong.append(f"{path} (adapter {got} wide, model {want})")
        refuse(wrong, folder)
        widths = {len(parts["down"]) for parts in found.values()}
        if len(widths) > 1:
            raise VolvelleError(f"{folder / WEIGHTS}: bottlenecks of different widths: {sorted(widths)}")
        exact = dataclasses.replace(method, targets=tuple(found), exclude=(), layers=None, width=widths.pop())
        values = {
            f"{path}.adapters.{name}.{part}": tensor for path, parts in found.items() for part, tensor in parts.items()
        }
        return Unpacked(method, exact, values)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
