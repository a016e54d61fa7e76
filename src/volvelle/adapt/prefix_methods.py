"""Prefix tuning and prompt tuning as frozen data. Importing this file does not import torch.

Both train what comes before the text and leave the model as it is: a prefix is keys and values for every layer (Li &
Liang 2021), a prompt is token embeddings (Lester et al. 2021), from which the model makes its own keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from volvelle.adapt.methods import Addition
from volvelle.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from volvelle.adapt.methods import AdapterLayer
    from volvelle.adapt.switch import Switch

Init = Literal["words", "random"]


@dataclass(frozen=True)
class PrefixTuning(Addition):
    """Prefix tuning (Li & Liang 2021): `length` trained keys and values before the text, in every layer.

    They come out of a smaller table through a network that is dropped after training (section 4.3), so that what is
    saved are length · layers · 2 · kv_heads · head_width numbers. With `init="words"` training begins at the
    activations of real words (section 7.4): those of `text`, else of words drawn from the vocabulary.

    >>> PrefixTuning(length=5).label
    'prefix tuning'
    """

    label = "prefix tuning"

    length: int = 10
    """Positions that come before the text; the paper's best for table-to-text was 10, for summaries 200."""
    hidden: int | None = 512
    """Width of the network's middle layer; None trains keys and values themselves."""
    width: int | None = None
    """Features of the table before the network; None: kv_heads · head_width, as in PEFT."""
    init: Init = "words"
    """words: begin at the activations of real words; random: as the paper's and PEFT's code."""
    text: str | None = None
    """The words to begin from, cut or repeated to the length; None: drawn from the vocabulary."""
    sites: tuple[Literal["decoder", "cross", "encoder"], ...] | None = None
    """Of an encoder-decoder: before the answer, before the source as it is looked at, as it is read; None: all."""

    def __post_init__(self) -> None:
        _check(self)

    def install(
        self, model: nn.Module, name: str, switch: Switch, generator: torch.Generator | None
    ) -> dict[str, AdapterLayer]:
        """Put a prefix before every text of the model."""
        from volvelle.adapt import prefix

        return prefix.install_prefix(model, self, name, switch, generator)


@dataclass(frozen=True)
class PromptTuning(Addition):
    """Prompt tuning (Lester et al. 2021): `length` trained token embeddings before the text.

    They begin as the embeddings of `text`, else of words drawn from the vocabulary (section 3.2), or at random.

    >>> PromptTuning(text="Describe the table in one sentence:").init
    'words'
    """

    label = "prompt tuning"
    learning_rate = 1e-2  # prompts bear and need the largest

    length: int = 20
    """Embeddings that come before the text; the paper's default was 100, 20 came close."""
    init: Init = "words"
    """words: begin at the embeddings of real words; random: at random ones."""
    text: str | None = None
    """The words to begin from, cut or repeated to the length; None: drawn from the vocabulary."""

    def __post_init__(self) -> None:
        _check(self)

    def install(
        self, model: nn.Module, name: str, switch: Switch, generator: torch.Generator | None
    ) -> dict[str, AdapterLayer]:
        """Put a prompt before every text of the model."""
        from volvelle.adapt import prefix

        return prefix.install_prompt(model, self, name, switch, generator)


def _check(method: PrefixTuning | PromptTuning) -> None:
    for name in ("length", "hidden", "width"):
        value = getattr(method, name, None)
        if value is not None and value < 1:
            raise UsageError(f"{method.label}: {name} must be at least 1, got {value}")
    if method.text is not None and (method.init != "words" or not method.text.strip()):
        raise UsageError(f"{method.label}: text={method.text!r} needs words in it and init=words")
