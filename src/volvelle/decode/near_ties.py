"""Near ties: the greedy choices that rounding alone could turn.

A matrix product over several tokens sums in another order than one over a single token, so logits differ in their last
bits between a step with a draft and one without. Where the best token is ahead by less than that, the answer may leave
the one of plain decoding, and is then as good.

In the compiled step the width changes nothing; but where a path of a tree stands scattered among other branches, the
gaps between its slots turn last bits all the same (`scattered_error`).

Shapes: b rows, r choices, v vocabulary.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_MEASURED: WeakKeyDictionary[nn.Module, dict[Any, float]] = WeakKeyDictionary()
"""The width error of every model that has been asked, by its dtype and the way a step is computed."""


def known_error(model: nn.Module, kind: Any) -> float | None:
    """What was measured for this model before; None: nothing."""
    return _MEASURED.get(model, {}).get(kind)


def measure_error(model: nn.Module, kind: Any, alone: Tensor, beside: Tensor) -> float:
    """The width error, of logits (b, v) of the same tokens run alone and beside others; it is remembered.

    It is the most that the difference of two tokens' logits changes. That is one step's share: keys and values in the
    cache differ as well once drafts were accepted, so it says how large such changes are, and is no bound.
    """
    change = beside.float() - alone.float()
    never = change.isnan()  # tokens that are never written have -inf on both sides
    error = float((change.masked_fill(never, -math.inf).amax(-1) - change.masked_fill(never, math.inf).amin(-1)).max())
    _MEASURED.setdefault(model, {})[kind] = error
    return error


def scattered_error(dtype: torch.dtype) -> float:
    """What gaps in a tree change, as a share of the best logit: 16 last places, in 16 bits one, for sums are in fp32.

    Of random decoders of up to six layers the compiled step changed 8 last places in fp32 and none in bf16.
    """
    eps = torch.finfo(dtype).eps
    return eps if dtype.itemsize == 2 else 16 * eps


def is_near(scores: Tensor, error: float, share: float = 0.0) -> Tensor:
    """Whether the best of scores (r, v) is ahead of the next by less than `error`, or `share` of itself: (r,) bool.

    >>> is_near(torch.tensor([[3.0, 1.0, 2.95], [3.0, 1.0, 2.0]]), 0.1)
    tensor([ True, False])
    """
    # in 16 bits the difference would be rounded away
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    best = scores.amax(-1, keepdim=True)
    return (scores > best - (best.abs() * share).clamp(min=error)).count_nonzero(-1) > 1
