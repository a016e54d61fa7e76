"""Names of adapted layers as the model's own checkpoints have them, which is what PEFT's files use.

Most models already carry those names. Our `Decoder` names its layers alike in every family, so for GPT-2 and RoFormer
the layers are renamed by the family's key map. GPT-2's files hold q, k and v as one layer: their adapters become one of
the summed rank, with A one below the other and B block by block; read back, each part takes its rows of B.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from volvelle.adapt.methods import LoRA
from volvelle.systems.language.config import LanguageConfig

Shapes = dict[str, tuple[int, ...]]
"""Parameter names and shapes."""


class LowRank(NamedTuple):
    """One layer's adapter: a (r, k), b (d, r), the factor on B A, and DoRA's magnitude (d)."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


class Place(NamedTuple):
    """Where a layer of a file lies in the model: the layers its rows belong to, and how many rows each has."""

    theirs: str
    ours: tuple[str, ...]
    rows: tuple[int, ...]


def places(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[Place] | None:
    """The weight matrices of a `Decoder` whose files use other names, from its base `shapes`; None where they agree."""
    config = getattr(model, "config", None)
    if not isinstance(config, LanguageConfig):
        return None
    from volvelle.systems.language.key_maps import KEY_MAPS

    found = [
        Place(_path(binding.theirs), tuple(map(_path, binding.ours)), tuple(shape[0] for shape in binding.shapes))
        for binding in KEY_MAPS[config.family].bind(shapes)
        if binding.theirs.endswith(".weight") and len(binding.their_shape) == 2
    ]
    return None if all(place.ours == (place.theirs,) for place in found) else found


def foreign_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Base parameter names and shapes as the model's files have them."""
    if places(model, shapes) is None:
        return dict(shapes)
    from volvelle.systems.language.key_maps import KEY_MAPS

    bindings = KEY_MAPS[model.config.family].bind(shapes)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return dict(sorted((binding.theirs, binding.their_shape) for binding in bindings))


def to_foreign(layers: Mapping[str, LowRank], where: list[Place], norm: Callable[[str], Tensor]) -> dict[str, LowRank]:
    """Rename and join adapters for a file; the products B A do not change.

    Where DoRA adapts a part of a joined layer only, the other parts' magnitudes are the `norm` of their weights.
    """
    joined = {}
    for place in where:
        parts = [layers.get(path) for path in place.ours]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        if len(parts) == 1:
            joined[place.theirs] = present[0]
            continue
        scale = present[0].scale
        blocks, column = [], 0
        rank = sum(len(part.a) for part in present)
        for part, rows in zip(parts, place.rows, strict=True):
            block = present[0].b.new_zeros(rows, rank)
            if part is not None:
                block[:, column : column + len(part.a)] = part.b * (part.scale / scale)
                column += len(part.a)
            blocks.append(block)
        magnitude = None
        if present[0].magnitude is not None:
            both = zip(place.ours, parts, strict=True)
            own = [norm(path).to(present[0].magnitude) if part is None else part.magnitude for path, part in both]
            magnitude = torch.cat([each for each in own if each is not None])
        joined[place.theirs] = LowRank(torch.cat([part.a for part in present]), torch.cat(blocks), scale, magnitude)
    return joined


def from_foreign(layers: Mapping[str, LowRank], where: list[Place]) -> dict[str, LowRank]:
    """Undo `to_foreign`: every part gets all of A and its rows of B. Names without a place stay as they are."""
    by_name = {place.theirs: place for place in where}
    parted = {}
    for name, layer in layers.items():
        place = by_name.get(name)
        if place is None or sum(place.rows) != len(layer.b):
            parted[name if place is None else place.ours[0]] = layer
            continue
        magnitudes = [None] * len(place.rows) if layer.magnitude is None else layer.magnitude.split(place.rows)
        for path, b, magnitude in zip(place.ours, layer.b.split(place.rows), magnitudes, strict=True):
            parted[path] = LowRank(layer.a, b, layer.scale, magnitude)
    return parted


def spelled_out(method: LoRA, layers: Mapping[str, LowRank]) -> LoRA:
    """`method` for exactly these layers: whole paths, and a pattern where a rank or scale is not the rule."""
    alphas = {
        path: layer.scale * (math.sqrt(len(layer.a)) if method.rslora else len(layer.a))
        for path, layer in layers.items()
    }
    return dataclasses.replace(
        method,
        targets=tuple(layers),
        exclude=(),
        layers=None,
        rank_pattern={re.escape(path): len(layer.a) for path, layer in layers.items() if len(layer.a) != method.rank},
        alpha_pattern={
            re.escape(path): alpha for path, alpha in alphas.items() if not math.isclose(alpha, method.alpha)
        },
    )


def _path(name: str) -> str:
    return name.removesuffix(".weight")
