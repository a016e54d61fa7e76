"""Names of multi-token prediction in files: those of the releases of DeepSeek-V3 and of Gloeckle et al. No torch.

DeepSeek-V3 numbers its module as one layer more: with L = num_hidden_layers, depth k is `model.layers.{L + k - 1}` and
holds enorm, hnorm, eh_proj, shared_head.norm, and a block under the names of any other layer; config.json says
num_nextn_predict_layers = D (README_WEIGHTS.md of the release, and the readers of vLLM and SGLang). It adds copies of
what the module shares, embed_tokens and shared_head.head. Gloeckle et al. call their heads `extra_heads.{k - 1}`; the
names inside are here those of a block in the decoder's files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from volvelle.errors import VolvelleError, did_you_mean

Kind = Literal["sequential", "parallel"]
COUNT, KIND = "num_nextn_predict_layers", "mtp_kind"
COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
"""Endings of tensors that repeat what the decoder holds."""


def saved_name(name: str, kind: str, depth: int) -> str:
    """The name in a file of a module's parameter, beside a decoder of `depth` blocks.

    >>> saved_name("layers.0.block.self_attn.q_proj.weight", "sequential", 61)
    'model.layers.61.self_attn.q_proj.weight'
    >>> saved_name("layers.0.enorm.weight", "sequential", 61)
    'model.layers.61.enorm.weight'
    """
    _, number, rest = name.split(".", 2)
    if kind == "sequential":
        return f"model.layers.{depth + int(number)}.{rest.removeprefix('block.')}"
    return f"model.extra_heads.{number}.{rest}"


def announced(values: Mapping[str, Any], source: str) -> tuple[int, str]:
    """How many modules a config.json announces (0: none), and of which kind. Raises VolvelleError for nonsense."""
    count, kind = values.get(COUNT) or 0, values.get(KIND, "sequential")
    if not isinstance(count, int) or count < 0:
        raise VolvelleError(f"{source}: {COUNT} must be a number of layers, got {count!r}")
    known = Kind.__args__  # type: ignore[attr-defined]
    if kind not in known:
        tip = did_you_mean(str(kind), known) or f"known: {', '.join(known)}"
        raise VolvelleError(f"{source}: {KIND} = {kind!r} is not known", tip=tip)
    return count, str(kind)


def left_out(values: Mapping[str, Any], names: Iterable[str], depth: int, source: str) -> set[str]:
    """Those of a file's tensors that belong to the modules which its config.json announces; warns, and names them.

    A plain decoder of `depth` blocks does without. Layers that are not announced are left to whoever finds them.
    """
    count, kind = announced(values, source)
    prefixes = {
        f"model.layers.{depth + k}." if kind == "sequential" else f"model.extra_heads.{k}." for k in range(count)
    }
    found = {name for name in names if name.startswith(tuple(prefixes))} if prefixes else set()
    if found:
        layers = ", ".join(sorted(prefixes))
        warnings.warn(
            f"{source}: {len(found)} tensors of multi-token prediction ({layers}*) are not part of the decoder and "
            "left out; read_mtp reads them",
            stacklevel=2,
        )
    return found
