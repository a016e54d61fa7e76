"""Files of multi-token prediction: the modules in a folder of their own, or inside the decoder's.

`write_mtp` makes a folder of its own, so that the decoder's stays what any reader of it expects. A folder that holds
both, as DeepSeek-V3's does, is read as a plain decoder by `read_folder`, which says what it leaves out, and by
`read_mtp` for the rest. mtp_names.py says what the tensors are called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic
from volvelle.parts.quantization.weight_only import WeightOnlyLinear
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.huggingface import SINGLE, SafetensorsFolder
from volvelle.systems.language.huggingface_config import config_from_dict, config_to_dict
from volvelle.systems.language.key_maps import KEY_MAPS
from volvelle.systems.language.medusa_files import MAP
from volvelle.systems.language.mtp import KINDS, MTP
from volvelle.systems.language.mtp_names import COPIES, COUNT, KIND, announced, saved_name


def write_mtp(mtp: MTP, model: Decoder, path: str | os.PathLike[str]) -> None:
    """Write the modules' weights and a config.json, which is the decoder's with their number and kind.

    Each file appears whole or not at all. What the modules share with the decoder is not repeated. Raises VolvelleError
    when no config.json can hold the decoder's configuration.
    """
    folder = Path(path)
    values = config_to_dict(model.config) | {COUNT: mtp.depths, KIND: mtp.kind}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    names = _names(mtp, model)
    tensors = {names[name]: p.detach().to("cpu", copy=True).contiguous() for name, p in mtp.named_parameters()}
    if mtp.tokens is not None:
        tensors[MAP] = mtp.tokens.cpu()
    with atomic_path(folder / SINGLE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def read_mtp(path: str | os.PathLike[str], model: Decoder) -> MTP:
    """Read the modules that belong to `model`, in its dtype and on its device, in evaluation mode.

    `path` is a folder that `write_mtp` made, or one that holds the decoder too. Raises VolvelleError for a folder
    without modules, for those of another decoder, and for tensors that are missing, unknown or of another shape, by
    name.
    """
    folder = Path(path)
    source = str(folder)
    values = read_json(folder / "config.json")
    count, kind = announced(values, f"{source}: config.json")
    if not count:
        raise VolvelleError(f"{source}: config.json announces no modules of multi-token prediction ({COUNT})")
    _same_decoder(values, model, source)
    tensors = SafetensorsFolder(folder)
    tokens = tensors.get(MAP)
    with torch.random.fork_rng(devices=[]):  # fresh weights are about to be replaced: nobody's draws should move
        mtp = KINDS[kind](model.config, count, tokens=tokens).to(device=model.device, dtype=model.dtype)
    names = _names(mtp, model)
    _check_names(tensors, set(names.values()), model, source)
    for name, parameter in mtp.named_parameters():
        tensor = tensors[names[name]]
        if tensor.shape != parameter.shape:
            raise VolvelleError(
                f"{source}: {names[name]} has shape {tuple(tensor.shape)}, the decoder asks {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    return mtp.eval()


def _names(mtp: MTP, model: Decoder) -> dict[str, str]:
    """The modules' parameters and their names in a file."""
    return {name: saved_name(name, mtp.kind, model.config.depth) for name, _ in mtp.named_parameters()}


def _same_decoder(values: Mapping[str, Any], model: Decoder, source: str) -> None:
    theirs, ours = config_from_dict(values, f"{source}: config.json"), model.config
    for name in ("vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "mlp", "norm", "position"):
        a, b = getattr(theirs, name), getattr(ours, name)
        if a != b:
            raise VolvelleError(f"{source}: made for a decoder with {name} = {a!r}, and this one has {b!r}")


def _check_names(tensors: SafetensorsFolder, wanted: set[str], model: Decoder, source: str) -> None:
    """Every tensor must be a module's, a copy of what the decoder shares, or the decoder's own."""
    with torch.device("meta"):  # as files hold it: a quantised one has other tensors
        shapes = {name: tuple(p.shape) for name, p in Decoder(model.config).named_parameters()}
    key_map = KEY_MAPS[model.config.family]
    own = {binding.theirs for binding in key_map.bind(shapes)} | set(key_map.aliases)
    shared = dict(zip(COPIES, (model.model.embed_tokens, model.lm_head), strict=True))
    unknown = []
    for name in set(tensors) - wanted - own - {MAP}:
        copied = next((layer for ending, layer in shared.items() if name.endswith(ending)), None)
        if copied is None:
            unknown.append(name)
        elif not isinstance(copied, WeightOnlyLinear) and not _equal(tensors[name], copied.get_parameter("weight")):
            raise VolvelleError(f"{source}: {name} differs from the decoder's own, which the modules share")
    missing = sorted(wanted - set(tensors))
    if missing or unknown:
        groups = {"missing": missing, "unknown": sorted(unknown)}
        told = [f"{what} {', '.join(names[:5])}" for what, names in groups.items() if names]
        raise VolvelleError(f"{source}: {'; '.join(told)}")


def _equal(tensor: Tensor, ours: Tensor) -> bool:
    return tensor.shape == ours.shape and torch.equal(tensor.to(ours), ours)
