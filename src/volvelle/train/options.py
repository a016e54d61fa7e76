"""What `fit` needs to know, as frozen data without torch, so that the command line can show and check it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from volvelle.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How long, how large, how often. Recipes inherit from it, so every recipe has the same dials.

    >>> FitOptions(steps=100, batch=4, accumulate=2).batch
    4
    """

    unsharded: ClassVar[str] = ""
    """What a recipe trains that shard=fsdp does not fit, and why not."""
    steps: int | None = None
    """Optimiser steps; when absent, `epochs` decides."""
    epochs: float = 1.0
    """Passes over the data, used when `steps` is absent."""
    batch: int = 8
    """Samples in one micro-batch."""
    accumulate: int = 1
    """Micro-batches whose gradients are summed before one update."""
    learning_rate: float = 3e-4
    """Peak learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "poly"] = "cosine"
    """Shape of the learning rate after the warm-up; poly falls as (1 - t)^0.9."""
    warmup: float = 0.05
    """Warm-up: a share of all steps when below 1, else a number of steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""
    clip: float | None = 1.0
    """Largest gradient norm; None leaves gradients as they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run the forward pass under autocast over fp32 weights; fp16 scales the loss."""
    on_nan: Literal["stop", "skip"] = "stop"
    """NaN or infinite loss or gradient: stop and say where it began, or leave the update out (20 in a row stop)."""
    average: float | None = None
    """Decay of a moving average of the weights, used for evaluation and the result (0.999); None: no average."""
    seed: int = 0
    """Seeds the order of the data, the initial weights and dropout."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int | None = None
    """Steps between two evaluations; None: at the start and the end."""
    checkpoint_every: int | None = 100
    """Steps between two checkpoints; None: only at the end or when interrupted."""
    keep_last: int = 2
    """Newest checkpoints kept, at least 1; the best one stays besides."""
    workers: int = 0
    """Workers that read batches ahead; 0 reads them in between steps."""
    worker_kind: Literal["threads", "processes"] = "threads"
    """threads for decoding and waiting, processes for work in Python itself."""

    ranks: int = 1
    """Processes that train together on this machine; each takes every `ranks`-th micro-batch."""
    shard: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds all weights; fsdp: each holds its share of weights, gradients and optimiser state."""
    all_reduce: Literal["torch", "auto", "ring", "halving-doubling", "recursive-doubling", "tree"] = "torch"
    """Who averages the gradients of ddp: torch's back end, or an algorithm of volvelle.parts.collectives."""
    compress: bool = False
    """Gradients travel between ranks in bf16: half the bytes, rounded."""
    rank_timeout: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost, and all stop."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "accumulate",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_last",
            "ranks",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, got {value}")
        if self.shard == "fsdp" and self.unsharded:
            raise UsageError(f"shard=fsdp: not for {self.unsharded}", tip="shard=ddp")
        if self.shard == "fsdp" and (self.all_reduce != "torch" or self.compress):
            raise UsageError("all_reduce and compress: are for shard=ddp; fsdp scatters its gradients itself")
        for name in ("epochs", "learning_rate", "rank_timeout"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}: must be above 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name}: must not be negative, got {value}")
        if self.workers < 0:
            raise UsageError(f"workers: must not be negative, got {self.workers}")
        if self.average is not None and not 0 < self.average < 1:
            raise UsageError(f"average: must lie between 0 and 1, got {self.average}")


def to_dict(options: Any) -> dict[str, Any]:
    """A recipe as plain data for config.yaml: nested dataclasses become dicts, tuples become lists.

    >>> to_dict(FitOptions(steps=3))["steps"]
    3
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(options))


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Build the frozen dataclass `kind` back from `to_dict`'s data. Unknown fields raise UsageError.

    >>> from_dict(FitOptions, {"steps": 3}).steps
    3
    """
    import types
    import typing

    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"{kind.__name__}: unknown field {unknown[0]}", tip=f"it has: {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        nested = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
        if nested is not None and isinstance(value, dict):
            value = from_dict(nested, value)  # type: ignore[arg-type]
        elif isinstance(value, list) and any(typing.get_origin(choice) is tuple for choice in choices):
            value = tuple(value)
        built[name] = value
    return kind(**built)
