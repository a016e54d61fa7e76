"""Beam search: the likeliest whole answer rather than the likeliest next token, for decoders and encoder-decoders.

A search is a rule of the one decoding loop: each step it names the k beginnings of every prompt that go on, which rows
of the step they go on from, and their next tokens; the loop reorders the cache. The arithmetic is that of
transformers' generate, so the answers are equal token for token.

Shapes: b prompts, k beams each, c candidates a prompt, v vocabulary; the step's rows are b at first, then b k.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from volvelle.decode.generation import GREEDY, finished, limits
from volvelle.decode.loop import Accepted, Draft, begin
from volvelle.decode.options import Beams, Rules
from volvelle.decode.request import NO_RULES, Generation, Request
from volvelle.decode.sampling import no_numbers
from volvelle.errors import UsageError
from volvelle.systems.modes import evaluating

if TYPE_CHECKING:
    from volvelle.systems.language.models import LanguageModel

FOUR = Beams()
NEVER = -1e9  # a score that loses against every real one


def beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    beams: Beams = FOUR,
    max_tokens: int | None = 256,
    eos_ids: Sequence[int] | int | None = None,
    rules: Rules = NO_RULES,
) -> list[Generation]:
    """Return the best answer that a beam search finds to each prompt, all searched in one batch.

    An answer ends at an eos id (default: the tokenizer's) or after `max_tokens` (None: when the context is full).
    Computes in the model's own dtype, without gradients and dropout. Raises VolvelleError as `generate` does, and
    UsageError when the vocabulary is too small for so many beams.
    """
    if not prompts:
        return []
    ends = limits(max_tokens, (), eos_ids, rules)
    requests = [Request(model, prompt, GREEDY, ends) for prompt in prompts]
    search = BeamSearch(requests, beams)
    started, first = time.perf_counter(), 0.0
    with evaluating(model):
        for _ in begin(model, requests, choose=search):
            first = first or time.perf_counter() - started
            if search.over:
                break
    seconds = time.perf_counter() - started
    for request, tokens in zip(requests, search.answers, strict=True):
        request.steps = search.steps
        for token in tokens:
            request.add(token)
    return [finished(request, seconds, prompt_seconds=first) for request in requests]


class BeamSearch:
    """The state of a search, and the rule by which it goes on; `answers` are the best so far, one a prompt."""

    def __init__(self, requests: Sequence[Request], beams: Beams):
        b, k = len(requests), beams.width
        self.beams, self.steps, self.over = beams, 0, False
        self.ends = sorted(requests[0].eos_ids)
        self.most = torch.tensor([[request.max_tokens] for request in requests])
        # Of k equal beginnings only the first may go on, else all would go the same way.
        self.open = torch.tensor([[0.0] + [NEVER] * (k - 1)]).repeat(b, 1)  # log-probabilities
        self.closed = torch.full((b, k), NEVER)  # scores of finished answers, best first
        self.is_answer = torch.zeros(b, k, dtype=torch.bool)
        self.can_improve = torch.ones(b, 1, dtype=torch.bool)
        self.texts: list[list[list[int]]] = [[[] for _ in range(k)] for _ in requests]

    @property
    def answers(self) -> list[list[int]]:
        """The best finished answer to each prompt."""
        return [texts[0] for texts in self.texts]

    def __call__(self, logits: Tensor, draft: Draft | None, requests: Sequence[Request]) -> Accepted:
        """Continue the search by logits (rows, n, v) of the last position."""
        self.steps += 1
        scores, rows, tokens = self._candidates(logits[:, -1], requests)
        ended = torch.zeros_like(tokens, dtype=torch.bool) | (self.steps >= self.most)
        for token in self.ends:
            ended |= tokens == token
        self._close(scores, ended, rows.tolist(), tokens.tolist(), requests)
        chosen = self._go_on(scores, ended)
        length = self.most if self._looks_ahead else torch.full_like(self.most, self.steps)
        reachable = self.open[:, :1] / self._penalty(length)
        worst = torch.where(self.is_answer, self.closed.amin(1, keepdim=True), NEVER)
        self.can_improve &= (reachable > worst).any(-1, keepdim=True)
        full = self.beams.early_stopping is True and bool(self.is_answer.all())
        self.over = full or bool(ended.all()) or not bool(self.can_improve.any())
        rows, tokens = rows.gather(1, chosen).flatten(), tokens.gather(1, chosen).flatten()
        return Accepted([[token] for token in tokens.tolist()], rows=rows.tolist())

    @property
    def _looks_ahead(self) -> bool:
        return self.beams.early_stopping == "never" and self.beams.length_penalty > 0

    def _penalty(self, lengths: Tensor) -> Tensor:
        """What scores of answers of these lengths (b, 1) are divided by."""
        return torch.tensor([[length[0] ** self.beams.length_penalty] for length in lengths.tolist()])

    def _candidates(self, logits: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of each prompt, (b, c): log-probability, the row continued, and the token."""
        b, k = self.open.shape
        scores = logits.float().log_softmax(-1)
        for row, request in enumerate(requests):
            if request.is_bound:
                scores[row] = request.constrain(scores[row])
        per, v = len(requests) // b, scores.shape[-1]
        # Each beam may end in any of the eos ids, and k must be left to go on.
        count = max(2, 1 + len(self.ends)) * k
        if count > k * v:
            raise UsageError(f"beams.width={k}: needs {count} continuations, a vocabulary of {v} has {k * v}")
        total = scores.view(b, per, v).expand(b, k, v) + self.open.to(scores.device)[..., None]
        found, index = (x.cpu() for x in total.reshape(b, k * v).topk(count))
        if bool(found.isnan().any()):
            raise no_numbers(math.nan)
        beam = (index // v).clamp(max=per - 1)  # before they part, all beams are one row
        return found, beam + per * torch.arange(b)[:, None], index % v

    def _close(
        self,
        scores: Tensor,
        ended: Tensor,
        rows: list[list[int]],
        tokens: list[list[int]],
        requests: Sequence[Request],
    ) -> None:
        """Take the answers among the k best candidates that ended, and keep the k best of all answers."""
        k = self.beams.width
        just = ended & (torch.arange(ended.shape[1]) < k)
        full = self.is_answer.all(-1, keepdim=True) & (self.beams.early_stopping is True)
        scores = scores / self._penalty(torch.full_like(self.most, self.steps))
        for barred in (full, ~self.can_improve, ~just):
            scores = scores + barred * NEVER
        together = torch.cat((self.closed, scores), 1)
        order = together.topk(k).indices
        self.closed = together.gather(1, order)
        self.is_answer = torch.cat((self.is_answer, just), 1).gather(1, order)
        for prompt, kept in enumerate(order.tolist()):
            old, row, token = self.texts[prompt], rows[prompt], tokens[prompt]
            self.texts[prompt] = [old[i] if i < k else [*requests[row[i - k]].tokens, token[i - k]] for i in kept]

    def _go_on(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Choose the k best candidates of each prompt that have not ended: their places (b, k)."""
        scores = scores + ended * NEVER
        chosen = scores.topk(self.beams.width).indices
        self.open = scores.gather(1, chosen)
        return chosen
