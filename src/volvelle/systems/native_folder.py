"""Models of our own formats on disk: a folder with config.json, fields of frozen dataclasses, and model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")

CONFIG, SAFETENSORS = "config.json", "model.safetensors"


def write_model(model: nn.Module, values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write config.json (`values`) and model.safetensors (the model's state) into a folder."""
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(folder / SAFETENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def is_model(path: str | os.PathLike[str], kind: str) -> bool:
    """Whether a folder's config.json is one of this kind."""
    try:
        values = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("type") == kind


def load_model(path: str | os.PathLike[str], kind: str, make: Callable[[dict[str, Any], str], M]) -> M:
    """The model that `write_model` wrote; `make(values, source)` builds it of what config.json, at `source`, says.

    Raises VolvelleError for files that are missing, broken, of another kind, or whose tensors are not such a model's.
    """
    values, tensors = _read(path, kind)
    model = make(values, str(Path(path) / CONFIG))
    _fill(model, tensors, path)
    return model


def _read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    values = read_json(folder / CONFIG)
    if values.get("type") != kind:
        raise VolvelleError(f"{folder / CONFIG}: not the configuration of a {kind}")
    try:
        return values, load_file(folder / SAFETENSORS)
    except FileNotFoundError as error:
        raise VolvelleError(f"{folder / SAFETENSORS}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise VolvelleError(f"{folder / SAFETENSORS}: cannot be read ({error})") from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        folder = Path(path)
        raise VolvelleError(f"{folder / SAFETENSORS}: does not fit {folder / CONFIG} ({error})") from error


def build(kind: Any, values: dict[str, Any], source: str) -> Any:
    """The dataclass `kind` of plain data; lists become tuples. VolvelleError names `source` and what does not fit."""
    known = {field.name for field in fields(kind)}
    strange = sorted(set(values) - known)
    if strange:
        raise VolvelleError(f"{source}: unknown field {strange[0]}", tip=f"it has: {', '.join(sorted(known))}")
    try:
        return kind(**{name: _frozen(value) for name, value in values.items()})
    except TypeError as error:
        raise VolvelleError(f"{source}: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
