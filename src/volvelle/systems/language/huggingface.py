"""Hugging Face model folders, config.json and safetensors: read into our models, written for transformers to load.

Reading builds the model on the meta device and assigns one tensor at a time, already in the dtype asked for: the peak
is the model and one tensor. Writing puts every file in place atomically, the index last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic
from volvelle.parts.position.sinusoidal import sinusoidal_positions
from volvelle.systems.key_map import Binding
from volvelle.systems.language import bart
from volvelle.systems.language.config import LanguageConfig
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.encoder_decoder import EncoderDecoder
from volvelle.systems.language.huggingface_config import config_from_dict, config_to_dict
from volvelle.systems.language.key_maps import KEY_MAPS
from volvelle.systems.language.models import LanguageModel, build
from volvelle.systems.language.mtp_names import left_out

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SUPPRESSED = "suppress_tokens"
"""The field of generation_config.json that lists tokens which are never written."""


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder by name, read from disk at every access. Opens model.safetensors or the sharded index.

    Raises VolvelleError that names the file which is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / SINGLE).is_file():
            self.files = dict.fromkeys(_open(folder / SINGLE).keys(), SINGLE)
        elif (folder / INDEX).is_file():
            self.files = _read_index(folder)
        else:
            raise VolvelleError(f"{folder}: neither {SINGLE} nor {INDEX}", tip=_other_formats(folder))
        self._opened: tuple[str, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        # One open shard at a time: an open file keeps its memory map alive.
        if self._opened is None or self._opened[0] != file:
            self._opened = (file, _open(self.folder / file))
        try:
            return self._opened[1].get_tensor(name)
        except SafetensorError as error:
            raise VolvelleError(f"{self.folder / file}: {name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def read_folder(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LanguageModel:
    """Read a Hugging Face folder: config.json, safetensors weights and, where present, the tokenizer.

    `dtype` None keeps the files' own. The model comes in evaluation mode. Raises VolvelleError for missing, truncated
    or foreign files, unknown architectures, and tensors that are missing, unknown or of another shape, by name.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise VolvelleError(f"{folder}: no such folder")
    model = from_tensors(
        read_json(folder / "config.json") | _generation(folder / "generation_config.json"),
        SafetensorsFolder(folder),
        source=str(folder),
        dtype=dtype,
        device=device,
    )
    if isinstance(model, Decoder):
        model.written = _written(folder / "generation_config.json", model.config.vocabulary)
    if (folder / "tokenizer.json").is_file():
        from volvelle.systems.language.tokenizer import TextTokenizer

        model.tokenizer = TextTokenizer.from_folder(folder)
    return model


def from_tensors(
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """Build the model of a config.json's content and Hugging Face tensors by name; `tensors` may load lazily.

    Each tensor is fetched once, cast and assigned, so nothing is held twice. Raises VolvelleError as `read_folder`.
    """
    config = config_from_dict(values, f"{source}: config.json")
    with torch.device("meta"):
        model = build(config)
    key_map = KEY_MAPS[config.family]
    bindings = key_map.bind(_shapes(model))
    extra = left_out(values, tensors, config.depth, source)
    names = [name for name in tensors if name not in extra]
    places = key_map.locate(names, bindings, source=source)
    for alias, held in key_map.tied(names, bindings):
        if not torch.equal(tensors[alias], tensors[held]):
            raise VolvelleError(
                f"{source}: config.json ties {alias} to {held}, but the file holds different values",
                tip="set tie_word_embeddings to false in config.json if they were trained apart",
            )
    for binding in bindings:
        if binding.theirs not in places:  # the key map lets a file lack it: it is zero
            _assign(model, binding.ours[0], torch.zeros(binding.shapes[0], dtype=dtype, device=device))
            continue
        for name, part in binding.split(tensors[places[binding.theirs]], source=source).items():
            _assign(model, name, part.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format))
    model.tie()
    if device is not None:
        model.to(device)  # the rotary frequencies, which are no parameters, follow
    return model.eval()


def to_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and tensors of a model, one at a time; views of the parameters where the layouts agree.

    Raises VolvelleError for parameters that the family's files have no place for (adapters).
    """
    held = _held(model)
    for binding in KEY_MAPS[model.config.family].bind(_shapes(model)):
        yield binding.theirs, binding.join(held)
    yield from _tables(model)


def write_folder(model: LanguageModel, path: str | os.PathLike[str], *, shard_size: int = 5 * 10**9) -> None:
    """Write config.json, generation_config.json, the tokenizer and the weights as transformers expects them.

    Weights go to model.safetensors, or to shards of at most `shard_size` bytes (a larger tensor gets its own) and an
    index. Every file appears complete or not at all, and the index last, so a folder never mixes two models. Raises
    VolvelleError when the configuration or a parameter has no place in the family's files.
    """
    folder = Path(path)
    values = config_to_dict(model.config)
    shards = _plan(model, shard_size)
    name = str(model.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    ours = {key: value for key, value in values.items() if key not in bart.WRITING.values()}
    write_atomic(folder / "config.json", _json(ours | {"dtype": name, "torch_dtype": name}))
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id", *bart.GENERATION)
    special = {key: values[key] for key in tokens if values.get(key) is not None}
    if isinstance(model, Decoder) and model.written is not None:
        special[SUPPRESSED] = list(range(model.written, model.config.vocabulary))
    write_atomic(folder / "generation_config.json", _json({"_from_model_config": True, **special}))
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    if (folder / INDEX).exists():
        # An old index over new shards of the same names would load a mixture.
        (folder / INDEX).unlink()
    waiting = iter(to_tensors(model))
    places: dict[str, str] = {}
    for file, count in zip(names, shards, strict=True):
        tensors = {key: tensor.cpu() for key, tensor in (next(waiting) for _ in range(count))}
        places |= dict.fromkeys(tensors, file)
        with atomic_path(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if len(names) > 1:
        total = sum(parameter.nbytes for parameter in model.parameters())
        write_atomic(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": places}))
    for old in folder.glob("model*.safetensors"):
        if old.name not in names:
            old.unlink()


def _generation(path: Path) -> dict[str, Any]:
    """The fields of a configuration that transformers 5 keeps beside it."""
    values = read_json(path) if path.is_file() else {}
    return {name: values[name] for name in bart.GENERATION if name in values}


def _written(path: Path, vocabulary: int) -> int | None:
    """The id from which on all are suppressed, where the file says so; other lists concern transformers alone."""
    found = read_json(path).get(SUPPRESSED) if path.is_file() else None
    if not isinstance(found, list) or not found or not isinstance(found[0], int):
        return None
    return found[0] if found == list(range(found[0], vocabulary)) else None


def _held(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a model: its parameters, each once, and the buffers that belong to its state."""
    buffers = dict(model.named_buffers())
    return dict(model.named_parameters()) | {name: buffers[name] for name in model.state_dict() if name in buffers}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _held(model).items()}


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_buffer = leaf in module._buffers
    setattr(module, leaf, tensor if is_buffer else nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def _tables(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a family's files hold besides, and ours compute or share."""
    config = model.config
    if isinstance(model, EncoderDecoder) and not config.head.tied:
        # transformers 5 then takes no embeddings for shared.
        for side in ("encoder", "decoder"):
            yield f"model.{side}.embed_tokens.weight", model.model.shared.weight.detach().clone()
    if isinstance(config, LanguageConfig) and config.family == "roformer":
        table = sinusoidal_positions(torch.arange(config.context), config.head_width, layout="half")
        yield "roformer.encoder.embed_positions.weight", table


def _plan(model: LanguageModel, shard_size: int) -> list[int]:
    """How many tensors go into each shard."""
    sizes = [_bytes(binding, model.dtype) for binding in KEY_MAPS[model.config.family].bind(_shapes(model))]
    sizes += [table.nbytes for _, table in _tables(model)]
    shards, room = [0], shard_size
    for size in sizes:
        if size > room and shards[-1]:
            shards.append(0)
            room = shard_size
        shards[-1] += 1
        room -= size
    return shards


def _bytes(binding: Binding, dtype: torch.dtype) -> int:
    return torch.Size(binding.their_shape).numel() * dtype.itemsize


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _open(path: Path) -> Any:
    if not path.is_file():
        raise VolvelleError(f"{path}: no such file", tip="the index names it: the folder is incomplete")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise VolvelleError(
            f"{path}: truncated or not a safetensors file ({error})", tip="copy or download the file again"
        ) from error


def _read_index(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise VolvelleError(f"{folder / INDEX}: weight_map is missing or not a table of names")
    for file in sorted(set(index.values())):
        if Path(file).name != file:
            raise VolvelleError(f"{folder / INDEX}: shard {file!r} lies outside the folder")
        held = set(_open(folder / file).keys())
        missing = sorted(name for name, where in index.items() if where == file and name not in held)
        if missing:
            raise VolvelleError(f"{folder / file}: {missing[0]} is named in the index but not in the file")
    return index


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _other_formats(folder: Path) -> str | None:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            "only safetensors is read, pickled weights can run code; convert once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    if any(folder.glob("*.gguf")):
        return "for a GGUF file give the file itself, not its folder"
    return "is this a Hugging Face model folder?"
