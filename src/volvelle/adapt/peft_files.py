"""LoRA and DoRA as PEFT writes them: adapter_config.json with peft_type LORA, and the tensors of each layer.

They are named `base_model.model.<path>.lora_A.weight` and `….lora_B.weight`, for embeddings `….lora_embedding_A` and
`….lora_embedding_B`, with DoRA also `….lora_magnitude_vector`. Shapes are ours (kinds.py) but for the magnitude of a
convolution, (1, d, 1, 1), and A of a grouped one, which sees all channels there: we write zeros where ours does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.adapt import names
from volvelle.adapt.files import BEYOND, CONFIG, WEIGHTS, Settings, Unpacked, base_shapes, refuse, some
from volvelle.adapt.methods import DoRA, LoRA, Method
from volvelle.adapt.model import Adapter
from volvelle.adapt.names import LowRank
from volvelle.adapt.sites import Seat
from volvelle.adapt.targets import absent_blocks, block_index, matches
from volvelle.errors import VolvelleError
from volvelle.parts.lowrank.dora import column_norm
from volvelle.parts.lowrank.kinds import CONV2D, EMBEDDING, TRANSPOSED, Kind, kind_of, why_not

PREFIX = "base_model.model."

# Fields of LoraConfig that change nothing in the result of a loaded adapter, whatever their value.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "task_type", "ensure_weight_tying", "layers_pattern",
    "loftq_config", "eva_config", "runtime_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "use_dora", "exclude_modules",
    "layers_to_transform", "rank_pattern", "alpha_pattern",
}  # fmt: skip
# These initialisations only choose the first A and B; the others (PiSSA, OLoRA, …) also change the base weights.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")
_BASE = ".base_layer.weight"
_NAME = re.compile(
    r"(?P<path>.+)\.(lora_(embedding_)?(?P<half>[AB])(\.weight)?|(?P<m>lora_magnitude_vector)(\.weight)?)"
)


class LowRankFormat:
    """The format of LoRA and DoRA."""

    peft_types = ("LORA",)

    def writes(self, method: Method) -> bool:
        """LoRA and DoRA."""
        return isinstance(method, LoRA)

    def pack(self, model: nn.Module, adapter: Adapter, bare: names.Shapes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's settings and tensors; layers of our Decoder under the names of its family."""
        method, where = adapter.method, names.places(model, bare)
        assert isinstance(method, LoRA)
        seats = {path: layer for path, layer in adapter.layers.items() if isinstance(layer, Seat)}
        layers = {path: _low_rank(layer.update) for path, layer in seats.items()}
        kinds: dict[str, tuple[Kind, Any]] = {path: (seat.update.kind, seat.layer) for path, seat in seats.items()}
        if where is not None:
            layers = names.to_foreign(layers, where, lambda path: _norm(model.get_submodule(path)))
            kinds = {place.theirs: kinds[path] for place in where for path in place.ours if path in kinds}
            method = names.spelled_out(method, layers)
        tensors: dict[str, Tensor] = {}
        for path, layer in layers.items():
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in _to_peft(layer, *kinds[path]).items()}
        transposed = [kind == TRANSPOSED for kind, _ in kinds.values()]
        return _settings(model, method, list(layers), fan_in_fan_out=all(transposed)), tensors

    def read_method(self, settings: Settings, path: Path) -> Method:
        """The method that the settings describe; every field asking for what is not supported is named."""
        refused = [f"{key}={value!r}" for key, value in settings.items() if not _understood(key, value)]
        if refused:
            raise VolvelleError(f"{path}: not supported: {', '.join(refused)}")
        return _method(settings, path)

    def unpack(
        self, model: nn.Module, method: Method, tensors: Mapping[str, Tensor], folder: Path, name: str
    ) -> Unpacked:
        """The layers that the file names, as ours, each checked against the model's."""
        assert isinstance(method, LoRA)
        where = names.places(model, base_shapes(model))
        tensors = _without_bases(model, tensors, where or [], folder)
        found = _parts(tensors, folder / WEIGHTS, dora=isinstance(method, DoRA))
        _check_ranks(method, found, folder)
        _check_blocks(model, method, where, found, folder)
        layers = {path: LowRank(scale=method.scale_of(path), **parts) for path, parts in found.items()}
        if where is not None:
            layers = names.from_foreign(layers, where)
            method = names.spelled_out(method, layers)
        layers = _fitted(model, layers, folder)
        values = {
            f"{path}.adapters.{name}.{key}": value
            for path, layer in layers.items()
            for key, value in (("a", layer.a), ("b", layer.b), ("magnitude", layer.magnitude))
            if value is not None
        }
        return Unpacked(method, names.spelled_out(method, layers), values)


def _check_blocks(
    model: nn.Module, method: LoRA, where: list[names.Place] | None, found: Iterable[str], folder: Path
) -> None:
    """Refuse where the settings also choose layers in blocks that the file has nothing of: its base had fewer.

    PEFT's files do not say what their base was like.
    """
    paths = [place.theirs for place in where or ()]
    paths = paths or [path for path, module in model.named_modules() if not why_not(module)]
    chosen = [path for path in paths if matches(method.targets, path) and not matches(method.exclude, path)]
    if method.layers is not None:
        chosen = [path for path in chosen if block_index(path) in method.layers]
    refuse([f"{block} ({BEYOND})" for block in absent_blocks(chosen, found)], folder)


def _without_bases(
    model: nn.Module, tensors: Mapping[str, Tensor], where: list[names.Place], folder: Path
) -> dict[str, Tensor]:
    """The tensors without the whole embeddings that PEFT writes beside their adapters; they must be the model's."""
    modules: dict[str, Any] = dict(model.named_modules())
    ours = {place.theirs: place.ours[0] for place in where}
    kept, wrong = {}, []
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX).removesuffix(_BASE).removesuffix(".weight")
        weight = getattr(modules.get(ours.get(path, path)), "weight", None)
        if not name.endswith(_BASE) and weight is None:
            kept[name] = tensor
            continue
        # torch.equal is False for shapes that differ.
        if weight is None or not torch.equal(weight.detach().cpu(), tensor.to(weight.dtype)):
            wrong.append(f"{path} (the file's embeddings differ from the model's)")
    refuse(wrong, folder)
    return kept


def _low_rank(update: Any) -> LowRank:
    magnitude = getattr(update, "magnitude", None)
    return LowRank(
        update.a.detach(), update.b.detach(), update.scale, None if magnitude is None else magnitude.detach()
    )


def _norm(layer: Any) -> Tensor:
    return column_norm(kind_of(layer).matrix(layer.weight.detach()))


def _to_peft(layer: LowRank, kind: Kind, module: Any) -> dict[str, Tensor]:
    """One layer's tensors by PEFT's names."""
    a, magnitude = layer.a, layer.magnitude
    if kind == CONV2D and module.groups > 1:
        a = _all_channels(a, module.groups)
    if kind == CONV2D and magnitude is not None:
        magnitude = magnitude[None, :, None, None]
    embedding = kind == EMBEDDING
    named = {"lora_embedding_A" if embedding else "lora_A.weight": a}
    named["lora_embedding_B" if embedding else "lora_B.weight"] = layer.b
    return named if magnitude is None else {**named, "lora_magnitude_vector": magnitude}


def _all_channels(a: Tensor, groups: int) -> Tensor:
    """A (r, c/g, …) as one that sees all channels (r, c, …), with zeros for those of other groups."""
    rank, width = a.shape[:2]
    wide = a.new_zeros(rank, width * groups, *a.shape[2:])
    for group, part in enumerate(a.chunk(groups)):
        wide[group * (rank // groups) :][: rank // groups, group * width : (group + 1) * width] = part
    return wide


def _own_channels(a: Tensor, groups: int) -> Tensor:
    """Undo `_all_channels`, dropping what other groups' channels had."""
    return torch.cat([part.chunk(groups, 1)[group] for group, part in enumerate(a.chunk(groups))])


def _fitted(model: nn.Module, layers: Mapping[str, LowRank], folder: Path) -> dict[str, LowRank]:
    """The layers with shapes as the model's own layers want them; those that do not fit are named."""
    modules: dict[str, Any] = dict(model.named_modules())
    fitted, wrong = {}, []
    for path, layer in layers.items():
        if path not in modules or why_not(modules[path]):
            reason = why_not(modules[path]) if path in modules else None
            wrong.append(f"{path} ({reason or 'the model has no such layer'})")
            continue
        module, a, magnitude = modules[path], layer.a, layer.magnitude
        kind = kind_of(module)
        if kind == CONV2D and module.groups > 1 and a.ndim == 4 and a.shape[1] == module.in_channels:
            a = _own_channels(a, module.groups)
            if not torch.equal(_all_channels(a, module.groups), layer.a):
                raise VolvelleError(
                    f"{folder}: {path} is a convolution of {module.groups} groups, and this adapter's A mixes them",
                    tip="such an update is no weight of the layer; PEFT can run it, and cannot merge it either",
                )
        magnitude = None if magnitude is None else magnitude.reshape(-1)
        outputs, inputs = kind.matrix(module.weight).shape
        want, got = kind.shapes(module, len(a)), (tuple(a.shape), tuple(layer.b.shape))
        if got != want or (magnitude is not None and len(magnitude) != outputs):
            shown = f"{layer.b.shape[0]} x {a[0].numel()}"
            wrong.append(f"{path} (adapter {shown}, model {outputs} x {inputs})")
        fitted[path] = LowRank(a, layer.b, layer.scale, magnitude)
    refuse(wrong, folder)
    return fitted


def _understood(key: str, value: Any) -> bool:
    if key in _READ or key in _INERT or value in (None, False, [], {}, ""):
        return True
    return (key == "init_lora_weights" and value in _HARMLESS_INIT) or (key == "bias" and value == "none")


def _method(settings: Settings, path: Path) -> LoRA:
    def words(value: Any) -> tuple[str, ...] | str:
        return value if isinstance(value, str) else tuple(sorted(value or ()))

    layers = settings.get("layers_to_transform")
    try:
        return (DoRA if settings.get("use_dora") else LoRA)(
            rank=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            targets=words(settings.get("target_modules")),
            dropout=float(settings.get("lora_dropout", 0.0)),
            rslora=bool(settings.get("use_rslora", False)),
            exclude=words(settings.get("exclude_modules")),
            layers=None if layers is None else (layers,) if isinstance(layers, int) else tuple(layers),
            rank_pattern=dict(settings.get("rank_pattern") or {}),
            alpha_pattern=dict(settings.get("alpha_pattern") or {}),
        )
    except (KeyError, TypeError, ValueError, VolvelleError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise VolvelleError(f"{path}: {reason}") from None


def _settings(model: nn.Module, method: LoRA, paths: list[str], *, fan_in_fan_out: bool) -> dict[str, Any]:
    targets: Any = method.targets if isinstance(method.targets, str) else list(method.targets)
    exclude: Any = method.exclude if isinstance(method.exclude, str) else list(method.exclude)
    layers = None if method.layers is None else list(method.layers)
    if isinstance(targets, str) and layers is not None:
        # PEFT takes no layer indices beside a pattern, so the layers are written out.
        targets, layers, exclude = paths, None, None
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        "r": method.rank,
        "lora_alpha": _whole(method.alpha),
        "target_modules": targets,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": isinstance(method, DoRA),
        "exclude_modules": exclude or None,
        "layers_to_transform": layers,
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": {key: _whole(alpha) for key, alpha in method.alpha_pattern.items()},
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _parts(tensors: Mapping[str, Tensor], file: Path, *, dora: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, as a, b and magnitude; VolvelleError names what does not belong there."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        dimensions = (1, 4) if match and match["m"] else (2, 4)
        known = match is not None and name.startswith(PREFIX) and (dora or not match["m"])
        if match is None or not known or tensor.ndim not in dimensions:
            unknown.append(name)
        else:
            found.setdefault(match["path"], {})["magnitude" if match["m"] else match["half"].lower()] = tensor
    wanted = {"a", "b", "magnitude"} if dora else {"a", "b"}
    shown = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
    unknown += [
        f"{path} (only {' and '.join(shown[key] for key in sorted(parts))})"
        for path, parts in found.items()
        if set(parts) != wanted
    ]
    if unknown or not found:
        what = some(unknown) if unknown else "the file holds no tensors"
        raise VolvelleError(f"{file}: not a {'DoRA' if dora else 'LoRA'} of layers we know: {what}")
    return found


def _check_ranks(method: LoRA, found: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    for path, parts in found.items():
        rank = len(parts["a"])
        # A grouped convolution's B holds a share of the rank for every group.
        columns = parts["b"].shape[1]
        if rank != method.rank_of(path) or rank % columns or (parts["b"].ndim == 2 and columns != rank):
            raise VolvelleError(
                f"{folder}: {path} has rank {rank}, but {CONFIG} says {method.rank_of(path)}",
                tip="the two files come from different saves",
            )
