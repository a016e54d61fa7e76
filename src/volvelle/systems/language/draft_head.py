"""The vocabulary projection of drafts: the model's own, over all of its tokens or over a few thousand frequent ones.

At width 576 the projection onto 49,152 words is a fifth of the model, and a drafter pays for it at every token. Drafts
may leave words out: a word that is never drafted is only written by the model itself. vLLM calls such a list a
token_map.

Shapes: r tokens that can be drafted, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.parts.quantization.grid import Grid, dequantize_weight
from volvelle.parts.quantization.tiles import OUTPUTS
from volvelle.parts.quantization.weight_only import WeightOnlyLinear
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.native.step import MOST
from volvelle.systems.language.projections import apply_linear, few_rows


class DraftHead:
    """Maps states to logits (..., r) over the `tokens` (r,) int64 of the model, None: over all of them.

    The rows of the model's matrix are copied, in the bits in which it holds them; they are those of the moment. `rows`
    are copied ones (`DraftHeads`).

    >>> from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    >>> config = LanguageConfig("llama", 100, 48, 2, 4, context=64, norm=RMSNorm(), mlp=GatedMLP(96), position=Rope())
    >>> head = DraftHead(Decoder(config), torch.tensor([3, 7, 40]))
    >>> head.logits(torch.zeros(2, 48)).shape, head.words(torch.tensor([2, 0])), head.places(torch.tensor([7, 8]))
    (torch.Size([2, 3]), tensor([40,  3]), tensor([ 1, -1]))
    """

    def __init__(self, model: Decoder, tokens: Tensor | None = None, *, rows: nn.Module | None = None):
        self.model, self.rows = model, rows
        self.tokens = None if tokens is None else checked_tokens(tokens, model.config.vocabulary).to(model.device)
        self._place: Tensor | None = None
        if self.tokens is not None:
            self._place = torch.full((model.config.vocabulary,), -1, device=model.device)
            self._place[self.tokens] = torch.arange(len(self.tokens), device=model.device)
            self.rows = some_rows(model, self.tokens) if rows is None else rows
        self._few = None if self.rows is None else few_rows(self.rows)

    def logits(self, states: Tensor) -> Tensor:
        """States (..., width), as the model's own head reads them, to logits (..., r)."""
        if self.rows is not None and self._few is not None:
            seen = self.model.head_transform(states)
            few = (
                seen.dtype is self.model.dtype and seen.numel() <= MOST * seen.shape[-1] and not torch.is_grad_enabled()
            )
            return self._few(seen) if few else apply_linear(self.rows, seen)
        logits = self.model.logits(states)
        return logits if self.tokens is None else logits[..., self.tokens]

    @property
    def plain(self) -> Tensor | None:
        """The matrix (r, width) where logits are states @ its transpose and nothing more, else None."""
        model = self.model
        if not model.plain_head or type(model.lm_head) is not nn.Linear:
            return None
        return model.output_weight if self.rows is None else self.rows.get_parameter("weight")

    @property
    def size(self) -> int:
        """The number of tokens that can be drafted, r."""
        return self.model.config.vocabulary if self.tokens is None else len(self.tokens)

    def words(self, places: Tensor) -> Tensor:
        """The tokens that stand at these places of the logits."""
        return places if self.tokens is None else self.tokens[places]

    def places(self, words: Tensor, absent: int = -1) -> Tensor:
        """The places of tokens in the logits; `absent` for those that are not drafted, or are no tokens."""
        if self._place is None:
            return words
        found = self._place[words.clamp(min=0)]
        return torch.where((words < 0) | (found < 0), absent, found)

    def widened(self, logits: Tensor) -> Tensor:
        """Logits (..., r) as those of all tokens (..., v): -inf for the others."""
        if self.tokens is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.model.config.vocabulary), -math.inf)
        wide[..., self.tokens] = logits
        return wide


class DraftHeads:
    """The projections of one drafter: the copied rows are kept for each model, while its head is what it was."""

    def __init__(self, tokens: Tensor | None):
        self.tokens = tokens
        self._kept: WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], nn.Module | None]] = WeakKeyDictionary()

    def of(self, model: Decoder) -> DraftHead:
        """The projection for this model."""
        if self.tokens is None:
            return DraftHead(model)
        held = (*model.lm_head.parameters(), *model.lm_head.buffers())
        mark = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in held]
        known, rows = self._kept.get(model.lm_head, ([], None))
        made = DraftHead(model, self.tokens, rows=rows if known == mark else None)
        self._kept[model.lm_head] = mark, made.rows
        return made


def some_rows(model: Decoder, tokens: Tensor) -> nn.Module | None:
    """A linear layer of these rows of the model's head; None for a head with an adapter, which must be run as a whole.

    Quantised rows stay what they are; where they do not fill tiles, they are a plain layer of the model's dtype.
    """
    head: Any = model.lm_head
    if isinstance(head, WeightOnlyLinear):
        bias = None if head.bias is None else head.bias[tokens]
        codes, *steps = head.grid
        some = Grid(codes[tokens], *(None if step is None else step[:, tokens].contiguous() for step in steps))  # type: ignore[arg-type]
        if len(tokens) % OUTPUTS == 0:
            return type(head)(some, bias)
        return _linear(dequantize_weight(*some, model.dtype), bias)
    if type(head) is not nn.Linear:
        return None
    return _linear(head.weight.detach()[tokens], None if head.bias is None else head.bias.detach()[tokens])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def checked_tokens(tokens: Tensor, vocabulary: int) -> Tensor:
    """The list as int64. Raises VolvelleError where it is empty, repeats a token or names one that does not exist."""
    tokens = tokens.long()
    if tokens.ndim != 1 or not len(tokens) or len(tokens.unique()) < len(tokens):
        raise VolvelleError(f"draft vocabulary: wants different tokens in a row, got shape {tuple(tokens.shape)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise VolvelleError(f"draft vocabulary: names tokens outside the model's vocabulary of {vocabulary}")
    return tokens


def frequent_tokens(texts: Iterable[Tensor], vocabulary: int, count: int, always: Iterable[int] = ()) -> Tensor:
    """The `count` tokens that occur most often in the texts, in the order of their numbers; `always` are among them.

    Of equally frequent ones those with the smaller number are taken: tokenizers number by frequency.

    >>> frequent_tokens([torch.tensor([5, 5, 2]), torch.tensor([2, 5, 9])], 10, 3, always=[0])
    tensor([0, 2, 5])
    """
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(text.long(), minlength=vocabulary)
    counts[list(always)] = counts.sum() + 1
    order = counts.sort(descending=True, stable=True).indices
    return order[: min(count, vocabulary)].sort().values
