"""What Inspect computes in processes of their own: fields of a backbone, the memory of a training step."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from volvelle.inspect.memory_ledger import CATEGORIES
from volvelle.inspect.memory_models import KNOWN, find_config
from volvelle.inspect.memory_options import Cards
from volvelle.inspect.receptive_fields import AxisField, NodeField, receptive_field
from volvelle.systems.backbone import backbone
from volvelle.systems.backbone.names import find_config as find_backbone
from volvelle.systems.language.config import LanguageConfig
from volvelle.train.estimate import DEPTHS, SHALLOW, UNLIMITED, deeper, plan_language, whole_windows


def field_of(name: str) -> dict[str, Any]:
    """Where the field of a backbone changes, from the picture to its last map: each such layer with its grid."""
    began, side = time.perf_counter(), find_backbone(name).preprocessing.size
    field = receptive_field(backbone(name).eval(), (1, 3, side, side))
    layers = [_layer(node) for node in field.rows() if node.spatial and node.module and node.op != "pad"]
    seconds = time.perf_counter() - began
    return {"model": name, "side": side, "layers": layers, "unknown": sorted(field.unknown), "seconds": seconds}


def _layer(node: NodeField) -> dict[str, Any]:
    return {
        "module": node.module or node.kind,
        "op": node.op,
        "channels": node.shape[1],
        "grid": list(node.shape[2:]),
        "axes": [_axis(axis) for axis in node.axes],
        "note": node.note,
    }


def _axis(axis: AxisField) -> dict[str, Any]:
    assert axis.stride is not None
    assert axis.centre is not None
    shown = {"size": axis.size, "local": axis.local, "count": axis.count, "offset": axis.offset}
    return shown | {"stride": float(axis.stride), "centre": float(axis.centre)}


def memory_of(
    model: str,
    *,
    method: str,
    precision: str,
    batch: int,
    length: int,
    optimizer: str,
    checkpointing: bool,
    cards: int,
    gigabytes: float,
    shard: str,
) -> dict[str, Any]:
    """The peak of one rank's training step by category, in bytes; `cards` = 0 plans it for a processor.

    A deep decoder is planned at two small depths and continued to its own, as `train` does for its first line.
    """
    began, config = time.perf_counter(), find_config(model).config
    planning: dict[str, Any] = {
        "method": method,
        "precision": precision,
        "checkpointing": checkpointing,
        "optimizer": optimizer,
        "size": batch,
        "device": "cuda" if cards else "cpu",
        "gpus": Cards(cards, UNLIMITED) if cards > 1 else None,
        "shard": shard,
    }
    decoder = isinstance(config, LanguageConfig)
    window = whole_windows(length, sources=not decoder)
    if isinstance(config, LanguageConfig) and config.depth > SHALLOW:
        shallow = [plan_language(dataclasses.replace(config, depth=d), window, **planning) for d in DEPTHS]
        sizes = deeper(shallow[0], shallow[1], DEPTHS, config.depth)
        how = f"planned at {DEPTHS[0]} and {DEPTHS[1]} blocks, continued to {config.depth}"
    else:
        plan = plan_language(config, window, **planning)
        moments = plan.timeline if plan.card is None else plan.card.timeline
        sizes, how = max((moment.sizes for moment in moments), key=sum), "planned whole"
    named = zip((*CATEGORIES, "communication"), sizes, strict=False)
    room = Cards(cards, gigabytes).capacity if cards else None
    known = KNOWN.get(model)
    return {
        "sizes": {name: round(size) for name, size in named},
        "total": round(sum(sizes)),
        "capacity": room,
        "fits": None if room is None else sum(sizes) <= room,
        "how": how,
        "parameters": None if known is None else known.parameters,
        "seconds": time.perf_counter() - began,
    }
