"""Open a language model from whatever the user named: a GGUF file, a Hugging Face folder, a known model, a repo id."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from volvelle.errors import VolvelleError
from volvelle.hub import resolve
from volvelle.systems.language.gguf import read_gguf
from volvelle.systems.language.gguf_file import describe_bytes
from volvelle.systems.language.huggingface import from_tensors, read_folder
from volvelle.systems.language.models import LanguageModel
from volvelle.systems.language.quantized import Bits, quantize_model

_ACCEPTED = "accepted: a .gguf file, a folder with one .gguf file, or a Hugging Face folder (config.json + safetensors)"


def load_language_model(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    precision: Bits | None = None,
) -> LanguageModel:
    """Load a model in evaluation mode, with its tokenizer in `model.tokenizer`.

    `path_or_name` is a .gguf file, a folder that holds one, a Hugging Face folder, a known model ("smollm2") or a
    Hugging Face repo id. `dtype` None keeps a folder's own dtype and dequantises GGUF to float32.

    With `precision` "int4" or "int8" the matrices of the blocks and the output projection stay in so many bits, on the
    grid of a GGUF file exactly where it has one, else rounded (`quantize_model`); the rest is in `dtype`, by default
    bf16. Loading takes the memory of the whole model in that dtype once.

    Raises VolvelleError that says what was found instead, or what is missing, damaged or unsupported, and UsageError
    for an unknown name.
    """
    if precision is not None:
        dtype = dtype or torch.bfloat16
    path = resolve(path_or_name)
    gguf, file = _find_gguf(path), None
    if gguf is None:
        model = read_folder(path, dtype=dtype, device=device)
    else:
        file = read_gguf(gguf, dtype)
        model = from_tensors(file.config, file.tensors, source=str(gguf), dtype=dtype, device=device)
        model.tokenizer = file.tokenizer
    if precision is not None:
        quantize_model(model, precision, file)
    _check_vocabulary(model, gguf or path)
    return model.eval()


def _find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is or holds; None for a Hugging Face folder. Raises VolvelleError for all else."""
    if path.is_file():
        if path.suffix == ".gguf" or _head(path)[:4] == b"GGUF":
            return path
        what = describe_bytes(_head(path), path.stat().st_size)
        raise VolvelleError(f"{path}: not a model file" + (f", it looks like {what}" if what else ""), tip=_ACCEPTED)
    if not path.is_dir():
        raise VolvelleError(f"{path}: neither a file nor a folder", tip=_ACCEPTED)
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise VolvelleError(f"{path}: holds {len(found)} GGUF files ({names})", tip="name the one to open")
    if (path / "manifest.json").is_file():
        raise VolvelleError(
            f"{path}: is a run folder, not a model", tip="open it with volvelle.adapt.load_run, or volvelle generate"
        )
    inside = sorted(entry.name for entry in path.iterdir())
    listing = ", ".join(inside[:5]) + (f" and {len(inside) - 5} more" if len(inside) > 5 else "")
    raise VolvelleError(f"{path}: no model in this folder ({listing or 'it is empty'})", tip=_ACCEPTED)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError as error:
        raise VolvelleError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_vocabulary(model: LanguageModel, path: Path) -> None:
    """More embedding rows than tokens are padding; a token without a row would fail in the middle of a run."""
    if model.tokenizer is None:
        return
    rows, tokens = model.config.vocabulary, model.tokenizer.vocabulary
    if tokens > rows:
        raise VolvelleError(
            f"{path}: the tokenizer has {tokens} tokens, the embedding only {rows} rows",
            tip="tokenizer and weights belong to different models, or tokens were added without training them",
        )
    outside = [i for i in model.tokenizer.eos_ids if i >= rows]
    if outside:
        raise VolvelleError(f"{path}: eos_token_id {outside[0]} has no row in the embedding of {rows}")
