"""Typical acceptance: keep drafted tokens that are likely enough. Lossy: answers are not distributed as p says.

Token x is kept where p(x) > min(ε, δ exp(-H(p))), H being the entropy of p: the less certain the model is, the less
likely a token may be (Cai et al. 2024, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
Heads", section 2.3.1). Of a tree the longest path of kept tokens stays, of several the likeliest. p is what the
request draws from; for a greedy one all of it is on one token, and the rule is the exact one.

Shapes: b rows, k drafted tokens, n = 1 + k, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from volvelle.decode.accept_exact import EXACT, Walk, as_accepted, children_of
from volvelle.decode.contract import Accepted, Draft
from volvelle.decode.request import Request, distributions
from volvelle.decode.sampling import draw_rows
from volvelle.errors import UsageError

if TYPE_CHECKING:
    from volvelle.decode.options import Sampling


@dataclass(frozen=True)
class Typical:
    """The rule with its ε and δ; by default those of the paper's experiments, ε = 0.09 and δ = √ε. Lossy.

    >>> from volvelle.decode.options import Sampling
    >>> Typical().lossless(Sampling()), Typical().lossless(Sampling(temperature=0.7))
    (True, False)
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and self.delta > 0):
            raise UsageError(f"typical: epsilon in (0, 1] and delta > 0, got {self.epsilon} and {self.delta}")

    def lossless(self, sampling: Sampling) -> bool:
        """Only greedy answers stay what they are."""
        return sampling.greedy

    def __call__(self, logits: Tensor, draft: Draft, requests: Sequence[Request]) -> Accepted:
        """From a step's logits (b, n, v) to what each row gained."""
        live = [row for row, request in enumerate(requests) if request.finish is None]
        if all(requests[row].sampling.greedy for row in live):
            return EXACT(logits, draft._replace(q=None), requests)
        tokens = draft.tokens.tolist()
        walks = {row: self._walk(logits[row], tokens[row], children_of(draft), requests[row]) for row in live}
        return as_accepted(walks, len(requests), tokens, logits.device)

    def _walk(self, logits: Tensor, tokens: list[int], children: Sequence[Sequence[int]], request: Request) -> Walk:
        """The best path of one row, from logits (n, v)."""
        behind = _behind(tokens, children)
        inner = [place for place, ways in enumerate(children) if any(tokens[way - 1] >= 0 for way in ways)]
        p = distributions([request] * len(inner), logits[inner], [behind[place] for place in inner])
        least = (self.delta * torch.special.entr(p).sum(-1).neg().exp()).clamp(max=self.epsilon).tolist()
        paths: list[tuple[int, float, list[int]]] = [(0, 0.0, [0])]
        reached = {0: paths[0]}
        for i, place in enumerate(inner):
            if place not in reached:
                continue
            length, likely, nodes = reached[place]
            ways = [way for way in children[place] if tokens[way - 1] >= 0]
            for way, chance in zip(ways, p[i, [tokens[way - 1] for way in ways]].tolist(), strict=True):
                if chance > least[i]:
                    reached[way] = (length + 1, likely + math.log(chance), [*nodes, way])
                    paths.append(reached[way])
        nodes = max(paths)[2]
        last = distributions([request], logits[nodes[-1:]], [behind[nodes[-1]]])
        return nodes, int(draw_rows(last, torch.tensor([request.uniform()], dtype=torch.float64)))


def _behind(tokens: Sequence[int], children: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of each token of the step the drafted tokens on its path, its own last."""
    found: list[list[int]] = [[] for _ in children]
    for place, ways in enumerate(children):
        for way in ways:
            found[way] = [*found[place], tokens[way - 1]]
    return found
