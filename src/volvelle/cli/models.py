"""Opening a model for a verb: decides dtype and device, and says so in the first line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from volvelle.cli.console import DownloadReport, say
from volvelle.processor import bf16_flags

if TYPE_CHECKING:
    import torch

    from volvelle.systems.language.models import LanguageModel

Floating = Literal["auto", "fp32", "bf16", "fp16"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"]
"""In what a verb computes. int8 and int4 are the bits of the weights: exactly on a GGUF file's own grid where it has
one, else rounded; the rest is bf16."""


def open_language_model(name: str, precision: Precision = "auto") -> LanguageModel:
    """Open a model, a run or an adapter folder for use, and say what was decided and why.

    `auto` takes bf16 where the processor or the GPU multiplies it in hardware, else fp32. Adapters are folded into the
    weights, which makes every token cheaper. Downloads a known model that is not on this machine yet.
    """
    from volvelle import hub
    from volvelle.adapt import load_run
    from volvelle.parts.quantization.weight_only import WeightOnlyLinear

    if name in hub.ASSETS and not Path(name).exists():
        with DownloadReport() as report:
            hub.fetch(name, report=report)
    dtype, why = choose_dtype(precision)
    device = "cuda" if _cuda() else "cpu"
    bits = precision if precision == "int4" or precision == "int8" else None
    model = load_run(name, dtype=dtype, device=device, merged=True, precision=bits)
    count = sum(p.numel() for p in model.parameters())
    tied = "lm_head" if bits and model.config.head.tied else ""  # in few bits a matrix of its own, but no other weights
    for path, layer in model.named_modules():
        if isinstance(layer, WeightOnlyLinear) and path != tied:
            count += layer.in_features * layer.out_features
    held = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    say(
        f"{name}: {model.config.family}, {count / 1e6:.1f}M parameters, {sum(held.values()) / 1e6:.0f} MB; "
        f"{_named(dtype, precision)} ({why}) on {device}; context {model.config.context}"
    )
    return model


def _named(dtype: torch.dtype, precision: Precision) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{precision} weights, {name} beside them" if precision in {"int4", "int8"} else name


def choose_dtype(precision: Precision) -> tuple[torch.dtype, str]:
    """Return the dtype to compute in, and the reason."""
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    named |= {"int8": torch.bfloat16, "int4": torch.bfloat16}
    if precision != "auto":
        return named[precision], "as asked"
    if _cuda():
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU multiplies it in hardware"
        return torch.float32, "the GPU has no bf16"
    found = bf16_flags()
    if found:
        return torch.bfloat16, f"the processor has {' and '.join(sorted(found))}"
    return torch.float32, "the processor has no bf16 instructions"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
