"""`sam(name)`, and checkpoints of three formats: Meta's .pth, folders of transformers' SamModel, and our own."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from volvelle.errors import UsageError, VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic
from volvelle.hub import resolve
from volvelle.systems.backbone.files import read_tensors, write_tensors
from volvelle.systems.key_map import KeyMap, Rule
from volvelle.systems.native_folder import CONFIG, SAFETENSORS, is_model, load_model, write_model
from volvelle.systems.segmentation.sam import key_maps, meta
from volvelle.systems.segmentation.sam.config import KIND, PRESETS, Decoder, Light, SamConfig, find_config
from volvelle.systems.segmentation.sam.huggingface import from_huggingface, to_huggingface
from volvelle.systems.segmentation.sam.looks_like import looks_like
from volvelle.systems.segmentation.sam.model import Sam

Format = Literal["volvelle", "hf", "meta"]
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
"""Ends of the names of files of weights."""
LISTING = 1 << 23
"""Bytes at the beginning of a file within which its tensors are named."""
PREPROCESSOR = "preprocessor_config.json"
_META_MARK, _HF_MARK = "image_encoder.blocks.0.attn.rel_pos_h", "vision_encoder.layers.0.attn.rel_pos_h"
_DECODER = "mask_decoder.mask_tokens.weight"


def sam(
    name: str | SamConfig,
    *,
    size: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> Sam:
    """Build Segment Anything by name, "vit_b", "vit_l", "vit_h" or "lite0", in evaluation mode.

    `size` is the side of its square input, a multiple of 16. `weights`: None for random ones; for "lite0" what
    `volvelle.systems.backbone.backbone` takes, "imagenet" say, for its image encoder; for the others a checkpoint that
    `load_sam` opens and that is of this name. Raises UsageError for an unknown name.

    >>> sum(p.numel() for p in sam("lite0").mask_decoder.parameters())
    4058340
    """
    config = name if isinstance(name, SamConfig) else find_config(name, size)
    if isinstance(config.encoder, Light):
        from volvelle.systems.backbone.load import backbone
        from volvelle.systems.segmentation.sam.light_encoder import LightEncoder

        encoder = LightEncoder(config, backbone(config.encoder.backbone, weights=weights))
        return Sam(config, encoder).eval().to(device or "cpu")
    if weights is None:
        return Sam(config).eval().to(device or "cpu")
    model = load_sam(weights, device=device)
    if model.config.encoder != config.encoder or model.config.size != config.size:
        raise UsageError(
            f"{weights}: holds {model.config.name} for {model.config.size} pixels, not {config.name} for {config.size}"
        )
    return model


def load_sam(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Sam:
    """Open a model, in evaluation mode; its kind is seen from the file.

    `path` is a file of Meta's (.pth, or the same tensors as .safetensors; opened without running code), a folder of
    transformers' SamModel, a folder that `write_sam` wrote, a run of `volvelle train promptable`, or the id of a
    Hugging Face repository. Raises VolvelleError for a file that is broken or of another kind, which it names.
    """
    found = resolve(path)
    model = _from_folder(found) if found.is_dir() else _from_tensors(read_tensors(found), None, str(found))
    return model.eval().to(device or "cpu")


def write_sam(model: Sam, path: str | os.PathLike[str], to: Format = "volvelle") -> None:
    """Write a folder of our own, a folder that transformers' SamModel loads ("hf"), or Meta's .pth file ("meta").

    Raises UsageError for a light image encoder in a foreign format, and for what Meta's files cannot say.
    """
    config, target = model.config, Path(path)
    if to == "volvelle":
        write_model(model, config.to_json(), target)
        return
    if to not in ("hf", "meta"):
        raise UsageError(f"write_sam: to must be volvelle, hf or meta, got {to!r}")
    if isinstance(config.encoder, Light):
        raise UsageError(
            f"write_sam: the format {to} has no image encoder on {config.encoder.backbone}",
            tip="to='volvelle' writes any model, and ONNX runs anywhere",
        )
    if to == "meta":
        if config.decoder.heads != meta.HEADS:
            heads = config.decoder.heads
            raise UsageError(f"write_sam: Meta's code builds {meta.HEADS} heads in the mask decoder, not {heads}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            torch.save(key_maps.META.write(model.state_dict()), temporary)
        return
    target.mkdir(parents=True, exist_ok=True)
    values, preprocessing = to_huggingface(config)
    write_tensors(key_maps.transformers(config.decoder).write(model.state_dict()), target / SAFETENSORS)
    write_atomic(target / PREPROCESSOR, json.dumps(preprocessing, indent=2) + "\n")
    write_atomic(target / CONFIG, json.dumps(values, indent=2) + "\n")


def is_sam(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `write_sam` wrote in our own format."""
    return is_model(path, KIND)


def holds_sam(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like Segment Anything's checkpoint: our folder, transformers', or a file of its tensors.

    No tensor is read for that, and nothing is downloaded; what is wrong with the checkpoint `load_sam` says.
    """
    found = Path(path)
    if found.is_dir():
        return is_sam(found) or _type_of(found) == "sam"
    return found.suffix in SUFFIXES and found.is_file() and _DECODER.encode() in _listing(found)


def _type_of(folder: Path) -> str | None:
    try:
        return read_json(folder / CONFIG).get("model_type")
    except VolvelleError:
        return None


def _listing(file: Path) -> bytes:
    """The part of a file of weights that names its tensors."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        with file.open("rb") as opened:  # safetensors and older pickles begin with it
            return opened.read(LISTING)
    except (OSError, zipfile.BadZipFile):
        return b""


def _from_folder(folder: Path) -> Sam:
    if (folder / "manifest.json").is_file() and (folder / "weights").is_dir():
        folder = folder / "weights"
    if is_sam(folder):
        return load_model(folder, KIND, lambda values, source: Sam(SamConfig.from_json(values, source)))
    values = read_json(folder / CONFIG, tip=_TIP)
    kind = values.get("model_type") or values.get("type") or (values.get("architectures") or [None])[0]
    if values.get("model_type") != "sam":
        what = f"a model of the kind {kind}" if kind else "no model that says its kind"
        raise VolvelleError(f"{folder}: {what}, not Segment Anything", tip=_TIP)
    preprocessing = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    files = [folder / name for name in (SAFETENSORS, "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise VolvelleError(f"{folder}: holds no {SAFETENSORS}")
    config = from_huggingface(values, preprocessing, str(folder / CONFIG))
    return _from_tensors(read_tensors(files[0]), config, str(files[0]))


_TIP = f"known models: {', '.join(PRESETS)}, as Meta's .pth, a folder of transformers' SamModel, or our own"


def _from_tensors(tensors: Mapping[str, Tensor], config: SamConfig | None, source: str) -> Sam:
    """The model of named tensors; its configuration comes from their shapes where there is none."""
    theirs = _HF_MARK in tensors
    if _DECODER not in tensors or not (theirs or _META_MARK in tensors):
        raise VolvelleError(f"{source}: looks like {looks_like(tensors)}, not Segment Anything", tip=_TIP)
    if any("mask_decoder.hf_" in name or "compress_vit_feat" in name for name in tensors):
        raise VolvelleError(f"{source}: looks like {looks_like(tensors)}", tip=_TIP)
    key_map = key_maps.META
    if theirs:
        depth = 2 + sum(f"mask_decoder.iou_prediction_head.layers.{i}.weight" in tensors for i in range(64))
        key_map = key_maps.transformers(Decoder(iou_depth=depth))
    if config is None:
        config = meta.config_of(_renamed(tensors, key_map) if theirs else tensors, source)
        config = replace(config, decoder=replace(config.decoder, eps=1e-6)) if theirs else config
    with torch.device("meta"):
        model = Sam(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = key_map.read(tensors, shapes, source=source)
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model


def _renamed(tensors: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """The tensors under our names, found by the rules read backwards."""
    backwards = [Rule(rule.ours[0], (rule.theirs,)) for rule in key_map.rules]
    found = {}
    for name, tensor in tensors.items():
        rule, values = next((rule, values) for rule in backwards if (values := rule.match(name)) is not None)
        found[rule.theirs.format(**values)] = tensor
    return found
