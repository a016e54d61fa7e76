"""Opening what a run left behind as a model: its base with the adapter on it, or its own weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from volvelle.adapt.files import CONFIG, base_name, load, read_config
from volvelle.adapt.methods import LoRA
from volvelle.adapt.model import merge
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.language.load import load_language_model
from volvelle.systems.language.quantized import quantize_model

if TYPE_CHECKING:
    from volvelle.systems.language.models import LanguageModel
    from volvelle.systems.language.quantized import Bits


def load_run(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    merged: bool = False,
    precision: Bits | None = None,
) -> LanguageModel:
    """Open a run folder, an adapter folder, or anything `load_language_model` takes, as one model.

    A run with an adapter gives its base model with the adapter on it, or with `merged` folded into the weights, where
    it can be (faster to decode; rounded once to `dtype`); a run with weights gives those. The base may itself be a run.
    `precision` ("int4", "int8") is that of `load_language_model`; weights with an adapter in them are rounded.
    Raises VolvelleError when the run holds neither or does not say what its base model is.
    """
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        run = RunFolder.open(folder)
        if (folder / "adapter" / CONFIG).is_file():
            return _adapted(folder / "adapter", run.manifest.get("base_model"), dtype, device, merged, precision)
        if (folder / "weights" / "config.json").is_file():
            return load_language_model(folder / "weights", dtype=dtype, device=device, precision=precision)
        tip = f"its status is {run.status}"
        raise VolvelleError(f"{folder}: this run holds neither an adapter nor weights", tip=tip)
    if (folder / CONFIG).is_file():
        return _adapted(folder, None, dtype, device, merged, precision)
    return load_language_model(path, dtype=dtype, device=device, precision=precision)


def _adapted(
    folder: Path,
    base: str | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    merged: bool,
    precision: Bits | None,
) -> LanguageModel:
    base = base or base_name(folder)
    if base is None:
        raise VolvelleError(
            f"{folder}: {CONFIG} does not say which base model it belongs to",
            tip="write its name or path as base_model_name_or_path there",
        )
    if not merged or not isinstance(read_config(folder), LoRA):
        model = load_run(base, dtype=dtype, device=device, merged=True, precision=precision)
        load(model, folder)
        return model
    # Summed at the precision the base is stored in, so that the update meets one rounding and not two.
    model = load_run(base, device=device, merged=True)
    load(model, folder)
    merge(model, keep=False)
    model = model if dtype is None else model.to(dtype)
    if precision is not None:
        quantize_model(model, precision)
    return model
