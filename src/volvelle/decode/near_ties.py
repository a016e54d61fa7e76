"""Near ties: the greedy choices that rounding alone could turn.

A matrix product over several tokens sums in another order than one over a single token, so logits differ in their last
bits between a step with a draft and one without. Where the best token is ahead by less than that, the answer may leave
the one of plain decoding, and is then as good.

Shapes: b rows, t tokens of a probe, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from volvelle.decode.contract import Writer
    from volvelle.decode.request import Request
    from volvelle.parts.attention.cache import Cache
    from volvelle.systems.language.models import LanguageModel

PROBE = 16
_MEASURED: WeakKeyDictionary[Any, dict[Any, float]] = WeakKeyDictionary()

Step = Callable[["Writer", "Cache", Tensor, "Tensor | None", int], tuple[Tensor, Tensor]]


def width_error(model: LanguageModel, writer: Writer, requests: Sequence[Request], forward: Step) -> float:
    """The most that the difference of two logits changes when tokens are run side by side rather than one by one.

    Measured on the newest tokens of the requests' texts, once for a model, its dtype and the way a step is computed;
    it takes half as many plain steps as the probe has tokens.
    """
    known = _MEASURED.setdefault(model, {})
    key = model.dtype, forward
    if key not in known:
        texts = [[*request.prompt, *request.tokens] for request in requests]
        size = min(PROBE, model.room)
        ids = torch.tensor([(text * size)[-size:] for text in texts], device=model.device)
        known[key] = change(writer, ids, forward)
    return known[key]


def change(writer: Writer, ids: Tensor, forward: Step) -> float:
    """The change over the second half of ids (b, t): run as one block, and token by token, behind the first half."""
    b, t = ids.shape
    half, found = t // 2, []
    for width in (t - half, 1):
        cache, logits = writer.new_cache(b, t + PROBE), []
        parts = (ids[:, :half], *ids[:, half:].split(width, 1)) if half else ids.split(width, 1)
        for part in parts:
            logits.append(forward(writer, cache, part, None, part.shape[1])[0].float())
            cache.commit()
        found.append(torch.cat(logits[1 if half else 0 :], 1))
    difference = found[0] - found[1]
    return float((difference.amax(-1) - difference.amin(-1)).max())


def is_near(scores: Tensor, error: float) -> Tensor:
    """Whether the best of scores (r, v) is ahead of the next by less than `error`: (r,) bool.

    >>> is_near(torch.tensor([[3.0, 1.0, 2.95], [3.0, 1.0, 2.0]]), 0.1)
    tensor([ True, False])
    """
    return (scores > scores.amax(-1, keepdim=True) - error).count_nonzero(-1) > 1
