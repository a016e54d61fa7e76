"""Parameter-efficient fine-tuning on any nn.Module: `apply` a method, `merge`, `save` and `load` in PEFT's file format.

Names are resolved on first use, so importing the torch-free `volvelle.adapt.methods` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from volvelle.lazy import lazy

if TYPE_CHECKING:
    from volvelle.adapt.extract import extract_lora
    from volvelle.adapt.files import load, save
    from volvelle.adapt.methods import Bottleneck, DoRA, Full, LoRA
    from volvelle.adapt.model import Adapted, activate, adapted, apply, disabled, merge, remove, unmerge, using
    from volvelle.adapt.prefix_methods import PrefixTuning, PromptTuning
    from volvelle.adapt.run import load_run

_HOME = {
    **dict.fromkeys(("Bottleneck", "DoRA", "Full", "LoRA"), "methods"),
    **dict.fromkeys(
        ("Adapted", "activate", "adapted", "apply", "disabled", "merge", "remove", "unmerge", "using"), "model"
    ),
    **dict.fromkeys(("load", "save"), "files"),
    "extract_lora": "extract",
    **dict.fromkeys(("PrefixTuning", "PromptTuning"), "prefix_methods"),
    "load_run": "run",
}

__all__ = [
    "Adapted",
    "Bottleneck",
    "DoRA",
    "Full",
    "LoRA",
    "PrefixTuning",
    "PromptTuning",
    "activate",
    "adapted",
    "apply",
    "disabled",
    "extract_lora",
    "load",
    "load_run",
    "merge",
    "remove",
    "save",
    "unmerge",
    "using",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
