"""Drafting with a smaller model, token by token over a cache of its own.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1; Chen et al. 2023,
"Accelerating Large Language Model Decoding with Speculative Sampling".

Shapes: b rows, k drafted tokens, m tokens that the cache lacks, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volvelle.decode.contract import Draft, Drafter, Drafting, Seen
from volvelle.decode.loop import reader
from volvelle.decode.request import Request, distributions
from volvelle.decode.sampling import guess_rows
from volvelle.decode.speculation import emptied, slack, together
from volvelle.errors import UsageError, VolvelleError
from volvelle.systems.language.encoder_decoder import Answering, EncoderDecoder
from volvelle.systems.language.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.parts.attention.cache import Cache
    from volvelle.systems.language.models import LanguageModel


class DraftModel(Drafter):
    """A drafter that asks `model`, smaller than the target and with the same tokens, for up to `k` tokens at a time.

    It draws as each request does (temperature, top-p, penalties and rules), so the exact rule can set its
    distribution against the target's. For an encoder-decoder it may be one too: it then reads the sources itself.
    """

    def __init__(self, model: LanguageModel, k: int = 4):
        self.model, self.k = model, at_least_one(k)
        self._agreed: WeakSet[TextTokenizer] = WeakSet()

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The draft model."""
        return (self.model,)

    @property
    def draws(self) -> bool:
        """True: as each request does."""
        return True

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> Drafting:
        """Read the sources, and make a cache. Raises VolvelleError on another vocabulary."""
        target = target_of(writer)
        self._check(target)
        if isinstance(self.model, EncoderDecoder) and not isinstance(target, EncoderDecoder):
            raise VolvelleError(
                "an encoder-decoder cannot draft for a decoder: there is no source to read",
                tip="use a smaller decoder",
            )
        own = reader(self.model, requests)
        return ModelDrafting(own, self.model, requests, self.k, room, target.config.vocabulary)

    def _check(self, target: LanguageModel) -> None:
        ours, theirs = self.model.tokenizer, target.tokenizer
        if not (isinstance(ours, TextTokenizer) and isinstance(theirs, TextTokenizer)):
            if self.model.config.vocabulary != target.config.vocabulary:
                raise _other(f"it has {self.model.config.vocabulary} tokens, the target {target.config.vocabulary}")
        elif ours is not theirs and theirs not in self._agreed:
            check_tokens(ours, theirs)
            self._agreed.add(theirs)


class Runs(Protocol):
    """What drafts are made with: a writer, or a part of one."""

    def new_cache(self, batch: int, context: int) -> Cache:
        """Allocate a cache."""
        ...

    def hidden(self, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Run over tokens (b, n) behind those of the cache: the final states (b, n, width)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final states (..., width) -> logits (..., v)."""
        ...


class ModelDrafting(Drafting):
    """One run of a model that drafts chains: what it has read of each row, in its cache.

    `own` runs `model` or a part of it; `width` is the most tokens of a draft, `room` of a text, `vocabulary` the
    target's v.
    """

    def __init__(
        self, own: Runs, model: LanguageModel, requests: Sequence[Request], width: int, room: int, vocabulary: int
    ):
        self.own, self.model, self.width, self._vocabulary = own, model, width, vocabulary
        b, room = len(requests), min(room, model.room)
        # Rows catch up side by side, so one that gained less leaves holes until the texts are moved together.
        slots = room + 1 + width + (width + slack(room) if b > 1 else 0)
        self.cache, self._slots = own.new_cache(b, slots), model.ahead + slots
        self._behind: list[Seen] = []  # what the cache lacks
        self._forgotten: set[int] = set()
        self._has_newest = False

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """Catch up in one forward, whose last token gives the first draft; then a forward a token."""
        self._behind.append(seen)
        live = [row for row, request in enumerate(requests) if request.finish is None]
        longest = max(requests[row].length for row in live)
        k = min(k, self.model.room - longest + 1)
        if k < 1:
            return None
        state = self._catch_up(requests, live, longest)
        snapshot = self.cache.snapshot()
        drafted: list[list[int]] = [[] for _ in requests]
        tokens, q = [], []
        try:
            for place in range(k):
                token, distribution = self._choose(self._logits(state), requests, live, drafted)
                tokens.append(token)
                q.append(distribution)
                if place + 1 < k:
                    for row, one in enumerate(token.tolist()):
                        drafted[row].append(one)
                    state = self.own.hidden(self._known(token[:, None]), cache=self.cache)
                    self.cache.commit()
        finally:
            self.cache.restore(snapshot)
        together_q = None if q[0] is None else torch.stack([one for one in q if one is not None], 1)
        return Draft(self._only(torch.stack(tokens, 1), live), None, together_q)

    def join(self, row: int, request: Request) -> None:
        """Empty the row; a model that reads sources cannot."""
        if request.source is not None:
            super().join(row, request)
        self.cache.forget(torch.tensor([row], device=self.model.device))
        self._forgotten.discard(row)
        self._behind = [emptied(seen, row) for seen in self._behind]

    def _catch_up(self, requests: Sequence[Request], live: list[int], longest: int) -> Tensor:
        """Read what the cache lacks and the newest tokens; returns the states (b, 1, width) of the latter."""
        ids, _, mask = together(self._behind, requests)
        first = 1 if self._has_newest else 0
        newest = torch.tensor([[request.last] for request in requests], device=ids.device)
        ids = torch.cat((ids[:, first:], newest), 1)
        if mask is not None or len(live) < len(requests):
            now = torch.zeros_like(newest, dtype=torch.bool)
            now[live] = True
            mask = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, first:]
            ids, mask = packed(ids, torch.cat((mask & now, now), 1))
        self._behind, self._has_newest = [], True
        self._tidy(requests, longest, ids.shape[1])
        while True:
            # One row may have much in the cache and another much to read: side by side that is more than there is room.
            free = self._slots - self.cache.length - self.width
            part, real = ids[:, :free], None if mask is None else mask[:, :free]
            state = self.own.hidden(self._known(part), mask=real, cache=self.cache)
            self.cache.commit(None if real is None else side_by_side(real))
            ids, mask = ids[:, free:], None if mask is None else mask[:, free:]
            if not ids.shape[1]:
                return state[:, -1:]
            self.cache.compact()

    def _tidy(self, requests: Sequence[Request], longest: int, new: int) -> None:
        """Free the slots of finished rows, and move the others together where holes are many; `new` slots follow."""
        finished = [row for row, request in enumerate(requests) if request.finish and row not in self._forgotten]
        if finished:
            self._forgotten.update(finished)
            self.cache.forget(torch.tensor(finished, device=self.model.device))
        if self.cache.length + new > self.model.ahead + longest + slack(longest) + self.width:
            self.cache.compact()

    def _choose(
        self, logits: Tensor, requests: Sequence[Request], live: list[int], drafted: list[list[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """The next token (b,) of every row from logits (b, v), and what it was drawn from (b, v)."""
        if all(requests[row].all_argmax(1 + len(drafted[row])) for row in live):
            return logits.argmax(-1), None
        some = [requests[row] for row in live]
        p = distributions(some, logits[live], [drafted[row] for row in live])
        # A row takes numbers only for tokens it may still write: they do not depend on the other rows.
        uniforms = [r.uniform() if len(drafted[row]) < r.left - 1 else 0.5 for row, r in zip(live, some, strict=True)]
        token = torch.zeros(len(requests), dtype=torch.long, device=logits.device)
        token[live] = guess_rows(p, torch.tensor(uniforms, dtype=torch.float64))
        if all(request.sampling.greedy for request in some):
            return token, None
        if len(live) == len(requests):
            return token, p
        return token, torch.zeros(logits.shape, device=logits.device, dtype=p.dtype).index_copy(
            0, torch.tensor(live, device=logits.device), p
        )

    def _logits(self, state: Tensor) -> Tensor:
        """Logits (b, v) over the target's vocabulary, whose tokens beyond the draft model's own have none."""
        logits = self.own.logits(state)[:, -1]
        missing = self._vocabulary - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def _known(self, ids: Tensor) -> Tensor:
        """The tokens, with another in place of those that the draft model has no embedding for."""
        own = self.model.config.vocabulary
        return ids.clamp(max=own - 1) if own < self._vocabulary else ids

    def _only(self, tokens: Tensor, live: list[int]) -> Tensor:
        """The tokens (b, k) of unfinished rows, -1 in the others."""
        if len(live) == len(tokens):
            return tokens
        finished = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        finished[live] = False
        return tokens.masked_fill(finished, -1)


def target_of(writer: Writer) -> LanguageModel:
    """The model that writes."""
    return writer.model if isinstance(writer, Answering) else writer


def packed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of ids (b, n), those that `mask` marks, at the end of each row, in as few columns as they need.

    >>> packed(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[True, False, True], [False, False, True]]))
    (tensor([[1, 3],
            [5, 6]]), tensor([[ True,  True],
            [False,  True]]))
    """
    order = mask.to(torch.uint8).sort(dim=1, stable=True).indices[:, mask.shape[1] - int(mask.sum(1).max()) :]
    return ids.gather(1, order), mask.gather(1, order)


def side_by_side(mask: Tensor) -> Tensor:
    """The path (b, m) that keeps a step's real tokens, those that mask (b, n) marks, without the gaps between them.

    >>> side_by_side(torch.tensor([[False, True, True], [True, False, False]]))
    tensor([[ 1,  2],
            [ 0, -1]])
    """
    order = mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
    return torch.where(mask.gather(1, order), order, -1)[:, : int(mask.sum(1).max())]


def check_tokens(draft: TextTokenizer, target: TextTokenizer) -> None:
    """Raise VolvelleError where an id stands for different tokens; one may know tokens beyond the other's."""
    ours, theirs = (tokenizer.tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (draft, target))
    few, many = sorted((ours, theirs), key=len)
    wrong = next((token for token, i in few.items() if many.get(token) != i), None)
    if wrong is not None:
        raise _other(f"token {wrong!r} is number {ours.get(wrong)} there, {theirs.get(wrong)} in the target")


def at_least_one(k: int) -> int:
    """The number of tokens to draft, checked."""
    if k < 1:
        raise UsageError(f"a drafter drafts at least 1 token, got k={k}")
    return k


def _other(why: str) -> VolvelleError:
    return VolvelleError(
        f"the draft model has another vocabulary: {why}", tip="a draft model needs the target's tokenizer"
    )
