"""Prefixes and prompts as PEFT's files: one tensor `prompt_embeddings`, a row for each position before the text.

A prefix's row holds (layer, key or value, head, feature); what network made it while it was trained is not in the file.
A prompt's row is an embedding.

PEFT's files for encoder-decoders are read as PEFT (0.21) uses them. It has prefixes before the answer only, and layers
of them share one row (see `from_peft`), so ours are written in a format of our own: peft_type VOLVELLE_PREFIX, and for
each site (decoder, cross, encoder) a tensor of that name, in the layout of a prefix's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from volvelle.adapt import names
from volvelle.adapt.files import Settings, Unpacked, refuse
from volvelle.adapt.methods import Method
from volvelle.adapt.model import Adapter
from volvelle.adapt.prefix import PrefaceLayer, preface_path, sizes_of
from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
from volvelle.adapt.prefix_sites import SITES, from_peft, stacks
from volvelle.errors import VolvelleError
from volvelle.systems.language.encoder_decoder import EncoderDecoder

TENSOR = "prompt_embeddings"
SITED = "VOLVELLE_PREFIX"

# What describes the base model, or how training began: it changes nothing in the result of a loaded adapter.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "inference_mode", "init_weights",
    "num_attention_heads", "num_layers", "peft_version", "prefix_projection", "prompt_tuning_init",
    "prompt_tuning_init_text", "revision", "task_type", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
_READ = {"peft_type", "num_virtual_tokens", "sites"}


class PrefaceFormat:
    """PREFIX_TUNING and PROMPT_TUNING, and prefixes of encoder-decoders."""

    peft_types = ("PREFIX_TUNING", "PROMPT_TUNING", SITED)

    def writes(self, method: Method) -> bool:
        """Whether the method is one of the two."""
        return isinstance(method, PrefixTuning | PromptTuning)

    def pack(self, model: nn.Module, adapter: Adapter, bare: names.Shapes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings and tensors."""
        [layer] = adapter.layers.values()
        assert isinstance(layer, PrefaceLayer)
        stored = layer.preface.flat()
        if isinstance(stored, dict):
            length = len(next(iter(stored.values())))
            return {"peft_type": SITED, "num_virtual_tokens": length, "sites": list(stored)}, stored
        layers, kv_heads, head_width, embedding = sizes_of(model)
        settings: dict[str, Any] = {
            "auto_mapping": None,
            "inference_mode": True,
            "modules_to_save": None,
            "num_attention_heads": kv_heads,
            "num_layers": layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": len(stored),
            "revision": None,
            "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else None,
        }
        if isinstance(adapter.method, PromptTuning):
            # Where training began is no longer of use, and a text would ask PEFT for a tokenizer.
            settings |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": embedding}
        else:
            width = kv_heads * head_width
            settings |= {
                "peft_type": "PREFIX_TUNING",
                "encoder_hidden_size": width,
                "prefix_projection": False,
                "token_dim": width,
            }
        return settings, {TENSOR: stored}

    def read_method(self, settings: Settings, path: Path) -> Method:
        """The method, for the numbers as they are stored; VolvelleError names what is not supported."""
        refused = [f"{key}={value!r}" for key, value in settings.items() if not _understood(settings, key)]
        if refused:
            raise VolvelleError(f"{path}: not supported: {', '.join(refused)}")
        try:
            length = int(settings["num_virtual_tokens"])
            if settings["peft_type"] == "PROMPT_TUNING":
                return PromptTuning(length, init="random")
            sites = tuple(settings["sites"]) if settings["peft_type"] == SITED else None
            sites = ("decoder",) if settings.get("num_transformer_submodules") == 2 else sites
            return PrefixTuning(length, hidden=None, init="random", sites=sites)
        except (KeyError, TypeError, ValueError, VolvelleError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise VolvelleError(f"{path}: {reason}") from None

    def unpack(
        self, model: nn.Module, method: Method, tensors: Mapping[str, Tensor], folder: Path, name: str
    ) -> Unpacked:
        """The adapter `name` for `model`; VolvelleError names the sizes that do not fit."""
        assert isinstance(method, PrefixTuning | PromptTuning)
        expected = {TENSOR} if TENSOR in tensors else set(getattr(method, "sites", None) or {TENSOR})
        if set(tensors) != expected or any(table.dim() != 2 for table in tensors.values()):
            found = ", ".join(f"{key} {tuple(x.shape)}" for key, x in tensors.items()) or "no tensors"
            wanted = f"one matrix {TENSOR}" if expected == {TENSOR} else f"matrices {', '.join(sorted(expected))}"
            raise VolvelleError(f"{folder}: expected {wanted}, found {found}")
        sited = isinstance(method, PrefixTuning) and method.sites is not None
        if sited != isinstance(model, EncoderDecoder):
            kinds = ("an encoder-decoder", "a decoder")
            refuse([f"it was made for {kinds[not sited]}, and this is {kinds[sited]}"], folder)
        tables = dict(tensors)
        if TENSOR in tensors and isinstance(model, EncoderDecoder):
            tables = {"decoder": from_peft(tensors[TENSOR], model)}
        wrong = []
        for key, table in tables.items():
            if len(table) != method.length:
                raise VolvelleError(
                    f"{folder}: {key} has {len(table)} rows, but num_virtual_tokens is {method.length}",
                    tip="the two files come from different saves",
                )
            width, made_of = _features(model, method, key)
            if table.shape[1] != width:
                wrong.append(f"{key} (adapter {table.shape[1]} features a row, model {width}: {made_of})")
        refuse(wrong, folder)
        place = preface_path(name)
        values = {f"{place}.sites.{key}.table" if sited else f"{place}.table": table for key, table in tables.items()}
        return Unpacked(method, method, values)


def _features(model: nn.Module, method: Method, key: str) -> tuple[int, str]:
    """How many features a row has, and what they are."""
    if isinstance(model, EncoderDecoder):
        layers, heads, width = next(shape for site, shape in stacks(model).items() if site == key)
    else:
        layers, heads, width, embedding = sizes_of(model)
        if isinstance(method, PromptTuning):
            return embedding, "its embeddings"
    return 2 * layers * heads * width, f"2 x {layers} layers x {heads} heads x {width}"


def _understood(settings: Settings, key: str) -> bool:
    value = settings[key]
    if key == "sites":
        return settings["peft_type"] == SITED and isinstance(value, list) and bool(value) and set(value) <= set(SITES)
    if key in _READ or key in _INERT or value in (None, False, [], {}, ""):
        return True
    most = 2 if settings["peft_type"] == "PREFIX_TUNING" else 1
    return key == "num_transformer_submodules" and value in range(1, most + 1)
