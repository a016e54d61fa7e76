"""Prompt lookup: draft what followed the last n tokens where they stood before, in the prompt, the answer, or a text.

Saxena 2023, "Prompt Lookup Decoding"; He et al. 2024, "REST", for texts that are given. No model drafts, so a draft
costs a few dictionary accesses. It pays where answers repeat: edits, quotations, code, data put into words.

Shapes: b rows, k drafted tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from volvelle.decode.contract import Draft, Drafter, Drafting, Seen
from volvelle.decode.drafters.fit import check_vocabulary
from volvelle.errors import UsageError
from volvelle.systems.language.encoder_decoder import Answering

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request

Prefer = Literal["recent", "frequent"]
_KEPT = 8  # different continuations of an n-gram that are remembered, the newest of them


class Index:
    """How every n-gram of a growing text went on, for all n from `least` to `n`.

    A new token costs one dictionary access for each n, and so does a lookup: neither depends on the length of the text.
    Of an n-gram the last few different next tokens are kept, each with its newest place and its count.

    >>> index = Index(n=2, least=1)
    >>> index.extend([1, 2, 3, 1, 2, 4, 1, 2])
    >>> [index.following(place, 3) for place in index.places(index.text)]
    [[4, 1, 2], [3, 1, 2]]
    """

    def __init__(self, n: int, least: int, prefer: Prefer = "recent"):
        self.text: list[int] = []
        self._sizes = range(n, least - 1, -1)
        self._prefer: Prefer = prefer
        self._begin = 0
        self.nexts: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}

    def extend(self, tokens: Iterable[int], *, apart: bool = False) -> None:
        """Append tokens; `apart` from what stands before them, as another text."""
        if apart:
            self._begin = len(self.text)
        for token in tokens:
            place = len(self.text)
            for gram in self._endings(self.text, place - self._begin):
                nexts = self.nexts.setdefault(gram, {})
                count = nexts.pop(token)[1] if token in nexts else 0
                nexts[token] = place, count + 1  # the newest stands last
                if len(nexts) > _KEPT:
                    del nexts[next(iter(nexts))]
            self.text.append(token)

    def places(self, tokens: Sequence[int]) -> Iterator[int]:
        """Places whose tokens differ and stood behind an ending of `tokens`, the best first.

        A longer ending comes before a shorter one; of one ending, the newest or the most frequent next token.
        """
        shown: set[int] = set()
        for gram in self._endings(tokens, len(tokens)):
            nexts = self.nexts.get(gram, {})
            order = list(reversed(nexts))
            if self._prefer == "frequent":
                order.sort(key=lambda token: -nexts[token][1])  # stable: the newer of equal ones stays first
            for token in order:
                if token not in shown:
                    shown.add(token)
                    yield nexts[token][0]

    def following(self, place: int, k: int) -> list[int]:
        """The k tokens from `place` on. A copy that reaches the end of the text goes on with what it has copied."""
        copied = self.text[place : place + k]
        period = len(self.text) - place
        while len(copied) < k:
            copied.append(copied[len(copied) - period])
        return copied

    def _endings(self, tokens: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
        """The last n tokens for every n, the longest first; `length` tokens belong together."""
        for size in self._sizes:
            if size <= length:
                yield tuple(tokens[len(tokens) - size :])


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """Draft up to `k` tokens that followed the longest ending, of `n` down to `least` tokens, that stood before.

    Looked up are the answer so far and the prompt (an encoder-decoder's source too), then `texts`, token ids that are
    indexed once. Where an ending went on differently, `prefer` says which continuation comes first, the newest or the
    most frequent one; up to `branches` of them are drafted side by side.

    >>> PromptLookup(n=3, k=8).branches
    1
    """

    n: int = 3
    k: int = 15
    least: int = 1
    prefer: Prefer = "recent"
    branches: int = 1
    texts: Sequence[Sequence[int]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < 1:
            raise UsageError(f"lookup: n and k must be at least 1, got n={self.n}, k={self.k}")
        if not 1 <= self.least <= self.n:
            raise UsageError(f"lookup: least must be from 1 to n = {self.n}, got {self.least}")
        if not 1 <= self.branches <= self.k:
            raise UsageError(f"lookup: branches must be from 1 to k = {self.k}, got {self.branches}")
        if self.prefer not in ("recent", "frequent"):
            raise UsageError(f"lookup: prefer must be recent or frequent, got {self.prefer!r}")

    @functools.cached_property
    def stored(self) -> Index:
        """The index of the given texts."""
        index = self.index()
        for text in self.texts:
            index.extend(map(int, text), apart=True)
        return index

    def index(self) -> Index:
        """An empty index with these options."""
        return Index(self.n, self.least, self.prefer)

    @functools.cached_property
    def largest(self) -> int:
        """The largest token of the given texts, -1 when there are none."""
        return max(self.stored.text, default=-1)

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> LookupDrafting:
        """Index the prompts of a run; raises VolvelleError where the texts are not of the model's vocabulary."""
        model = writer.model if isinstance(writer, Answering) else writer
        check_vocabulary("lookup", self.largest, model.config.vocabulary)
        return LookupDrafting(self, requests, writer.device)


class LookupDrafting(Drafting):
    """The lookups of one run: an index for each row, which grows with its answer."""

    def __init__(self, options: PromptLookup, requests: Sequence[Request], device: torch.device):
        self.width, self.options, self.device = options.k, options, device
        self.own = [self._begun(request) for request in requests]
        self.known = [0] * len(requests)

    def join(self, row: int, request: Request) -> None:
        """Index another prompt."""
        self.own[row], self.known[row] = self._begun(request), 0

    def _begun(self, request: Request) -> Index:
        index = self.options.index()
        index.extend(request.source or ())
        index.extend(request.prompt, apart=True)
        return index

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """Look up every unfinished row; None where no row finds anything.

        All rows share one tree; where a row found less, its places are empty (-1).
        """
        k = min(k, self.width)
        if k < 1:
            return None
        found = [[] if request.finish else self._places(row, request, k) for row, request in enumerate(requests)]
        lengths = shares(k, max(map(len, found), default=0))
        if not lengths:
            return None
        tokens = []
        for places in found:
            chains = [index.following(place, length) for (index, place), length in zip(places, lengths, strict=False)]
            drafted = [token for one in chains for token in one]
            tokens.append(drafted + [-1] * (k - len(drafted)))
        return Draft(torch.tensor(tokens, device=self.device), side_by_side(lengths) if len(lengths) > 1 else None)

    def _places(self, row: int, request: Request, k: int) -> list[tuple[Index, int]]:
        """Where to copy from: up to `branches` places whose first tokens differ, the best one first."""
        own = self.own[row]
        own.extend(request.tokens[self.known[row] :])
        self.known[row] = len(request.tokens)
        found: dict[int, tuple[Index, int]] = {}
        for index in (own, self.options.stored):
            for place in index.places(own.text):
                if len(found) == min(self.options.branches, k):
                    break
                found.setdefault(index.text[place], (index, place))
        return list(found.values())


def shares(k: int, branches: int) -> list[int]:
    """Split k tokens among chains: the first gets what the others leave, each of which gets k // (branches + 1).

    >>> shares(10, 1), shares(10, 2), shares(3, 3), shares(5, 0)
    ([10], [7, 3], [1, 1, 1], [])
    """
    if branches == 0:
        return []
    side = max(1, k // (branches + 1))
    return [k - side * (branches - 1)] + [side] * (branches - 1)


def side_by_side(lengths: Sequence[int]) -> list[int]:
    """The parents of chains that all begin behind the newest token.

    >>> side_by_side([3, 2])
    [-1, 0, 1, -1, 3]
    """
    parents: list[int] = []
    for length in lengths:
        parents += [-1, *range(len(parents), len(parents) + length - 1)]
    return parents
