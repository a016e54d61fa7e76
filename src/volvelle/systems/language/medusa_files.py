"""Files of Medusa's heads, in the layout of the authors' release (github.com/FasterDecoding/Medusa).

A folder holds config.json with medusa_num_heads, medusa_num_layers and base_model_name_or_path, and the state dict of
the heads alone as medusa_lm_head.pt, or .safetensors as text-generation-inference and TensorRT-LLM take it:
`{i}.{j}.linear.weight` and `.bias` for block j of head i, and behind the blocks `{i}.{layers}.weight`, the head's own
projection; heads of the authors' second format ("version": "2") have none and use the model's. Whole models name the
same tensors `medusa_head.{i}…`; both are read. Of a pickled file only tensors are read, never code.

`token_map` with truncated_vocab_size in config.json, the tokens that can be drafted, is vLLM's addition;
"medusa_acceptance", how often the heads' ranks were right, is ours.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.medusa import MedusaHeads

CONFIG, SAFE, PICKLED = "config.json", "medusa_lm_head.safetensors", "medusa_lm_head.pt"
PREFIX = "medusa_head."
MAP = "token_map"


def write_medusa(
    heads: MedusaHeads, path: str | os.PathLike[str], *, base: str | None = None, pickled: bool = False
) -> None:
    """Write the heads; `base` names the model they belong to, `pickled` chooses the file that the authors' code reads.

    Each file appears whole or not at all, and the other kind of file is removed.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.removeprefix(PREFIX): p.detach().to("cpu", copy=True).contiguous() for name, p in heads.named_parameters()
    }
    values: dict[str, Any] = {
        "medusa_num_heads": heads.count,
        "medusa_num_layers": heads.layers,
        "base_model_name_or_path": base,
        "hidden_size": heads.width,
    }
    if not heads.own:
        values["version"] = "2"
    if heads.tokens is not None:
        tensors[MAP] = heads.tokens.cpu()
        values["truncated_vocab_size"] = len(heads.tokens)
    if heads.acceptance is not None:
        values["medusa_acceptance"] = [[round(share, 4) for share in row] for row in heads.acceptance.tolist()]
    name, other = (PICKLED, SAFE) if pickled else (SAFE, PICKLED)
    with atomic_path(folder / name) as temporary:
        if pickled:
            torch.save(tensors, temporary)
        else:
            save_file(tensors, temporary, metadata={"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")
    (folder / other).unlink(missing_ok=True)


def read_medusa(path: str | os.PathLike[str], model: Decoder) -> MedusaHeads:
    """Read heads for `model`, in its dtype and on its device, in evaluation mode.

    Raises VolvelleError for a folder without heads, for heads of another model, and for tensors that are missing,
    unknown or of another shape, by name.
    """
    folder = Path(path)
    values = read_json(folder / CONFIG)
    count, layers = (_positive(values, f"medusa_num_{what}", folder) for what in ("heads", "layers"))
    tensors, source = _tensors(folder)
    tokens = tensors.pop(MAP, None)
    own = f"0.{layers}.weight" in tensors
    heads = MedusaHeads(model.config, count, layers=layers, own=own, tokens=tokens)
    _fill(heads, tensors, source)
    heads.acceptance = _acceptance(values.get("medusa_acceptance"), count, folder)
    return heads.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)


def _positive(values: Mapping[str, Any], name: str, folder: Path) -> int:
    value = values.get(name, 1 if name.endswith("layers") else None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise VolvelleError(f"{folder / CONFIG}: {name} must be a number from 1 on, got {value!r}")
    return value


def _tensors(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The heads' tensors by the names that a state dict of the heads has, and the file they came from."""
    file = next((folder / name for name in (SAFE, PICKLED) if (folder / name).is_file()), None)
    if file is None:
        raise VolvelleError(f"{folder}: holds neither {SAFE} nor {PICKLED}")
    try:
        found = load_file(file) if file.name == SAFE else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VolvelleError(f"{file}: not readable as tensors alone ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise VolvelleError(f"{file}: wants a dict of tensors by name")
    return {str(name).removeprefix(PREFIX): value for name, value in found.items()}, file


def _fill(heads: MedusaHeads, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy tensors into the parameters; a missing bias is zero (vLLM trains none)."""
    wanted = {name.removeprefix(PREFIX): p for name, p in heads.named_parameters()}
    missing = [name for name in wanted if name not in tensors and not name.endswith(".bias")]
    unknown = sorted(set(tensors) - set(wanted))
    if missing or unknown:
        groups = {"missing": missing, "unknown": unknown}
        told = [f"{what} {', '.join(names[:5])}" for what, names in groups.items() if names]
        raise VolvelleError(f"{source}: {'; '.join(told)}")
    for name, parameter in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, the model asks {tuple(parameter.shape)}"
            raise VolvelleError(f"{source}: {name} has shape {shapes}", tip="these heads belong to another model")
        with torch.no_grad():
            parameter.copy_(tensor)


def _acceptance(rows: Any, count: int, folder: Path) -> Tensor | None:
    if rows is None:
        return None
    try:
        shares = torch.tensor(rows, dtype=torch.float32)
    except (TypeError, ValueError):
        shares = torch.empty(0)
    if shares.ndim != 2 or len(shares) != count:
        raise VolvelleError(f"{folder / CONFIG}: medusa_acceptance must hold {count} rows of equally many shares")
    return shares
