"""What a training step is made of, as frozen data: method, precision, optimiser, device. Does not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from volvelle.errors import UsageError, did_you_mean

MethodName = Literal["full", "lora", "adapter", "prefix"]
Precision = Literal["fp32", "bf16", "amp", "bf16-master", "fp16-master"]
Optimizer = Literal["adamw", "adamw-foreach", "sgd", "momentum", "adafactor"]
Device = Literal["cpu", "cuda"]
Shard = Literal["ddp", "fsdp"]

PRECISIONS = {
    "fp32": "weights, gradients and optimiser in fp32",
    "bf16": "everything in bf16",
    "amp": "fp32 weights, bf16 autocast",
    "bf16-master": "bf16 weights and gradients, fp32 master copies of both",
    "fp16-master": "fp16 weights and gradients, fp32 master copies of both",
}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How one training step is run; the fields of `plan_memory` of the same names.

    `method` is a name, an adaptation method of `volvelle.adapt`, or a function that rewrites a module in place (and
    may return another). Raises UsageError for an unknown name, with the closest ones.

    >>> StepOptions(method="lora", precision="bf16").label
    'lora, bf16, adamw'
    >>> StepOptions(precision="fp8")
    Traceback (most recent call last):
    volvelle.errors.UsageError: precision: fp32, bf16, amp, bf16-master or fp16-master, got 'fp8'
    """

    method: Any = "full"
    precision: Precision = "fp32"
    checkpointing: bool = False
    optimizer: Optimizer = "adamw"
    device: Device = "cpu"
    accumulated: bool = False
    """Whether an update sums up the gradients of several micro-batches: those of earlier ones lie beside the last."""

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            _require("method", self.method, get_args(MethodName))
        _require("precision", self.precision, get_args(Precision))
        _require("optimizer", self.optimizer, get_args(Optimizer))
        _require("device", self.device, get_args(Device))

    @property
    def method_label(self) -> str:
        """The method's short name."""
        if isinstance(self.method, str):
            return self.method
        label = getattr(self.method, "label", None) or getattr(self.method, "__name__", type(self.method).__name__)
        return str(label)

    @property
    def label(self) -> str:
        """One line for tables."""
        parts = [self.method_label, self.precision, *(["checkpointing"] if self.checkpointing else []), self.optimizer]
        return ", ".join(parts)


@dataclass(frozen=True)
class Cards:
    """`count` accelerators of `gigabytes` each, as in "2x80".

    A card sold as 80 GB holds 80 GiB = 85.9e9 bytes. The plan fills 80e9 of them and leaves the rest to the driver's
    context, communication buffers and fragmentation.

    >>> Cards.parse("2x80")
    Cards(count=2, gigabytes=80.0)
    """

    count: int
    gigabytes: float

    @classmethod
    def parse(cls, text: str) -> Cards:
        """Read "COUNTxGIGABYTES"; raises UsageError for anything else."""
        matched = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?\s*", text)
        if matched is None or int(matched[1]) < 1 or float(matched[2]) <= 0:
            raise UsageError(f"gpus: COUNTxGIGABYTES, got {text!r}", tip="for example gpus=2x80")
        return cls(int(matched[1]), float(matched[2]))

    @property
    def capacity(self) -> int:
        """Bytes that one card offers a plan."""
        return int(self.gigabytes * 1e9)

    def __str__(self) -> str:
        return f"{self.count} x {self.gigabytes:g} GB"


def _require(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise UsageError(f"{name}: {listed}, got {value!r}", tip=did_you_mean(value, choices))
