"""The configuration of a language model from whatever names it, without its weights and without torch.

Accepted: a Hugging Face folder or its config.json, a GGUF file, a run folder, a model of the table below, a repo id
`owner/name` (only its config.json is fetched). The table holds published values, so that models far too large to
download can be planned; `parameters` is the count that its publisher states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volvelle.errors import UsageError, VolvelleError, did_you_mean
from volvelle.files import read_json
from volvelle.systems.language.config import (
    MLP,
    Dropout,
    GatedMLP,
    Head,
    LanguageConfig,
    LayerNorm,
    Learned,
    RMSNorm,
    Rope,
    SpecialTokens,
)
from volvelle.systems.language.encoder_decoder_config import EncoderDecoderConfig, ModelConfig, Stack

_ALIASES = {"smollm2": "smollm2-135m"}


@dataclass(frozen=True)
class Known:
    """A published model: its configuration and its number of parameters."""

    config: ModelConfig
    parameters: int


@dataclass(frozen=True)
class Found:
    """A configuration, and where it came from."""

    config: ModelConfig
    source: str


def _qwen(width: int, inner: int, depth: int, heads: int, *, kv_heads: int = 0, small: bool = False) -> LanguageConfig:
    """Qwen1.5: Llama's blocks with biases on q, k, v; the smaller models have fewer padded rows in the vocabulary."""
    return LanguageConfig(
        "qwen2",
        vocabulary=151936 if small else 152064,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        context=32768,
        norm=RMSNorm(1e-6),
        mlp=GatedMLP(inner),
        position=Rope(1e6),
        qkv_bias=True,
        head=Head(tied=width == 1024),
    )


def _llama(width: int, inner: int, depth: int, heads: int, *, kv_heads: int = 0, **others: Any) -> LanguageConfig:
    """Llama and SmolLM2; `others` are vocabulary, context, the base of RoPE and whether the head is tied."""
    return LanguageConfig(
        "llama",
        vocabulary=others.get("vocabulary", 32000),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        context=others.get("context", 4096),
        norm=RMSNorm(1e-5),
        mlp=GatedMLP(inner),
        position=Rope(others.get("base", 1e4)),
        head=Head(tied=others.get("tied", False)),
    )


def _gpt2(width: int, depth: int, heads: int) -> LanguageConfig:
    return LanguageConfig(
        "gpt2",
        vocabulary=50257,
        width=width,
        depth=depth,
        heads=heads,
        context=1024,
        norm=LayerNorm(1e-5),
        mlp=MLP(4 * width),
        position=Learned(),
        qkv_bias=True,
        out_bias=True,
        dropout=Dropout(0.1, 0.1, 0.1),
    )


def _bart(width: int, depth: int, heads: int) -> EncoderDecoderConfig:
    side = Stack(depth, heads, MLP(4 * width, "gelu"))
    return EncoderDecoderConfig(
        "bart",
        vocabulary=50265,
        width=width,
        encoder=side,
        decoder=side,
        context=1024,
        start=2,
        dropout=Dropout(0.1, 0.1, 0.1),
        activation_dropout=0.1,
        special=SpecialTokens(bos=0, eos=(2,), pad=1),
        forced_last=2,
    )


_LLAMA3: dict[str, Any] = {"kv_heads": 8, "vocabulary": 128256, "context": 8192, "base": 5e5}
_SMOL: dict[str, Any] = {"vocabulary": 49152, "context": 8192, "base": 1e5, "tied": True}

KNOWN: Mapping[str, Known] = {
    "smollm2-135m": Known(_llama(576, 1536, 30, 9, kv_heads=3, **_SMOL), 134_515_008),
    "smollm2-360m": Known(_llama(960, 2560, 32, 15, kv_heads=5, **_SMOL), 361_821_120),
    "smollm2-1.7b": Known(_llama(2048, 8192, 24, 32, **{**_SMOL, "base": 1.3e5}), 1_711_376_384),
    "gpt2": Known(_gpt2(768, 12, 12), 124_439_808),
    "gpt2-xl": Known(_gpt2(1600, 48, 25), 1_557_611_200),
    "bart-base": Known(_bart(768, 6, 12), 139_420_416),
    "bart-large": Known(_bart(1024, 12, 16), 406_291_456),
    "llama-2-7b": Known(_llama(4096, 11008, 32, 32), 6_738_415_616),
    "llama-2-13b": Known(_llama(5120, 13824, 40, 40), 13_015_864_320),
    "llama-2-70b": Known(_llama(8192, 28672, 80, 64, kv_heads=8), 68_976_648_192),
    "llama-3-8b": Known(_llama(4096, 14336, 32, 32, **_LLAMA3), 8_030_261_248),
    "llama-3-70b": Known(_llama(8192, 28672, 80, 64, **_LLAMA3), 70_553_706_496),
    "qwen1.5-0.5b": Known(_qwen(1024, 2816, 24, 16, small=True), 463_987_712),
    "qwen1.5-1.8b": Known(_qwen(2048, 5504, 24, 16, small=True), 1_836_828_672),
    "qwen1.5-4b": Known(_qwen(2560, 6912, 40, 20, small=True), 3_950_369_280),
    "qwen1.5-7b": Known(_qwen(4096, 11008, 32, 32, small=True), 7_721_324_544),
    "qwen1.5-14b": Known(_qwen(5120, 13696, 40, 40), 14_167_290_880),
    "qwen1.5-32b": Known(_qwen(5120, 27392, 64, 40, kv_heads=8), 32_512_218_112),
    "qwen1.5-72b": Known(_qwen(8192, 24576, 80, 64), 72_287_920_128),
    "qwen1.5-110b": Known(_qwen(8192, 49152, 80, 64, kv_heads=8), 111_209_914_368),
}
"""Published models by name."""


def find_config(name: str) -> Found:
    """The configuration of the model that `name` names; nothing but its configuration is read or fetched.

    Raises UsageError for a name that is none of what is accepted, with the close ones, and VolvelleError for a
    configuration that cannot be read.

    >>> find_config("Qwen/Qwen1.5-7B").config.width
    4096
    >>> find_config("qwen1.5-7")
    Traceback (most recent call last):
    volvelle.errors.UsageError: 'qwen1.5-7' is neither a path here nor a model whose configuration is known
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return _at(path)
    tail = name.lower().rpartition("/")[2]
    known = _ALIASES.get(tail, tail)
    if known in KNOWN:
        return Found(KNOWN[known].config, f"the published configuration of {known}")
    if "/" in name and not path.is_absolute() and not name.startswith((".", "~")):
        return _from_hub(name)
    tip = did_you_mean(tail, [*KNOWN, *_ALIASES]) or f"known: {', '.join(KNOWN)}; or a folder, or owner/name"
    raise UsageError(f"{name!r} is neither a path here nor a model whose configuration is known", tip=tip)


def _at(path: Path) -> Found:
    if path.is_file():
        return _from_json(path) if path.suffix == ".json" else _from_gguf(path)
    if (path / "manifest.json").is_file():
        return _of_run(path)
    if (path / "config.json").is_file():
        return _from_json(path / "config.json")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _from_gguf(files[0])
    raise VolvelleError(f"{path}: no config.json, run or GGUF file in this folder", tip="name a model's folder or file")


def _of_run(path: Path) -> Found:
    """A run's own weights, else the model that it adapted: an adapter is folded in before the next one is trained."""
    from volvelle.runs import RunFolder

    weights = path / "weights" / "config.json"
    if weights.is_file():
        return _from_json(weights)
    base = RunFolder.open(path).manifest.get("base_model")
    if not isinstance(base, str):
        raise VolvelleError(f"{path}: this run holds no weights and names no base model")
    found = find_config(base)
    return Found(found.config, f"{base}, which {path} adapts ({found.source})")


def _from_json(path: Path) -> Found:
    from volvelle.systems.language.huggingface_config import config_from_dict

    return Found(config_from_dict(read_json(path), str(path)), str(path))


def _from_gguf(path: Path) -> Found:
    from volvelle.systems.language.gguf import read_gguf
    from volvelle.systems.language.huggingface_config import config_from_dict

    return Found(config_from_dict(read_gguf(path).config, str(path)), str(path))


def _from_hub(repo: str) -> Found:
    """Only config.json, from what is stored here or from Hugging Face."""
    from volvelle import hub

    stored = next((row["path"] for row in hub.repositories() if row["name"] == repo), None)
    if stored is not None and (Path(stored) / "config.json").is_file():
        return _from_json(Path(stored) / "config.json")
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = repo.partition("@")
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", revision=revision or None)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        raise VolvelleError(
            f"{repo}: its config.json cannot be fetched ({str(error).splitlines()[0]})",
            tip=f"pass a folder that holds it, or a published model: {', '.join(KNOWN)}",
        ) from error
    return Found(_from_json(Path(file)).config, f"{repo}/config.json")
