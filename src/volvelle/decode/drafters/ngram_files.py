"""Files of n-gram drafters: a folder with config.json and texts.safetensors.

config.json holds `ngram_order` (n), `weight`, `discount`, the `vocabulary` of the model and its name; the texts are one
row of `tokens` (N,) int32 and the place at which each text `starts` (texts,) int64. Counts are made when it is opened:
a second for a million tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from volvelle.decode.drafters.ngram import NGram
from volvelle.decode.drafters.opening import NGRAM
from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic

CONFIG, TEXTS = "config.json", "texts.safetensors"


def write_ngram(drafter: NGram, path: str | os.PathLike[str], *, vocabulary: int, base: str | None = None) -> None:
    """Write the texts and options; each file appears whole or not at all."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = torch.tensor([len(text) for text in drafter.texts], dtype=torch.int64)
    tokens = torch.tensor([token for text in drafter.texts for token in text], dtype=torch.int32)
    with atomic_path(folder / TEXTS) as temporary:
        save_file({"tokens": tokens, "starts": lengths.cumsum(0) - lengths}, temporary, metadata={"format": "pt"})
    values = {
        NGRAM: drafter.n, "weight": drafter.weight, "discount": drafter.discount, "vocabulary": vocabulary,
        "base_model_name_or_path": base,
    }  # fmt: skip
    write_atomic(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def read_ngram(path: str | os.PathLike[str], vocabulary: int, **options: Any) -> NGram:
    """Open a folder for a model of this `vocabulary`; `options` are NGram's, and go before the file's.

    Raises VolvelleError for a missing or torn file, and for texts of another vocabulary.
    """
    folder = Path(path)
    values = read_json(folder / CONFIG)
    if values.get("vocabulary") != vocabulary:
        raise VolvelleError(
            f"{folder}: n-grams over a vocabulary of {values.get('vocabulary')}, the model has {vocabulary}",
            tip="they draft for the model that they were counted for, or another one with its tokenizer",
        )
    texts = _texts(folder / TEXTS)
    kept = {"n": values.get(NGRAM), "weight": values.get("weight"), "discount": values.get("discount")}
    return NGram(texts, **({name: value for name, value in kept.items() if value is not None} | options))


def _texts(path: Path) -> Sequence[Sequence[int]]:
    try:
        found = load_file(path)
        tokens, starts = found["tokens"], found["starts"].tolist()
    except (OSError, SafetensorError, KeyError) as error:
        raise VolvelleError(f"{path}: cannot be read as n-grams' texts ({error})") from error
    if tokens.ndim != 1 or starts != sorted(starts) or (starts and not 0 == starts[0] <= starts[-1] <= len(tokens)):
        raise VolvelleError(f"{path}: {len(tokens)} tokens whose texts start at places that do not fit")
    flat = tokens.tolist()
    return [flat[start:end] for start, end in zip(starts, [*starts[1:], len(flat)], strict=True)]
