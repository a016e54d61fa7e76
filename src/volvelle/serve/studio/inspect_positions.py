"""Curves of position encodings against distance, computed by the library's own parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from volvelle.parts.position.alibi import alibi_bias, alibi_slopes
from volvelle.parts.position.rope import apply_rope, rope_frequencies
from volvelle.parts.position.rope_scaling import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Scaling,
    YaRNScaling,
)
from volvelle.parts.position.sinusoidal import sinusoidal_positions
from volvelle.parts.position.t5 import t5_relative_buckets
from volvelle.serve.errors import Refused

POINTS = 400
"""Distances of a curve."""


class CurvesAsked(BaseModel):
    """POST /studio/api/inspect/curves."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["rope", "sinusoidal", "alibi", "t5"]
    length: Annotated[int, Field(ge=16, le=131_072)] = 4096
    dim: Annotated[int, Field(ge=4, le=512, multiple_of=2)] = 64
    base: Annotated[float, Field(ge=10, le=1e8, allow_inf_nan=False)] = 10_000.0
    scaling: Literal["none", "linear", "ntk", "dynamic-ntk", "yarn", "llama3"] = "none"
    factor: Annotated[float, Field(ge=1, le=128, allow_inf_nan=False)] = 8.0
    original: Annotated[int, Field(ge=16, le=131_072)] = 2048
    heads: Annotated[int, Field(ge=1, le=64)] = 8
    buckets: Annotated[int, Field(ge=4, le=128, multiple_of=2)] = 32
    max_distance: Annotated[int, Field(ge=65, le=4096)] = 128


def curves(asked: CurvesAsked) -> dict[str, Any]:
    """Charts of this encoding, each with its axes and series [[x, y], …]. Raises Refused for what has no meaning."""
    distances = torch.linspace(0, asked.length - 1, min(asked.length, POINTS)).round().long().unique()
    try:
        return {"charts": CHARTS[asked.kind](asked, distances)}
    except (ValueError, ZeroDivisionError) as error:
        raise Refused(400, f"{asked.kind}: {error}") from None


def _rope(asked: CurvesAsked, distances: Tensor) -> list[dict[str, Any]]:
    scaling = _scaling(asked)
    ways: dict[str, Scaling | None] = {"plain": None} | ({asked.scaling: scaling} if scaling else {})
    scores, waves = [], []
    for name, one in ways.items():
        ones = torch.ones(1, 1, len(distances), asked.dim, dtype=torch.float64) / math.sqrt(asked.dim)
        q, k = apply_rope(ones, ones, distances, base=asked.base, scaling=one)
        scores.append(_series(name, distances, k[0, 0] @ q[0, 0, 0], dashed=name == "plain" and len(ways) > 1))
        theta = rope_frequencies(asked.dim, base=asked.base, scaling=one, length=torch.tensor(asked.length))
        turns = 2 * math.pi / theta
        waves.append(_series(name, torch.arange(len(turns)), turns, dashed=name == "plain" and len(ways) > 1))
    longest = torch.full((2,), float(asked.original))
    if scaling is not None:
        waves.append(_series("trained length", torch.tensor([0, asked.dim // 2 - 1]), longest, dashed=True))
    return [
        _chart("Score of a query and a key that are all ones, by their distance", "distance", "q · k", scores),
        _chart("Tokens in which a pair of features turns once", "pair of features", "tokens", waves, log=True),
    ]


def _scaling(asked: CurvesAsked) -> Scaling | None:
    known: dict[str, Callable[[], Scaling]] = {
        "linear": lambda: LinearScaling(asked.factor),
        "ntk": lambda: NTKScaling(asked.factor),
        "dynamic-ntk": lambda: DynamicNTKScaling(asked.factor, asked.original),
        "yarn": lambda: YaRNScaling(asked.factor, asked.original),
        "llama3": lambda: Llama3Scaling(asked.factor, asked.original),
    }
    return known[asked.scaling]() if asked.scaling in known else None


def _sinusoidal(asked: CurvesAsked, distances: Tensor) -> list[dict[str, Any]]:
    table = sinusoidal_positions(distances, asked.dim, base=asked.base, dtype=torch.float64)
    products = table @ table[0] / (asked.dim / 2)
    pairs = sorted({0, asked.dim // 8, asked.dim // 4, 3 * asked.dim // 8})
    near = distances[: max(2, len(distances) // 4)]
    waves = [_series(f"sin, pair {i}", near, table[: len(near), 2 * i]) for i in pairs]
    return [
        _chart("Product of two positions' vectors, over that of one with itself", "distance", "product", [
            _series("PE(0) · PE(m)", distances, products)]),
        _chart("Single features, at the shorter distances", "position", "value", waves),
    ]  # fmt: skip


def _alibi(asked: CurvesAsked, distances: Tensor) -> list[dict[str, Any]]:
    slopes = alibi_slopes(asked.heads)
    bias = alibi_bias(distances[-1:], distances[-1] - distances, slopes)[0, :, 0]
    shown = range(asked.heads) if asked.heads <= 6 else [round(i * (asked.heads - 1) / 5) for i in range(6)]
    series = [_series(f"head {head + 1}: slope {float(slopes[head]):.3g}", distances, bias[head]) for head in shown]
    each = _series("slope", torch.arange(1, asked.heads + 1), slopes)
    return [
        _chart("What is added to the score of a key, by its distance before the query", "distance", "bias", series),
        _chart("Slope of each head", "head", "slope", [each], log=True),
    ]


def _t5(asked: CurvesAsked, distances: Tensor) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"num_buckets": asked.buckets, "max_distance": asked.max_distance}
    near = torch.arange(min(asked.length, 2 * asked.max_distance))
    both = [
        _series("keys before, both directions", near, t5_relative_buckets(-near, True, **options)),
        _series("keys after, both directions", near, t5_relative_buckets(near, True, **options)),
        _series("keys before, one direction", near, t5_relative_buckets(-near, False, **options), dashed=True),
    ]
    return [_chart("Which bucket a distance falls into; each has a trained number a head", "distance", "bucket", both)]


CHARTS: dict[str, Callable[[CurvesAsked, Tensor], list[dict[str, Any]]]] = {
    "rope": _rope,
    "sinusoidal": _sinusoidal,
    "alibi": _alibi,
    "t5": _t5,
}
"""What draws each kind."""


def _series(name: str, x: Tensor, y: Tensor, *, dashed: bool = False) -> dict[str, Any]:
    points = [list(pair) for pair in zip(x.tolist(), y.tolist(), strict=True)]
    return {"name": name, "points": points, "dashed": dashed}


def _chart(label: str, x: str, y: str, series: list[dict[str, Any]], *, log: bool = False) -> dict[str, Any]:
    return {"label": label, "x": x, "y": y, "log": log, "series": series}
