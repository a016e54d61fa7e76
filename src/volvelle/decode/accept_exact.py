"""The exact rule: drafts change how fast an answer comes, not what it is or how it is distributed.

Tokens that were chosen (`Draft.q` is None): the next token is drawn from p as without a draft; where the draft has it,
its place is known already and the next one can be drawn too. Greedy decoding is the case of p with all on one token.
With a seed the answer is then the one of plain decoding, token for token.

Tokens that were drawn from q: token x is kept with probability min(1, p(x) / q(x)), else p becomes
norm(max(p - q, 0)); when none is left to try, a token is drawn from p (Leviathan et al. 2023, "Fast Inference from
Transformers via Speculative Decoding", section 2.3; Chen et al. 2023). Siblings are tried in the order in which they
were drawn, without replacement: with each one rejected q loses it too, and is normalised over what remains (Jeon et
al. 2024, "Recursive Speculative Decoding").

Shapes: b rows, r of them unfinished, k drafted tokens, n = 1 + k, c siblings, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from volvelle.decode.contract import Accepted, Draft
from volvelle.decode.request import Request, distributions
from volvelle.decode.sampling import draw_rows, likeliest

if TYPE_CHECKING:
    from volvelle.decode.options import Sampling


class Exact:
    """The rule, for chains and trees, greedy and sampled requests side by side, each with its own random numbers."""

    def lossless(self, sampling: Sampling) -> bool:
        """True: see above."""
        return True

    def __call__(self, logits: Tensor, draft: Draft, requests: Sequence[Request]) -> Accepted:
        """From a step's logits (b, n, v) to what each row gained."""
        live = [row for row, request in enumerate(requests) if request.finish is None]
        children, tokens = children_of(draft), draft.tokens.tolist()
        if all(requests[row].all_argmax(1 + len(children)) for row in live):
            walks = {row: _followed(likeliest(logits[row]), tokens[row], children) for row in live}
        else:
            walks = _walk(logits, draft, requests, live)
        return as_accepted(walks, len(requests), tokens, logits.device)


EXACT = Exact()

Walk = tuple[list[int], int]
"""A row's accepted nodes, offsets into the step from the newest token (0) on, and the token that follows them."""


def children_of(draft: Draft) -> tuple[tuple[int, ...], ...]:
    """Of each token of the step, the newest first, the tokens of the draft that follow it, as offsets into the step."""
    return _children(draft.ancestry)


@functools.lru_cache(maxsize=256)
def _children(parents: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(1 + len(parents))]
    for node, parent in enumerate(parents, 1):
        found[parent + 1].append(node)
    return tuple(map(tuple, found))


def as_accepted(walks: dict[int, Walk], b: int, tokens: Sequence[Sequence[int]], device: torch.device) -> Accepted:
    """Walks of the unfinished rows as what a step gained."""
    longest = max(len(nodes) for nodes, _ in walks.values())
    gained: list[list[int]] = [[] for _ in range(b)]
    path = [[-1] * longest for _ in range(b)]
    for row, (nodes, last) in walks.items():
        gained[row] = [*(tokens[row][node - 1] for node in nodes[1:]), last]
        path[row][: len(nodes)] = nodes
    return Accepted(gained, torch.tensor(path, device=device))


def _followed(best: Sequence[int], tokens: Sequence[int], children: Sequence[Sequence[int]]) -> Walk:
    """Follow the likeliest token of each place as far as the draft has it."""
    nodes = [0]
    while True:
        token = best[nodes[-1]]
        held = next((child for child in children[nodes[-1]] if tokens[child - 1] == token), None)
        if held is None:
            return nodes, token
        nodes.append(held)


def _walk(logits: Tensor, draft: Draft, requests: Sequence[Request], live: list[int]) -> dict[int, Walk]:
    """The rule for all unfinished rows at once, place by place; only places that are reached are computed."""
    children, tokens = children_of(draft), draft.tokens.tolist()
    drawn = draft.q is not None
    nodes: dict[int, list[int]] = {row: [0] for row in live}
    taken: dict[int, list[int]] = {row: [] for row in live}
    walks: dict[int, Walk] = {}
    active = live
    while active:
        at = [nodes[row][-1] for row in active]
        p = distributions([requests[row] for row in active], logits[active, at], [taken[row] for row in active])
        held: list[int | None] = [None] * len(active)
        trying = [i for i, row in enumerate(active) if drawn and not requests[row].sampling.greedy]
        if drawn and trying:
            rows = [active[i] for i in trying]
            ways = [children[at[i]] for i in trying]
            uniform = [requests[row].uniform for row in rows]
            kept, rest = _first_kept(p[trying], draft, rows, ways, uniform)
            p[trying] = rest
            for i, child in zip(trying, kept, strict=True):
                held[i] = child
        open_rows = [i for i, child in enumerate(held) if child is None]
        if open_rows:
            uniforms = torch.tensor([requests[active[i]].uniform() for i in open_rows], dtype=torch.float64)
            chosen = draw_rows(p[open_rows], uniforms).tolist()
            following = set(trying)
            for i, token in zip(open_rows, chosen, strict=True):
                row = active[i]
                if i not in following:
                    held[i] = next((c for c in children[at[i]] if tokens[row][c - 1] == token), None)
                if held[i] is None:
                    walks[row] = nodes[row], token
        for row, child in zip(active, held, strict=True):
            if child is not None:
                nodes[row].append(child)
                taken[row].append(tokens[row][child - 1])
        active = [row for row in active if row not in walks]
    return walks


def _first_kept(
    p: Tensor,
    draft: Draft,
    rows: Sequence[int],
    ways: Sequence[Sequence[int]],
    uniform: Sequence[Callable[[], float]],
) -> tuple[list[int | None], Tensor]:
    """Try the siblings of each row's place: the first one kept, an offset into the step, and what is left of p."""
    assert draft.q is not None
    c = max(map(len, ways))
    if c == 0:
        return [None] * len(rows), p
    siblings = torch.tensor([[*way, *[0] * (c - len(way))] for way in ways], device=p.device)
    which = torch.tensor(rows, device=p.device)
    candidates = torch.where(siblings > 0, draft.tokens[which[:, None], (siblings - 1).clamp(min=0)], -1)
    q = draft.q[which, (siblings[:, 0] - 1).clamp(min=0)].to(p.dtype)
    found, rest = keep_one(p, q, candidates, uniform)
    return [None if j < 0 else way[j] for j, way in zip(found, ways, strict=True)], rest


def keep_one(
    p: Tensor, q: Tensor, candidates: Tensor, uniform: Sequence[Callable[[], float]]
) -> tuple[list[int], Tensor]:
    """Try each row's `candidates` (r, c), drawn from q (r, v) one after the other without replacement, -1 = none.

    Returns the place of the one that is kept, -1 = none, and p (r, v) as the rejected ones have left it: a token drawn
    from that then makes the whole distributed as p was. `uniform` gives each row's random numbers.
    """
    found = [-1] * len(p)
    for j in range(candidates.shape[1]):
        token = candidates[:, j]
        trying = [i for i, one in enumerate(token.tolist()) if found[i] < 0 and one >= 0]
        if not trying:
            continue
        here = torch.tensor(trying, device=p.device)
        numbers = torch.tensor([uniform[i]() for i in trying], dtype=torch.float64, device=p.device)
        at, ours, theirs = token[here, None], p[here], q[here]
        theirs = theirs / theirs.sum(-1, keepdim=True).clamp(min=torch.finfo(theirs.dtype).tiny)
        chance = theirs.gather(1, at)[:, 0]
        kept = (numbers * chance < ours.gather(1, at)[:, 0]) & (chance > 0)
        for i, yes in zip(trying, kept.tolist(), strict=True):
            found[i] = j if yes else -1
        rest = (ours - theirs).clamp(min=0)
        total = rest.sum(-1, keepdim=True)
        # Nothing is left where p and q are equal but for rounding; and a token that q cannot give says nothing.
        changes = (~kept & (chance > 0))[:, None] & (total > 0)
        p, q = p.index_copy(0, here, torch.where(changes, rest / total, ours)), q.index_copy(0, here, theirs)
        q[here, token[here]] = 0
    return found, p
