"""Adapters on disk: a folder with adapter_config.json and adapter_model.safetensors.

LoRA, DoRA, prefixes and prompts lie there as PEFT writes them, so that PEFT and vLLM read ours and we read theirs;
bottleneck adapters, which PEFT does not have, in a format of our own with the same two names (bottleneck_files.py).
Beside the tensors we store the base model's layer shapes in the file's metadata, which PEFT ignores: a wrong base is
then refused by name.

A **Format** turns an adapter into settings and tensors and back, for the values of `peft_type` that it names; all that
touches the disk, and all checks against the base model, are here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from volvelle.adapt import names
from volvelle.adapt.methods import Method
from volvelle.adapt.model import DEFAULT, Adapted, Adapter, apply, chosen, require
from volvelle.adapt.targets import absent_blocks
from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHAPES, _HASH = "volvelle.base_shapes", "volvelle.base_sha256"
BEYOND = "the adapter's base has no such layer"

Settings = Mapping[str, Any]


class Unpacked(NamedTuple):
    """An adapter from a file: the method, the same for exactly the file's layers, and its parameters by name."""

    method: Method
    exact: Method
    values: dict[str, Tensor]


class Format(Protocol):
    """How the adapters of some methods lie in a folder."""

    @property
    def peft_types(self) -> tuple[str, ...]:
        """The values of `peft_type` that it reads."""
        ...

    def writes(self, method: Method) -> bool:
        """Whether this format holds adapters of that method."""
        ...

    def pack(self, model: nn.Module, adapter: Adapter, bare: names.Shapes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings (peft_type among them) and tensors; `bare` are the base model's parameter shapes."""
        ...

    def read_method(self, settings: Settings, path: Path) -> Method:
        """The method that settings describe; VolvelleError names what is not supported."""
        ...

    def unpack(
        self, model: nn.Module, method: Method, tensors: Mapping[str, Tensor], folder: Path, name: str
    ) -> Unpacked:
        """The adapter `name` for `model`; VolvelleError (`refuse`) names the layers that do not fit."""
        ...


def formats() -> tuple[Format, ...]:
    """All formats."""
    from volvelle.adapt.bottleneck_files import BottleneckFormat
    from volvelle.adapt.peft_files import LowRankFormat
    from volvelle.adapt.prefix_files import PrefaceFormat

    return LowRankFormat(), BottleneckFormat(), PrefaceFormat()


def save(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None, base: str | None = None) -> Path:
    """Write one of the model's adapters (default: the chosen one) to `folder` and return the folder.

    `base` is recorded as `base_model_name_or_path` (default: the model's own `name_or_path`, when it has one). Both
    files are written beside the old ones first and renamed when complete, so a full disk leaves the previous adapter.
    Raises VolvelleError when the model carries no adapter, or one that is no file of its own (full fine-tuning).
    """
    bare = base_shapes(model)
    settings, tensors = _packed(model, name, bare)
    folder = Path(folder)
    settings["base_model_name_or_path"] = base or getattr(model, "name_or_path", None) or None
    shapes = json.dumps({key: list(shape) for key, shape in names.foreign_shapes(model, bare).items()})
    metadata = {"format": "pt", _SHAPES: shapes, _HASH: hashlib.sha256(shapes.encode()).hexdigest()}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with atomic_path(folder / CONFIG) as config, atomic_path(folder / WEIGHTS) as weights:
            # Not save_file: it puts a file of its own, private to the user, in the place of ours.
            weights.write_bytes(to_bytes(tensors, metadata=metadata))
            config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        raise VolvelleError(
            f"{folder}: the adapter could not be written ({error})", tip="what the folder held before is unchanged"
        ) from error
    return folder


def load(model: nn.Module, folder: str | os.PathLike[str], *, name: str = DEFAULT) -> Adapted:
    """Put the adapter stored in `folder` (written by us or by PEFT) on `model`, in place, and describe it.

    The layers are those the file names. Raises VolvelleError when the folder or a file is missing or damaged, when
    the adapter uses something not supported (named), or when it belongs to another base model (the layers are named);
    the model is then unchanged.
    """
    folder = Path(folder)
    settings, form = _read_settings(folder)
    method = form.read_method(settings, folder / CONFIG)
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    found = form.unpack(model, method, tensors, folder, name)
    _check_base(names.foreign_shapes(model, base_shapes(model)), metadata, folder)
    apply(model, found.exact, name=name)
    adapter = require(model, "load").adapters[name]
    adapter.method = found.method
    with torch.no_grad():
        for key, parameter in adapter.parameters(model).items():
            parameter.copy_(found.values[key])
    return Adapted.of(model, name)


def read_config(folder: str | os.PathLike[str]) -> Method:
    """The method of an adapter folder; raises VolvelleError that names every field asking for what is not supported."""
    settings, form = _read_settings(Path(folder))
    return form.read_method(settings, Path(folder) / CONFIG)


def base_name(folder: str | os.PathLike[str]) -> str | None:
    """The `base_model_name_or_path` that an adapter folder records, or None."""
    path = Path(folder) / CONFIG
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


def stored_numbers(folder: str | os.PathLike[str]) -> int:
    """How many numbers the tensors of an adapter folder hold: what a further task costs on disk."""
    tensors, _ = _read_tensors(Path(folder) / WEIGHTS)
    return sum(tensor.numel() for tensor in tensors.values())


def peft_type(folder: str | os.PathLike[str]) -> str | None:
    """The `peft_type` of an adapter folder: PEFT's name of the method, or VOLVELLE_… for formats of our own."""
    path = Path(folder) / CONFIG
    return read_json(path).get("peft_type") if path.is_file() else None


def peft_reads(where: str | os.PathLike[str] | nn.Module) -> bool:
    """Whether PEFT has the method of an adapter folder, or of a model's chosen adapter as `save` would write it."""
    kind = (
        _packed(where, None, base_shapes(where))[0]["peft_type"] if isinstance(where, nn.Module) else peft_type(where)
    )
    return not str(kind).startswith("VOLVELLE_")


def base_shapes(model: nn.Module) -> names.Shapes:
    """Parameter names and shapes of the model without its adapters, sorted by name."""
    from volvelle.adapt.model import record_of

    record = record_of(model)
    own = set() if record is None else record.own(model)
    return dict(sorted((key, tuple(p.shape)) for key, p in model.named_parameters() if key not in own))


def refuse(wrong: Iterable[str], folder: Path) -> None:
    """Raise VolvelleError when an adapter's layers, each named with the reason, do not fit the model."""
    wrong = list(wrong)
    if wrong:
        base = base_name(folder)
        tip = f"it was made for {base}" if base else None
        raise VolvelleError(f"{folder}: this adapter belongs to another base model: {some(wrong)}", tip=tip)


def some(items: list[str], limit: int = 4) -> str:
    """The first few of a list, in words."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _packed(model: nn.Module, name: str | None, bare: names.Shapes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of an adapter in the format that holds it."""
    record = require(model, "save")
    adapter = record.adapters[chosen(record, name, "save")]
    form = next((each for each in formats() if each.writes(adapter.method)), None)
    if form is None:
        raise VolvelleError(f"save: {adapter.method.label} has no adapter file", tip="save the model's weights")
    return form.pack(model, adapter, bare)


def _read_settings(folder: Path) -> tuple[dict[str, Any], Format]:
    path = folder / CONFIG
    settings = read_json(path, tip="an adapter folder holds adapter_config.json and its weights")
    if "peft_type" not in settings:
        raise VolvelleError(f"{path}: not an adapter configuration, it has no peft_type")
    known = formats()
    form = next((each for each in known if settings["peft_type"] in each.peft_types), None)
    if form is None:
        supported = ", ".join(kind for each in known for kind in each.peft_types)
        raise VolvelleError(f"{path}: peft_type {settings['peft_type']} is not supported; supported: {supported}")
    return settings, form


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        tip = "adapter_model.bin is a pickle; save it again with safetensors" if pickled else None
        raise VolvelleError(f"{path}: no such file", tip=tip)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VolvelleError(f"{path}: truncated or damaged ({error})", tip="copy or download the file again") from None


def _check_base(shapes: names.Shapes, metadata: Mapping[str, str], folder: Path) -> None:
    """Refuse where the base that an adapter of ours was made for has other blocks, or other shapes, than the model."""
    if _SHAPES not in metadata:
        return
    stored = json.loads(metadata[_SHAPES])
    differ = [key for key, shape in stored.items() if key in shapes and tuple(shape) != shapes[key]]
    wrong = [f"{key} (adapter's base {tuple(stored[key])}, model {shapes[key]})" for key in differ]
    wrong += [f"{block} (the model has no such layer)" for block in absent_blocks(stored, shapes)]
    refuse([*wrong, *(f"{block} ({BEYOND})" for block in absent_blocks(shapes, stored))], folder)
