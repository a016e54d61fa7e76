"""Generating text with a language model: plainly or with drafts that it checks; beam search; how tokens are chosen.

Names are resolved on first use, so importing the torch-free `volvelle.decode.options` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.decode.accept_exact import Exact
    from volvelle.decode.accept_typical import Typical
    from volvelle.decode.beam import beam_search
    from volvelle.decode.contract import Draft, Drafter, Drafting
    from volvelle.decode.drafters.draft_model import DraftModel
    from volvelle.decode.drafters.early_exit import EarlyExit
    from volvelle.decode.drafters.first_of import FirstOf
    from volvelle.decode.drafters.medusa import Medusa
    from volvelle.decode.drafters.mtp import MTP
    from volvelle.decode.drafters.ngram import NGram
    from volvelle.decode.drafters.opening import open_drafter
    from volvelle.decode.drafters.prompt_lookup import PromptLookup
    from volvelle.decode.generation import generate, generate_batch, stream
    from volvelle.decode.images import draw_images
    from volvelle.decode.options import Beams, Rules, Sampling
    from volvelle.decode.policy import Adaptive
    from volvelle.decode.request import Generation, Token

_HOME = {
    **dict.fromkeys(("Beams", "Rules", "Sampling"), "options"),
    "Exact": "accept_exact",
    "Typical": "accept_typical",
    "beam_search": "beam",
    **dict.fromkeys(("generate", "generate_batch", "stream"), "generation"),
    "MTP": "drafters.mtp",
    "Medusa": "drafters.medusa",
    "NGram": "drafters.ngram",
    "PromptLookup": "drafters.prompt_lookup",
    "draw_images": "images",
    "open_drafter": "drafters.opening",
    "Adaptive": "policy",
    **dict.fromkeys(("Draft", "Drafter", "Drafting"), "contract"),
    "DraftModel": "drafters.draft_model",
    "EarlyExit": "drafters.early_exit",
    "FirstOf": "drafters.first_of",
    **dict.fromkeys(("Generation", "Token"), "request"),
}

__all__ = [
    "MTP",
    "Adaptive",
    "Beams",
    "Draft",
    "DraftModel",
    "Drafter",
    "Drafting",
    "EarlyExit",
    "Exact",
    "FirstOf",
    "Generation",
    "Medusa",
    "NGram",
    "PromptLookup",
    "Rules",
    "Sampling",
    "Token",
    "Typical",
    "beam_search",
    "draw_images",
    "generate",
    "generate_batch",
    "open_drafter",
    "stream",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
