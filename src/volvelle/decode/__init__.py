"""Generating text with a language model: `generate`, `generate_batch`, `stream`, `beam_search`; how tokens are chosen.

Names are resolved on first use, so importing the torch-free `volvelle.decode.options` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.decode.beam import beam_search
    from volvelle.decode.generation import generate, generate_batch, stream
    from volvelle.decode.loop import Draft, Drafter
    from volvelle.decode.options import Beams, Rules, Sampling
    from volvelle.decode.request import Generation, Token

_HOME = {
    **dict.fromkeys(("Beams", "Rules", "Sampling"), "options"),
    "beam_search": "beam",
    **dict.fromkeys(("generate", "generate_batch", "stream"), "generation"),
    **dict.fromkeys(("Draft", "Drafter"), "loop"),
    **dict.fromkeys(("Generation", "Token"), "request"),
}

__all__ = [
    "Beams",
    "Draft",
    "Drafter",
    "Generation",
    "Rules",
    "Sampling",
    "Token",
    "beam_search",
    "generate",
    "generate_batch",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
