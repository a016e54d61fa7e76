"""What every language model has: embeddings, a head, and a slot for what comes before every text.

The slot holds the keys and values of prefix and prompt tuning.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from volvelle.parts.attention.before import Before
from volvelle.parts.attention.cache import Cache, KVCache

Site = Literal["decoder", "cross", "encoder"]
"""Which attention the keys are for: a decoder's to its own text, its look at the source, or an encoder's."""


class Preface(Protocol):
    """Gives the keys and values that come before every text: the Module in a model's slot `before`."""

    @property
    def length(self) -> int:
        """The number of keys before a decoder's text now, holes included."""
        ...

    @property
    def lengths(self) -> int | list[int]:
        """The number of keys of all rows, or of each row."""
        ...

    def __call__(self, model: nn.Module, batch: int, site: Site = "decoder") -> Before | None:
        """Return them as they are now, with their gradients; None where nothing comes before."""
        ...


class Prefaced(nn.Module):
    """A model with the slot: `before` is None until a prefix or a prompt is put there.

    Its classes set `config` and `lm_head` and say what their `embeddings` are. With `gradient_checkpointing` each block
    is computed again in the backward pass instead of keeping its activations.
    """

    before: Preface | None
    config: Any
    lm_head: nn.Linear

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False
        self.register_module("before", None)

    @property
    def embeddings(self) -> nn.Embedding:
        """The vectors of the words."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie."""
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The embeddings' dtype."""
        return self.embeddings.weight.dtype

    @property
    def output_weight(self) -> Tensor:
        """The (vocabulary, width) matrix of the head, for losses over chunks of the vocabulary.

        Logits are hidden @ output_weight.T only where nothing else is done to them (`plain_head`).
        """
        return self.lm_head.weight

    @property
    def room(self) -> int:
        """The longest text (or source, or answer with its start) in tokens: the context but for what comes before."""
        return self.config.context - self.ahead

    def tie(self) -> None:
        """Make the output weights those of the token embeddings, where the configuration says so."""
        if self.config.head.tied:
            self.lm_head.weight = self.embeddings.weight

    def run(self, layer: nn.Module, *inputs: Any) -> Any:
        """Return layer(*inputs), computed again in the backward pass with `gradient_checkpointing`."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)

    @property
    def ahead(self) -> int:
        """The number of keys that come before every text now: 0 without a preface."""
        return 0 if self.before is None else self.before.length

    def _before(self, batch: int, site: Site) -> Before | None:
        return None if self.before is None else self.before(self, batch, site)

    def _past(self, cache: Cache | None, batch: int) -> Any:
        """What lies before the new tokens: the cache, which gets what comes before a text with its first step."""
        if cache is not None and cache.length:
            return cache
        before = self._before(batch, "decoder")
        if cache is None:
            return before
        if before is not None:
            assert isinstance(cache, KVCache)
            before.fill(cache)
        return cache

    def _moved(self, positions: Tensor) -> Tensor:
        """Positions of the text, moved behind what comes before it."""
        lengths = 0 if self.before is None else self.before.lengths
        if isinstance(lengths, int):
            return positions + lengths if lengths else positions
        return positions + torch.tensor(lengths, device=positions.device)[:, None]
