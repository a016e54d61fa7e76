"""From logits to the next token: free functions, applied in the order of transformers' generate.

Shapes: v vocabulary; logits (..., v). Removed tokens have the logit -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from volvelle.decode.options import Sampling
from volvelle.errors import VolvelleError

_NUCLEUS = 1024  # top-p first looks among this many tokens; sorting 50,000 costs more than all other rules together


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by `penalty`, multiply negative ones: seen (..., v) bool.

    Keskar et al. 2019, "CTRL", section 4.1.

    >>> penalise_repetition(torch.tensor([2.0, -2.0, 1.0]), torch.tensor([True, True, False]), 2.0)
    tensor([ 1., -4.,  1.])
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalise_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Take `presence` off the logits of tokens that occurred and `frequency` for each time: counts (..., v).

    >>> penalise_counts(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([0, 1, 3]), 1.0, 0.5)
    tensor([ 2.0000,  0.5000, -0.5000])
    """
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Remove all but the k largest logits; ties with the k-th stay.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens whose stronger ones hold less than the share p together; at least one.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1. Of tokens that tie at the edge,
    as many stay as the share needs.

    >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    v = logits.shape[-1]
    # fp64: near p = 1 the edge lies among tokens smaller than the rounding of an fp32 sum.
    total = logits.double().logsumexp(-1, keepdim=True)
    values, index = logits.topk(min(_NUCLEUS, v))
    before = _stronger(values, total)
    if values.shape[-1] < v and not bool((before[..., -1] >= p).all()):
        values, index = logits.sort(dim=-1, descending=True)
        before = _stronger(values, total)
    removed = before >= p
    removed[..., 0] = False
    kept = values.masked_fill(removed, -math.inf)
    return torch.full_like(logits, -math.inf).scatter_(-1, index, kept)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Remove tokens less likely than p times the likeliest: a threshold on the logits' difference.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.

    >>> keep_min_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.5).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def process(logits: Tensor, sampling: Sampling, seen: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """Apply the rules of `sampling` to logits (..., v), in fp32.

    The penalties need `seen` (..., v), which tokens have occurred, and `counts` (..., v), how often in the answer. For
    greedy sampling only they apply: the others do not change which token is the likeliest.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError("process: repetition_penalty needs `seen`, which tokens have occurred")
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.counts:
        if counts is None:
            raise ValueError("process: presence_penalty and frequency_penalty need `counts`, those of the answer")
        logits = penalise_counts(logits, counts, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.greedy:
        return logits
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def probabilities(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """The distribution (..., v) that tokens are drawn from; all on the likeliest token when greedy.

    Target and draft models both go through this one function, so acceptance rules compare like with like.

    >>> probabilities(torch.tensor([1.0, 2.0, 3.0]), Sampling())
    tensor([0., 0., 1.])
    """
    logits = process(logits, sampling, seen, counts)
    if sampling.greedy:
        best = logits.argmax(-1, keepdim=True)
        found = logits.gather(-1, best)
        return torch.zeros_like(logits).scatter_(-1, best, found - found + 1)  # nan where it is no finite number
    return logits.softmax(-1)


def likeliest(logits: Tensor, rows: Sequence[int] | None = None) -> list[int]:
    """The likeliest token of each row of logits (n, v), the first of equal ones.

    On a CPU by numpy: torch's argmax takes five times as long, and in 16 bits ten times. Raises VolvelleError where
    the logits of one of `rows`, by default of any, are no numbers.

    >>> likeliest(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]]))
    [1, 0]
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if wide.device.type == "cpu":
        table = wide.detach().numpy()
        best = table.argmax(-1).tolist()
        scores = [float(row[token]) for row, token in zip(table, best, strict=True)]
    else:
        found = wide.argmax(-1, keepdim=True)
        best, scores = found[:, 0].tolist(), wide.gather(-1, found)[:, 0].tolist()
    for score in scores if rows is None else [scores[row] for row in rows]:
        if not math.isfinite(score):
            raise no_numbers(score)
    return best


def draw(p: Tensor, generator: torch.Generator | None) -> int:
    """Draw a token from p (v,): the inverse of its distribution function at one uniform number.

    The sum runs in fp64, so that 50,000 small probabilities add up; a token of probability 0 is never drawn.

    >>> draw(torch.tensor([0.0, 1.0, 0.0]), torch.Generator().manual_seed(0))
    1
    """
    uniform = torch.rand(1, dtype=torch.float64, generator=generator)
    return int(draw_rows(p[None], uniform))


def draw_rows(p: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token (r,) from each row of p (r, v), at the uniform numbers (r,): what `draw` does with one.

    Raises VolvelleError where a row is no distribution: from logits that are no numbers, or with nothing left in it.

    >>> draw_rows(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([0.4, 0.6]))
    tensor([0, 1])
    """
    tokens, totals = _drawn(p, uniform)
    for total in totals.tolist():
        if total == 0:
            raise none_left()
        if not math.isfinite(total):
            raise no_numbers(total)
    return tokens


def guess_rows(p: Tensor, uniform: Tensor) -> Tensor:
    """The same for drafts, where any token will do if a row is no distribution: who checks it has its say."""
    return _drawn(p, uniform)[0]


def _drawn(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    cumulative = p.double().cumsum(-1)
    totals = cumulative[:, -1:]
    places = torch.searchsorted(cumulative, uniform.to(cumulative)[:, None] * totals, right=True)
    return places[:, 0].clamp(max=p.shape[-1] - 1), totals[:, 0]


def no_numbers(value: float) -> VolvelleError:
    """The error where a model gives `value`, nan or infinite, for the token that is to come."""
    return VolvelleError(
        f"the model gives {value} where a next token's score should be",
        tip="fp16 overflow or a broken checkpoint; try precision=bf16 or fp32",
    )


def none_left() -> VolvelleError:
    """The error where rules ban every token."""
    return VolvelleError(
        "the rules leave no token that may come next",
        tip="a larger no_repeat_ngram_size, fewer min_tokens, or a smaller max_tokens",
    )


def choose(
    logits: Tensor,
    sampling: Sampling,
    seen: Tensor | None,
    generator: torch.Generator | None,
    counts: Tensor | None = None,
) -> int:
    """Pick the next token from logits (v,)."""
    if sampling.greedy:
        plain = seen is None and counts is None
        return likeliest((logits if plain else process(logits, sampling, seen, counts))[None])[0]
    return draw(probabilities(logits, sampling, seen, counts), generator)


def _stronger(values: Tensor, total: Tensor) -> Tensor:
    share = (values - total).exp()
    return share.cumsum(-1) - share
