"""Drafting with some of the target's own layers: the first ones, or all but some, with its last norm and its head.

Zhang et al. 2024, "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding" (layers
left out); Elhoushi et al. 2024, "LayerSkip" (the first layers only). No weight is copied, so whatever the target is,
quantized, adapted or with a prefix before its texts, the draft is too; only the cache is its own.

Shapes: b rows, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from volvelle.decode.contract import Drafter, Drafting
from volvelle.decode.drafters.draft_model import ModelDrafting, at_least_one, target_of
from volvelle.errors import UsageError
from volvelle.parts.attention.before import Before
from volvelle.parts.attention.cache import Cache, KVCache
from volvelle.systems.language.config import LanguageConfig, LinearAttention
from volvelle.systems.language.encoder_decoder import Answering
from volvelle.systems.language.projections import Straight

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request
    from volvelle.systems.language.components import Step
    from volvelle.systems.language.models import LanguageModel


class EarlyExit(Drafter):
    """A drafter that runs only `layers` of the target: their number, counted from the first, or which ones.

    It asks for up to `k` tokens at a time, as `DraftModel` does. Of an encoder-decoder it runs layers of the decoder.
    """

    def __init__(self, layers: int | Sequence[int], k: int = 4):
        self.layers = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
        self.k = at_least_one(k)
        if not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"early exit: layers must be one or more rising numbers from 0 on, got {layers}")

    @property
    def draws(self) -> bool:
        """True: as each request does."""
        return True

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> Drafting:
        """Make a cache for these layers; raises UsageError where the target has too few."""
        target = target_of(writer)
        depth = len(writer.model.model.decoder.layers) if isinstance(writer, Answering) else len(writer.model.layers)
        if self.layers[-1] >= depth or len(self.layers) == depth:
            raise UsageError(f"early exit: layers {list(self.layers)} are not a part of the target's 0 to {depth - 1}")
        if linear(target) and self.layers[-1] >= len(self.layers):
            raise UsageError("early exit: of a decoder with linear attention only the last layers can be left out")
        part = Part(writer, self.layers)
        return ModelDrafting(part, target, requests, self.k, room, target.config.vocabulary)


class Part:
    """Some layers of what writes, in its place: they go on with texts as all of them do, over a cache for them."""

    def __init__(self, writer: Writer, layers: Sequence[int]):
        self.writer, self.model, self.layers = writer, target_of(writer), tuple(layers)
        self._part: tuple[Straight, Straight] | None = None  # the whole fast path, and what is taken of it

    def new_cache(self, batch: int, context: int) -> Cache:
        """A cache of these layers for `batch` rows of up to `context` tokens; what comes before them is there."""
        model = self.model
        cache = model.new_cache(batch, model.ahead + context, blocks=len(self.layers))
        before = None if model.before is None else model.before(model, batch, "decoder")
        if before is not None:
            assert isinstance(cache, KVCache)
            Before(before.states[list(self.layers)], before.present).fill(cache)
        return cache

    def hidden(self, ids: Tensor, *, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The final states (b, n, width) of `ids` (b, n), were there only these layers; see `Decoder.hidden`."""
        if isinstance(self.writer, Answering):
            side, source = self.writer.model.model.decoder, self.writer.source
            x, step = self.writer.model.begin(ids, source, mask=mask, cache=cache)
            step = self._with_slots(step)
            for layer in self.layers:
                x = side.layers[layer](x, step, source)
            return x
        trunk = self.writer.model
        x, step = self.writer.begin(ids, mask=mask, cache=cache)
        part = self._prepared(trunk.prepared(x))
        if part is not None and part.whole is not None and part.whole.takes(x, step):
            return trunk.norm(part.whole(x, step))
        step = self._with_slots(step)
        if part is not None:
            return trunk.norm(part(x, step))
        for layer in self.layers:
            x = trunk.layers[layer](x, step)
        return trunk.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final states (..., width) -> logits (..., v)."""
        return self.writer.logits(hidden)

    def _prepared(self, straight: Straight | None) -> Straight | None:
        """These layers of the fast path through all of them, while that is there."""
        if straight is None:
            self._part = None
        elif self._part is None or self._part[0] is not straight:
            runs = [straight.runs[layer] for layer in self.layers]
            part = Straight(runs, straight.watch, straight.sizes, straight.groups)
            part.whole = None if straight.whole is None else straight.whole.some(self.layers)
            self._part = straight, part
        return None if self._part is None else self._part[1]

    def _with_slots(self, step: Step) -> Step:
        if self.layers == tuple(range(len(self.layers))):
            return step
        return step._replace(cache=cast("Any", Slots(step.cache, self.layers)))


def linear(model: LanguageModel) -> bool:
    """Whether the layers attend linearly."""
    return isinstance(model.config, LanguageConfig) and isinstance(model.config.attention, LinearAttention)


class Slots:
    """A cache of some layers, asked by the numbers that they have in the whole model."""

    def __init__(self, cache: Any, layers: Sequence[int]):
        self._cache, self._slots = cache, {layer: slot for slot, layer in enumerate(layers)}

    @property
    def length(self) -> int:
        """The number of slots in use."""
        return self._cache.length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache.append`."""
        return self._cache.append(self._slots[layer], k, v)


def without(depth: int, n: int) -> list[int]:
    """The layers left of `depth` when `n` are left out, evenly from those between the first and the last.

    >>> without(8, 3)
    [0, 1, 3, 5, 7]
    """
    if not 0 < n <= depth - 2:
        raise UsageError(f"early exit: leaving out {n} of {depth} layers leaves no layer besides the first and last")
    left_out = {1 + ((2 * i + 1) * (depth - 2)) // (2 * n) for i in range(n)}
    return [layer for layer in range(depth) if layer not in left_out]
