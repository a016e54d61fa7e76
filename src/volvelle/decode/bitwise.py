"""Lossless to the bit: plain and drafted decoding through the same arithmetic, so that equal is equal in any dtype.

Sums of floating-point numbers depend on their order, and kernels choose the order by the number of tokens in a step: a
token scored among four others may differ in its last bits from the same token scored alone, and where two words are
almost equally likely the answer flips. Two ways keep one order:

- The compiled step (systems/language/native) sums every row in one order, at any width: nothing is to be done.
- Elsewhere every step is padded to one width and sees all slots of the cache, hidden where nothing is yet: at one fixed
  shape a row's numbers depend neither on the other rows nor on its own place among them. It costs what a step of so
  many tokens costs more than a step of one.

Both need each token in its final slot. So of a drafted tree, whose accepted path lies in scattered slots, only the
first path is checked (`Help.straight`), and texts are decoded one at a time (rows of a batch leave holes in others').
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from volvelle.decode.loop import Read, read_once, step
from volvelle.errors import UsageError, VolvelleError
from volvelle.parts.attention.cache import Cache, KVCache
from volvelle.parts.attention.seat_cache import SeatCache
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.native.step import MOST

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request
    from volvelle.systems.language.models import LanguageModel

WIDTH = 16
"""Tokens of a padded step: drafts of up to 15. Wider costs more; of a longer draft the first 15 are checked."""


def bitwise(
    model: LanguageModel, requests: Sequence[Request], *, width: int = WIDTH
) -> tuple[AnyWidth | FixedWidth, int]:
    """How the steps of a run are computed so that drafts change no bit: `forward` and `spare` of `loop.run`.

    Raises UsageError for more than one text, and VolvelleError where the padded steps do not fit into the context.
    """
    if len(requests) != 1:
        raise UsageError(
            f"exact=bitwise decodes one text at a time, got {len(requests)}",
            tip="rows of a batch leave holes in each other's slots; call generate for each",
        )
    if is_any_width(model):
        return AnyWidth(), 0
    [request] = requests
    reach = len(request.prompt) + request.max_tokens + width
    if reach > model.room:
        raise VolvelleError(
            f"exact=bitwise pads steps to {width} tokens: prompt and answer may take {model.room - width} of the "
            f"context of {model.room}, they take {reach - width}",
            tip=_what_fits(model.room - width, len(request.prompt), request.max_tokens),
        )
    return FixedWidth(width, reach + model.ahead), width


def _what_fits(room: int, prompt: int, max_tokens: int) -> str:
    """What to change so that prompt and answer fit into `room` tokens."""
    if prompt < room:
        return f"max_tokens={room - prompt}"
    if max_tokens < room:
        return f"shorten the prompt to {room - max_tokens} tokens"
    return f"shorten the prompt to {room - 1} tokens, and max_tokens to 1" if room > 1 else "leave exact=bitwise out"


def is_any_width(model: LanguageModel) -> bool:
    """Whether steps are computed by compiled code, so that equal answers cost nothing; asked once they are fused."""
    straight = model.model.straight if isinstance(model, Decoder) else None
    return straight is not None and straight.whole is not None and straight.head is not None


class AnyWidth:
    """Steps of the compiled code, whose numbers do not depend on their width."""

    most = MOST
    """Tokens of a step."""

    def __call__(
        self, writer: Writer, cache: Cache, ids: Tensor, mask: Tensor | None, n: int, read: Read = read_once
    ) -> tuple[Tensor, Tensor]:
        """See `loop.Forward`."""
        _check(cache, mask, n, MOST)
        return step(writer, cache, ids, mask, n, read)


class FixedWidth:
    """Steps padded to `width` tokens over a cache that shows `reach` slots; a prompt is taken as it is."""

    def __init__(self, width: int, reach: int):
        self.width, self.reach = width, reach
        self.most = width

    def __call__(
        self, writer: Writer, cache: Cache, ids: Tensor, mask: Tensor | None, n: int, read: Read = read_once
    ) -> tuple[Tensor, Tensor]:
        """See `loop.Forward`."""
        cache, real = _check(cache, mask, n, self.width), ids.shape[1]
        cache.reach = self.reach
        if real > self.width:  # the prompt
            return step(writer, cache, ids, mask, n, read)
        logits, states = step(writer, cache, F.pad(ids, (0, self.width - real)), None, self.width, read)
        cache.trim(real)
        return logits[:, real - n : real], states[:, :real]


def in_order(cache: Cache) -> KVCache | SeatCache:
    """The cache, as one whose sums can be kept in one order; raises VolvelleError where it is none."""
    if not isinstance(cache, KVCache | SeatCache):
        raise VolvelleError("exact=bitwise needs softmax attention: a state of sums has no slots to keep in order")
    return cache


def _check(cache: Cache, mask: Tensor | None, n: int, width: int) -> KVCache | SeatCache:
    cache = in_order(cache)
    if mask is not None and mask.dim() == 3:
        raise VolvelleError(
            "exact=bitwise takes chains, and this drafter drafts trees",
            tip="the accepted path of a tree lies in scattered slots; draft with a chain",
        )
    if n > width:
        raise VolvelleError(f"exact=bitwise takes steps of {width} tokens, this draft makes one of {n}")
    return cache
