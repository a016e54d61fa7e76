"""Weights of backbones on disk: safetensors, or pickled tensors read without running code; four formats of names.

A file is read whole, recognised by its names (`key_maps.FORMATS`), checked name by name and shape by shape, and only
then copied into the network, so a wrong file changes nothing.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path
from volvelle.systems.backbone.config import AnyConfig
from volvelle.systems.backbone.key_maps import FORMATS, TIMM, Format
from volvelle.systems.key_map import Binding, KeyMap, some
from volvelle.systems.pickles import load_pickle

COUNTER = "num_batches_tracked"
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "ema", "net")
"""Keys under which training scripts keep the weights beside other things."""


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pth, .pt, .bin or .ckpt file, on the CPU.

    Pickled files are opened by `load_pickle`: what could run code is refused, and no code runs. Raises VolvelleError
    for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise VolvelleError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = load_pickle(path)
    except pickle.UnpicklingError as error:
        raise VolvelleError(
            f"{path}: not a file of tensors, or one that holds more; reading it could run code, so it is refused",
            tip="save the model's state_dict() alone, best as safetensors",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise VolvelleError(f"{path}: truncated, or not a file of weights ({str(error).splitlines()[0]})") from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise VolvelleError(f"{path}: holds {type(content).__name__}, not named tensors")
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise VolvelleError(f"{path}: {some([str(name) for name in strange])}: not tensors")
    if all(name.startswith("module.") for name in content):  # what DataParallel puts before every name
        return {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def recognise(names: Mapping[str, Any]) -> Format:
    """The format whose mark is in one of the names."""
    return next(form for form in FORMATS if any(form.mark in name for name in names))


def load_tensors(model: nn.Module, config: AnyConfig, tensors: Mapping[str, Tensor], *, source: str) -> Format:
    """Copy foreign tensors into the network and say which format they had.

    Raises VolvelleError that names what is missing, what is unknown, and the layers whose shapes differ.
    """
    form = recognise(tensors)
    held = dict(model.state_dict())
    bindings = key_map_of(form, config).bind({name: tuple(value.shape) for name, value in held.items()})
    counters = frozenset(binding.theirs for binding in bindings if binding.theirs.endswith(COUNTER))
    places = replace(key_map_of(form, config), optional=counters).locate(tensors, bindings, source=source)
    found = [(binding, tensors[places[binding.theirs]]) for binding in bindings if binding.theirs in places]
    _check_shapes(found, config.name, source)
    with torch.no_grad():
        for binding in bindings:
            if binding.theirs not in places:
                held[binding.ours[0]].zero_()
        for binding, tensor in found:
            for name, part in binding.split(tensor, source=source).items():
                held[name].copy_(part)
    return form


def to_tensors(model: nn.Module, config: AnyConfig, form: Format = TIMM) -> dict[str, Tensor]:
    """The network's state under the names of a format. Raises VolvelleError where the format has no place for it."""
    return key_map_of(form, config).write(model.state_dict())


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a .safetensors file in one step."""
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})


def key_map_of(form: Format, config: AnyConfig) -> KeyMap:
    """The rules for this network. Raises VolvelleError where the format has no such network."""
    key_map = form.key_map(config)
    if key_map is None:
        raise VolvelleError(
            f"{form.name} has no {config.name}",
            tip="choose the backbone that the file belongs to, or write it in the format timm",
        )
    return key_map


def _check_shapes(found: list[tuple[Binding, Tensor]], name: str, source: str) -> None:
    wrong = [
        f"{binding.theirs} is {tuple(tensor.shape)} in the file and {binding.their_shape} in {name}"
        for binding, tensor in found
        if tuple(tensor.shape) != binding.their_shape
    ]
    if wrong:
        listed = "\n  ".join(wrong[:5]) + (f"\n  … and {len(wrong) - 5:,} more" if len(wrong) > 5 else "")
        raise VolvelleError(
            f"{source}: {len(wrong):,} of {len(found):,} tensors have another shape\n  {listed}",
            tip="is it a file of another network, or of another number of classes?",
        )
