"""`vqgan(name)`, and codecs on disk: taming's and latent diffusion's files, folders of two libraries, our own, runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from volvelle.errors import UsageError, VolvelleError
from volvelle.files import atomic_path, read_json, write_atomic
from volvelle.hub import resolve
from volvelle.systems.backbone.files import read_tensors, write_tensors
from volvelle.systems.generation import foreign, key_maps, taming
from volvelle.systems.generation.codec import Codec
from volvelle.systems.generation.config import KIND, VQGANConfig, find_config
from volvelle.systems.generation.vqgan_model import VQGAN
from volvelle.systems.key_map import KeyMap
from volvelle.systems.native_folder import CONFIG, SAFETENSORS, is_model, load_model, write_model

Format = Literal["volvelle", "taming", "diffusers", "transformers"]
BESIDE = "volvelle.json"
"""In folders of other libraries: what their config.json cannot say."""
_DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_SUMS = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
_TIP = "known: taming's and latent diffusion's .ckpt, diffusers' VQModel, transformers' ChameleonVQVAE, our own, runs"


def vqgan(
    name: str | VQGANConfig,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> VQGAN:
    """Build a VQGAN by name ("small-f4", "vqgan-f16-1024", "vq-f8", …) or configuration, in evaluation mode.

    `weights`: None for random ones, or whatever `load_vqgan` opens and is of this shape. Raises UsageError for an
    unknown name and for weights of another shape.

    >>> net = vqgan("small-f4")
    >>> net.vocabulary, net.factor, net.size
    (512, 4, 28)
    """
    config = find_config(name) if isinstance(name, str) else name
    if weights is None:
        return VQGAN(config).eval().to(device or "cpu")
    model = load_vqgan(weights, device=device)
    ours = {key: tuple(value.shape) for key, value in VQGAN(config).state_dict().items() if key not in _SUMS}
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in _SUMS}
    wrong = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if wrong:
        raise UsageError(f"{weights}: is no {config.name}: {wrong[0]} differs")
    return model


def open_codec(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Codec:
    """Open an image codec in evaluation mode: a run of `volvelle train vqgan`, or what `load_vqgan` opens."""
    return load_vqgan(path, device=device)


def load_vqgan(path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> VQGAN:
    """Open a VQGAN or VQ-VAE, in evaluation mode; its kind is seen from the file.

    `path` is a file of taming-transformers or latent diffusion (.ckpt, .pt or .safetensors; pickles are opened without
    running code, and one that holds code is refused), a folder of diffusers' VQModel or transformers' ChameleonVQVAE,
    one that `write_vqgan` wrote, a run, or the id of a Hugging Face repository. Their losses' misplaced beta is kept
    in the configuration. Raises VolvelleError for a file that is broken or of another kind, which it names.
    """
    found = resolve(path)
    model = _from_folder(found) if found.is_dir() else _from_file(found)
    return model.eval().to(device or "cpu")


def write_vqgan(model: VQGAN, path: str | os.PathLike[str], to: Format = "volvelle") -> None:
    """Write a folder of our own, taming's .ckpt with its .yaml, or a folder of diffusers or transformers.

    transformers' Chameleon has no decoder: its folder holds the encoder and the codes. Raises UsageError for what the
    other library cannot build.
    """
    config, target = model.config, Path(path)
    if to == "volvelle":
        write_model(model, config.to_json(), target)
    elif to == "taming":
        foreign.needs_32("taming-transformers", config)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            torch.save({"state_dict": key_maps.TAMING.write(_learned(model))}, temporary)
        write_atomic(target.with_suffix(".yaml"), taming.to_yaml(config))
    elif to == "diffusers":
        model.decoding  # noqa: B018  # says so where there is none
        tensors = key_maps.to_diffusers(key_maps.diffusers(config).write(_learned(model)))
        _write_folder(target, foreign.to_diffusers(config), tensors, _DIFFUSERS_FILES[0], config)
    elif to == "transformers":
        tensors = key_maps.TAMING.write(_learned(model))
        kept = {name: value for name, value in tensors.items() if not name.startswith("decoder.")}
        _write_folder(target, foreign.to_chameleon(config), kept, SAFETENSORS, config)
    else:
        raise UsageError(f"write_vqgan: to must be volvelle, taming, diffusers or transformers, got {to!r}")


def is_vqgan(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `write_vqgan` wrote in our own format."""
    return is_model(path, KIND)


def _write_folder(
    folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], name: str, config: VQGANConfig
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    write_atomic(folder / BESIDE, json.dumps(config.to_json(), indent=2) + "\n")
    write_atomic(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def _from_folder(folder: Path) -> VQGAN:
    if (folder / "manifest.json").is_file():
        if not is_vqgan(folder / "weights"):
            raise VolvelleError(
                f"{folder}: a run without a codec's weights",
                tip=f"volvelle resume {folder} if it is an unfinished run of train vqgan",
            )
        folder = folder / "weights"
    if is_vqgan(folder):
        return load_model(folder, KIND, lambda values, source: VQGAN(VQGANConfig.from_json(values, source)))
    values = read_json(folder / CONFIG, tip=_TIP)
    if values.get("_class_name") == foreign.DIFFUSERS:
        file = _one_of(folder, _DIFFUSERS_FILES)
        config = _ours(folder, foreign.from_diffusers(values, str(folder / CONFIG)))
        tensors = key_maps.from_diffusers(read_tensors(file))
        return _filled(config, tensors, key_maps.diffusers(config), str(file))
    if values.get("model_type") == foreign.CHAMELEON:
        file = _one_of(folder, (SAFETENSORS, "pytorch_model.bin"))
        config = _ours(folder, foreign.from_chameleon(values, str(folder / CONFIG)), decodes=False)
        return _filled(config, read_tensors(file), key_maps.TAMING, str(file))
    kind = values.get("_class_name") or values.get("model_type") or values.get("type") or "no kind that it names"
    raise VolvelleError(f"{folder}: a model of {kind}, not an image codec", tip=_TIP)


def _from_file(path: Path) -> VQGAN:
    tensors = taming.codec_tensors(read_tensors(path))
    values = taming.beside(path)
    config = taming.config_of(tensors, str(path), size=taming.size_in(values))
    if isinstance(values.get(taming.OURS), dict):
        ours = VQGANConfig.from_json(values[taming.OURS], str(path.with_suffix(".yaml")))
        _same_shape(ours, config, str(path))
        config = ours
    return _filled(config, tensors, key_maps.TAMING, str(path))


def _ours(folder: Path, config: VQGANConfig, **fixed: Any) -> VQGANConfig:
    """The configuration that we left beside theirs, where it is there and says the same."""
    if not (folder / BESIDE).is_file():
        return config
    given = VQGANConfig.from_json({**read_json(folder / BESIDE), **fixed}, str(folder / BESIDE))
    _same_shape(given, config, str(folder / BESIDE))
    return given


def _same_shape(one: VQGANConfig, other: VQGANConfig, source: str) -> None:
    for name in ("channels", "width", "multipliers", "depth", "attention", "latent", "code_width", "codes"):
        if getattr(one, name) != getattr(other, name):
            raise VolvelleError(
                f"{source}: {name} is {getattr(one, name)} in our notes and {getattr(other, name)} in the file",
                tip="they belong to different models",
            )


def _filled(config: VQGANConfig, tensors: dict[str, Tensor], key_map: KeyMap, source: str) -> VQGAN:
    """The model of these tensors. Raises VolvelleError that names what is missing, unknown or of another shape."""
    model = VQGAN(config)
    held = model.state_dict()
    sums = all(name in tensors for name in _SUMS)
    shapes = {name: tuple(value.shape) for name, value in held.items() if sums or name not in _SUMS}
    found = key_map.read(tensors, shapes, source=source)
    with torch.no_grad():
        for name, part in found.items():
            held[name].copy_(part)
        if not sums and config.codebook == "means":
            model.quantize.start_from(model.quantize.embedding.weight.clone())
    return model


def _learned(model: VQGAN) -> dict[str, Tensor]:
    """What foreign formats hold: all but the running sums of a codebook of means."""
    return {name: value for name, value in model.state_dict().items() if name not in _SUMS}


def _one_of(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise VolvelleError(f"{folder}: holds no {names[0]}")
    return found
