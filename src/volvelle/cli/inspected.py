"""What `volvelle inspect WHAT rf|flops` names: a backbone, a run, a language model, or a module of your own."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volvelle.errors import UsageError, VolvelleError

if TYPE_CHECKING:
    from torch import nn

SIDE = 224
"""Pixels of the input where nothing says another size."""


@dataclass(frozen=True)
class Inspected:
    """A module, the shape of its input, and where both came from; `ids` when the input is token ids."""

    module: nn.Module
    shape: tuple[int, ...]
    source: str
    ids: bool = False
    preprocessing: Any = None
    """A vision model's `Preprocessing`, with which pictures become its input."""


def find_module(name: str, shape: tuple[int, ...] | None, length: int | None = None) -> Inspected:
    """The module that `name` names, built without weights where the figures do not depend on them.

    Accepted: `package.module:callable` (a class or function without required arguments, or a module), a backbone's
    name, a run or folder of a classifier, and what `find_config` of the memory planner takes.
    """
    if ":" in name and not Path(name).exists():
        return _imported(name, shape)
    from volvelle.systems.backbone.names import find_config

    try:
        config = find_config(name)
    except UsageError as error:
        return _elsewhere(name, shape, length, error)
    from volvelle.systems.backbone import backbone

    side = config.preprocessing.size
    return Inspected(
        backbone(name),
        shape or (1, 3, side, side),
        f"{config.name}, random weights",
        preprocessing=config.preprocessing,
    )


def _imported(name: str, shape: tuple[int, ...] | None) -> Inspected:
    from torch import nn

    place, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name}: {error}", tip="package.module:callable, importable from this folder") from error
    finally:
        sys.path.pop(0)
    module = found if isinstance(found, nn.Module) else found()
    if not isinstance(module, nn.Module):
        raise UsageError(f"{name}: gives {type(module).__name__}, a torch.nn.Module is wanted")
    return Inspected(module, shape or (1, 3, SIDE, SIDE), name)


def _elsewhere(name: str, shape: tuple[int, ...] | None, length: int | None, unknown: UsageError) -> Inspected:
    path = Path(name).expanduser()
    if path.exists() and _is_vision(path):
        from volvelle.systems.backbone import read_backbone

        folder = path / "weights" if (path / "weights").is_dir() else path
        module = read_backbone(folder)
        side = module.preprocessing.size
        return Inspected(module, shape or (1, 3, side, side), str(folder), preprocessing=module.preprocessing)
    from volvelle.inspect.memory_models import find_config

    try:
        found = find_config(name)
    except UsageError as error:
        raise UsageError(f"{name!r} names no model here", tip=unknown.tip or error.tip) from error
    import torch

    from volvelle.systems.language.config import LanguageConfig
    from volvelle.systems.language.decoder import Decoder

    if not isinstance(found.config, LanguageConfig):
        raise UsageError(f"{name}: an encoder-decoder takes two inputs, one is looked at here")
    with torch.device("meta"):
        module = Decoder(found.config)
    # Memory that nothing touches is never really given; attention asks for a device on which it could run.
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    module.tie()
    return Inspected(module, shape or (1, length or min(found.config.context, 1024)), found.source, ids=True)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`1x3x224x224` as numbers; UsageError for anything else.

    >>> parse_shape("1x3x64x48")
    (1, 3, 64, 48)
    """
    if text is None:
        return None
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"shape={text}: positive numbers joined by x are wanted", tip="shape=1x3x224x224")
    return tuple(map(int, parts))


def _is_vision(path: Path) -> bool:
    """Whether a folder holds a classifier: its configuration has pictures' facts, or its run is of that kind."""
    import json

    for file in (path / "manifest.json", path / "config.json", path / "weights" / "config.json"):
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as error:
            raise VolvelleError(f"{file}: not readable as JSON ({error})") from error
        if isinstance(held, dict) and (
            "pretrained_cfg" in held or "num_channels" in held or "classify" in str(held.get("kind", ""))
        ):
            return True
    return path.is_file() and path.suffix in {".pth", ".pt", ".safetensors"}
