"""Rules on what an answer holds, as changes of the next token's scores; in the order of transformers' generate.

Shapes: v vocabulary. Forbidden tokens have the score -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from volvelle.decode.options import Rules


def constrain(
    scores: Tensor, prompt: Sequence[int], tokens: Sequence[int], rules: Rules, *, eos: Iterable[int], max_tokens: int
) -> Tensor:
    """Return the scores (v,), logits or log-probabilities, of the token after `tokens` as the rules leave them.

    >>> import torch
    >>> constrain(torch.ones(4), [0, 1, 2], [0, 1], Rules(no_repeat_ngram_size=3), eos=(), max_tokens=9)
    tensor([1., 1., -inf, 1.])
    """
    written = len(tokens)
    forced = rules.forced_first if written == 0 else None
    if written == max_tokens - 1 and rules.forced_last is not None:
        forced = rules.forced_last
    if forced is not None:
        only = scores.new_full(scores.shape, -math.inf)
        only[forced] = 0  # certain: it costs a beam nothing
        return only
    banned = set(eos) if written < rules.min_tokens else set()
    if rules.no_repeat_ngram_size:
        banned |= completions([*prompt, *tokens], rules.no_repeat_ngram_size)
    if not banned:
        return scores
    scores = scores.clone()
    scores[sorted(banned)] = -math.inf
    return scores


def is_empty(scores: Tensor) -> bool:
    """Whether no token is left in scores (v,)."""
    return float(scores.amax()) == -math.inf


def completions(tokens: Sequence[int], n: int) -> set[int]:
    """The tokens that would complete an n-gram which occurs among `tokens` already.

    >>> completions([1, 2, 3, 1, 2], 3), completions([1, 2], 1), completions([5], 2)
    ({3}, {1, 2}, set())
    """
    start = len(tokens) - (n - 1)
    ending = tokens[max(start, 0) :]
    return {tokens[i + n - 1] for i in range(max(start, 0)) if tokens[i : i + n - 1] == ending}
