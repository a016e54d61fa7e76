"""Adapters on disk in PEFT's format, so that PEFT and vLLM read ours and we read theirs.

A folder holds adapter_config.json (the method and the base model's name) and adapter_model.safetensors, whose tensors
are named `base_model.model.<path>.lora_A.weight` (r, k) and `….lora_B.weight` (d, r). Beside the tensors we store the
base model's layer shapes in the file's metadata, which PEFT ignores: a wrong base is then refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from volvelle.adapt import names
from volvelle.adapt.methods import LoRA, Method
from volvelle.adapt.model import Adapted, Record, apply, record_of
from volvelle.adapt.names import LowRank
from volvelle.errors import VolvelleError
from volvelle.files import atomic_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_SHAPES, _HASH = "volvelle.base_shapes", "volvelle.base_sha256"

# Fields of LoraConfig that change nothing in the result of a loaded adapter, whatever their value.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type", "ensure_weight_tying", "layers_pattern",
    "loftq_config", "eva_config", "runtime_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "exclude_modules",
    "layers_to_transform", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# These initialisations only choose the first A and B; the others (PiSSA, OLoRA, …) also change the base weights.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


def save(model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write the model's adapter to `folder` in PEFT's format and return the folder.

    `base` is recorded as `base_model_name_or_path` (default: the model's own `name_or_path`, when it has one). Both
    files are written beside the old ones first and renamed when complete, so a full disk leaves the previous adapter.
    Raises VolvelleError when the model carries no adapter.
    """
    record = record_of(model)
    if record is None:
        raise VolvelleError("save: this model carries no adapter", tip="volvelle.adapt.apply(model, LoRA()) adds one")
    folder = Path(folder)
    bare = base_shapes(model, record)
    shapes = json.dumps({name: list(shape) for name, shape in names.foreign_shapes(model, bare).items()})
    metadata = {"format": "pt", _SHAPES: shapes, _HASH: hashlib.sha256(shapes.encode()).hexdigest()}
    where = names.places(model, bare)
    layers = {path: LowRank(layer.a.detach(), layer.b.detach(), layer.scale) for path, layer in record.modules.items()}
    method = record.method
    if where is not None:
        layers = names.to_foreign(layers, where)
        method = names.spelled_out(_lora(method), layers)
    settings = _peft_config(model, record, method, base)
    try:
        with atomic_path(folder / CONFIG) as config, atomic_path(folder / WEIGHTS) as weights:
            # Not save_file: it puts a file of its own, private to the user, in the place of ours.
            weights.write_bytes(to_bytes(_peft_tensors(layers), metadata=metadata))
            config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    except (OSError, SafetensorError) as error:
        raise VolvelleError(
            f"{folder}: the adapter could not be written ({error})", tip="what the folder held before is unchanged"
        ) from error
    return folder


def load(model: nn.Module, folder: str | os.PathLike[str]) -> Adapted:
    """Put the adapter stored in `folder` (written by us or by PEFT) on `model`, in place, and describe it.

    The layers are those the file names. Raises VolvelleError when the folder or a file is missing or damaged, when
    the adapter uses something not supported (named), or when it belongs to another base model (the layers are named);
    the model is then unchanged.
    """
    folder = Path(folder)
    method = read_config(folder)
    tensors, metadata = _read_tensors(folder / WEIGHTS)
    pairs = _pair(tensors, folder / WEIGHTS)
    _check_ranks(method, pairs, folder)
    layers = {path: LowRank(a, b, method.scale_of(path)) for path, (a, b) in pairs.items()}
    bare = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    where = names.places(model, bare)
    if where is not None:
        layers = names.from_foreign(layers, where)
        method = names.spelled_out(method, layers)
    _check_base(model, layers, folder)
    _check_shapes(names.foreign_shapes(model, bare), metadata, folder)
    apply(model, names.spelled_out(method, layers))
    record = record_of(model)
    assert record is not None
    record.method = method
    with torch.no_grad():
        for path, layer in record.modules.items():
            layer.a.copy_(layers[path].a)
            layer.b.copy_(layers[path].b)
    return Adapted.of(model, record)


def read_config(folder: str | os.PathLike[str]) -> LoRA:
    """Read adapter_config.json; raises VolvelleError that names every field asking for what is not supported."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise VolvelleError(f"{path}: no such file", tip="an adapter folder holds adapter_config.json and its weights")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VolvelleError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise VolvelleError(f"{path}: not an adapter configuration, it has no peft_type")
    if config["peft_type"] != "LORA":
        raise VolvelleError(f"{path}: peft_type {config['peft_type']} is not supported; supported: LORA")
    refused = [f"{key}={value!r}" for key, value in config.items() if not _understood(key, value)]
    if refused:
        raise VolvelleError(f"{path}: not supported: {', '.join(refused)}")
    return _method(config, path)


def base_name(folder: str | os.PathLike[str]) -> str | None:
    """The `base_model_name_or_path` that an adapter folder records, or None."""
    path = Path(folder) / CONFIG
    return json.loads(path.read_text()).get("base_model_name_or_path") if path.is_file() else None


def base_shapes(model: nn.Module, record: Record) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the model without its adapter, sorted by name."""
    own = record.parameters()
    named = ((name, tuple(p.shape)) for name, p in model.named_parameters() if name not in own)
    return dict(sorted(named))


def _understood(key: str, value: Any) -> bool:
    if key in _READ or key in _INERT or value in (None, False, [], {}, ""):
        return True
    return (key == "init_lora_weights" and value in _HARMLESS_INIT) or (key == "bias" and value == "none")


def _method(config: Mapping[str, Any], path: Path) -> LoRA:
    def names(value: Any) -> tuple[str, ...] | str:
        return value if isinstance(value, str) else tuple(sorted(value or ()))

    layers = config.get("layers_to_transform")
    try:
        return LoRA(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            targets=names(config.get("target_modules")),
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora", False)),
            exclude=names(config.get("exclude_modules")),
            layers=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
        )
    except (KeyError, TypeError, ValueError, VolvelleError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise VolvelleError(f"{path}: {reason}") from None


def _lora(method: Method) -> LoRA:
    if not isinstance(method, LoRA):
        raise VolvelleError(f"save: {method.label} has no PEFT format")
    return method


def _peft_config(model: nn.Module, record: Record, method: Method, base: str | None) -> dict[str, Any]:
    fields = method.to_peft()
    if isinstance(fields["target_modules"], str) and fields["layers_to_transform"] is not None:
        # PEFT takes no layer indices beside a pattern, so the layers are written out.
        fields |= {"target_modules": list(record.modules), "layers_to_transform": None, "exclude_modules": None}
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base or getattr(model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": all(layer.transposed for layer in record.modules.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        **fields,
    }


def _peft_tensors(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.a.cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.b.cpu().contiguous()
    return tensors


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").is_file()
        tip = "adapter_model.bin is a pickle; save it again with safetensors" if pickled else None
        raise VolvelleError(f"{path}: no such file", tip=tip)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VolvelleError(f"{path}: truncated or damaged ({error})", tip="copy or download the file again") from None


def _pair(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix(PREFIX).rpartition(".lora_")
        if name.startswith(PREFIX) and path and kind in {"A.weight", "B.weight"} and tensor.ndim == 2:
            halves.setdefault(path, {})[kind[0]] = tensor
        else:
            unknown.append(name)
    unknown += [f"{path} (only lora_{next(iter(half))})" for path, half in halves.items() if len(half) < 2]
    if unknown or not halves:
        what = _list(unknown) if unknown else "the file holds no tensors"
        raise VolvelleError(f"{file}: not a LoRA of linear layers: {what}")
    return {path: (half["A"], half["B"]) for path, half in halves.items()}


def _check_base(model: nn.Module, layers: Mapping[str, LowRank], folder: Path) -> None:
    modules = dict(model.named_modules())
    wrong = []
    for path, layer in layers.items():
        weight = getattr(modules.get(path), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            wrong.append(f"{path} (the model has no such layer)")
            continue
        d, k = weight.shape if isinstance(modules[path], nn.Linear) else weight.shape[::-1]
        if (len(layer.b), layer.a.shape[1]) != (d, k):
            wrong.append(f"{path} (adapter {len(layer.b)} x {layer.a.shape[1]}, model {d} x {k})")
    _refuse(wrong, folder)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], folder: Path) -> None:
    stored = json.loads(metadata.get(_SHAPES, "{}"))
    differ = [name for name, shape in stored.items() if name in shapes and tuple(shape) != shapes[name]]
    _refuse([f"{name} (adapter's base {tuple(stored[name])}, model {shapes[name]})" for name in differ], folder)


def _refuse(wrong: list[str], folder: Path) -> None:
    if wrong:
        base = base_name(folder)
        tip = f"it was made for {base}" if base else None
        raise VolvelleError(f"{folder}: this adapter belongs to another base model: {_list(wrong)}", tip=tip)


def _check_ranks(method: LoRA, pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    for path, (a, b) in pairs.items():
        if not a.shape[0] == b.shape[1] == method.rank_of(path):
            raise VolvelleError(
                f"{folder}: {path} has rank {a.shape[0]}, but {CONFIG} says {method.rank_of(path)}",
                tip="the two files come from different saves",
            )


def _list(items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
