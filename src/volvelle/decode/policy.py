"""How many tokens to draft: as many as gain the most tokens a second, none where drafting would lose.

The cost of a step of each width and of a draft comes from the steps themselves (cost.py), the chance of each draft
token from what was kept. Drafting that loses is switched off and tried again now and then, on an allowance:

    time lost to drafts so far  <=  1 plain step + 2 % of the plain time of the tokens so far

so an answer of 100 tokens or more takes at most 1/0.97 of the plain time, whatever the drafts are worth, as far as n
tokens never cost more than the same in narrower steps, nor a draft token more than a plain step. What drafts have
gained counts against what they lose.

Shapes: b rows, k drafted tokens (the nodes of a tree), n = 1 + k.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from volvelle.decode.contract import ALWAYS, Drafted, Drafter, Pacing, Policy
from volvelle.decode.cost import CostCurve, DraftCost
from volvelle.decode.options import Sampling

LADDER = (1, 2, 3, 4, 5, 6, 7, 9, 11, 15, 19, 23, 31, 39, 47, 63)
"""Draft lengths to choose from: few widths are learned sooner, and each has kernels to prepare. With the newest token
the longer ones make steps of whole tiles."""

CREDIT = 1.0  # plain steps that may be lost before anything is known
SHARE = 0.02  # of the plain time of the answer so far that may be lost beyond them
_GAIN = 1.02  # drafting is switched on where it promises this much
_SOONEST, _LATEST = 4, 64  # steps between trials while it is off: doubled by each that fails
_FRESH = 128  # steps with drafts after which a plain one is measured again


class NodeAcceptance:
    """P(node i of a draft is kept | its parent is), by number, from the drafts so far; old ones fade.

    A node that was never tried is taken to be like the one before it, the first one to be right with `prior`. So a
    draft may be judged at lengths that were not tried. Drafts are taken to be alike: what node i follows when the draft
    is longer, it followed in the last draft that had it.

    >>> seen = NodeAcceptance()
    >>> for _ in range(100):
    ...     seen.observe(2, None, [[0]])  # of two nodes the first was kept
    >>> [round(x, 1) for x in seen.kept(3)]
    [1.0, 1.0, 1.0]
    """

    def __init__(self, *, prior: float = 0.7, weight: float = 1.0, memory: float = 24.0):
        self._prior, self._weight, self._keep = prior, weight, 1 - 1 / memory
        self._hits: list[float] = []
        self._tries: list[float] = []
        self._parents: list[int] = []

    def observe(self, k: int, parents: Sequence[int] | None, kept: Sequence[Sequence[int]]) -> None:
        """Take in a draft of k nodes and the nodes that each row kept."""
        grown = range(len(self._parents), k)
        self._parents += [node - 1 for node in grown]
        self._hits += [0.0 for _ in grown]
        self._tries += [0.0 for _ in grown]
        self._parents[:k] = range(-1, k - 1) if parents is None else parents
        for node, parent in enumerate(self._parents[:k]):
            tried = [nodes for nodes in kept if parent < 0 or parent in nodes]
            if tried:
                hits = sum(node in nodes for nodes in tried)
                self._hits[node] = self._hits[node] * self._keep + hits / len(tried)
                self._tries[node] = self._tries[node] * self._keep + 1

    def kept(self, k: int) -> list[float]:
        """The draft tokens kept on average of drafts of 1, 2, ... k nodes."""
        alone, total, sums = self._prior, 0.0, []
        reached: list[float] = []
        for node in range(k):
            parent = node - 1
            if node < len(self._parents):
                parent = self._parents[node]
                alone = (self._hits[node] + self._weight * alone) / (self._tries[node] + self._weight)
            reached.append(alone * (1.0 if parent < 0 else reached[parent]))
            total += reached[-1]
            sums.append(total)
        return sums


class Belief:
    """What came of drafts that state their chances: tokens kept over tokens expected, so far; old drafts fade.

    >>> belief = Belief()
    >>> for _ in range(100):
    ...     belief.observe([0.8, 0.4], 0.6)  # 1.2 were expected
    >>> [round(x, 2) for x in belief.kept([0.8, 0.4])]
    [0.42, 0.62]
    """

    def __init__(self, *, weight: float = 2.0, memory: float = 48.0):
        self._keep = 1 - 1 / memory
        self._weight = weight  # expected tokens that the statement itself is worth
        self._expected = self._got = 0.0

    def observe(self, chances: Sequence[float], kept: float) -> None:
        """Take in a draft of which `kept` tokens a row stayed."""
        self._expected = self._expected * self._keep + sum(chances)
        self._got = self._got * self._keep + kept

    def kept(self, chances: Sequence[float]) -> list[float]:
        """The tokens kept on average of the first 1, 2, … nodes."""
        scale = (self._got + self._weight) / (self._expected + self._weight)
        return list(itertools.accumulate(min(scale * chance, 1.0) for chance in chances))


_HOPE = NodeAcceptance()  # what a trial expects: drafts as good as they are taken to be before any is seen


@dataclass
class Figures:
    """What a run's policy did: `chosen` counts its steps by the draft tokens that were checked, 0 = plain.

    `switched_off` is how often drafting went from on to off, `lost` the share of the plain time that drafts have cost
    beyond what they gained (0: they are not behind).
    """

    chosen: Counter[int] = field(default_factory=Counter)
    switched_off: int = 0
    lost: float = 0.0


class Adaptive(Policy):
    """Chooses draft lengths from measured costs and acceptance; `begin` opens a run, what was learned is kept.

    Use one for the calls of one model with one drafter: the second answer starts with what the first has learned.
    `figures` are those of the newest run. The times it is told may be those of any clock.
    """

    def __init__(self) -> None:
        self.steps, self.acceptance, self.belief = CostCurve(), NodeAcceptance(), Belief()
        # Where a drafter is made of several, those that state their chances are not those that do not.
        self.drafts, self.stated = DraftCost(), DraftCost()
        self.figures = Figures()

    def begin(self) -> AdaptivePacing:
        """Make ready for one run."""
        self.figures = Figures()
        return AdaptivePacing(self)

    def drafting(self, stated: bool) -> DraftCost:
        """What drafts cost that state their chances, or that do not."""
        return self.stated if stated else self.drafts

    def step_seconds(self, k: int, length: int, *, stated: bool = False) -> float:
        """What a draft of k tokens and the step that checks it are expected to take; k = 0 is a plain step."""
        seconds = self.steps.seconds(1 + k, length) or 0.0
        return seconds + ((self.drafting(stated).seconds(k, length) or 0.0) if k else 0.0)

    def worst_seconds(self, k: int, length: int, *, stated: bool = False) -> float:
        """The most that such a draft and its step can take, as far as steps and drafts of other lengths tell."""
        step = self.steps.at_most(1 + k, length) or 0.0
        return step + ((self.drafting(stated).at_most(k, length) or 0.0) if k else 0.0)

    def gains(self, kept: Sequence[float], length: int, *, stated: bool = False) -> dict[int, float]:
        """Tokens a second over those of plain decoding by draft length; kept[k - 1] tokens stay of a draft of k."""
        plain = self.step_seconds(0, length)
        return {k: (1 + kept[k - 1]) * plain / self.step_seconds(k, length, stated=stated) for k in lengths(len(kept))}


class AdaptivePacing(Pacing):
    """The choices of one run: `choose` before every step, `observe` after it."""

    def __init__(self, policy: Adaptive):
        self.policy, self.figures = policy, policy.figures
        self._on = True
        self._lost = 0.0  # seconds that drafts have cost beyond what they gained
        self._tokens = 0.0  # a row has gained, each worth a plain step
        self._waited = self._wait = 0  # steps since the last unstated draft, and those to wait until the next trial
        self._unmeasured = 0  # steps since a plain one

    def choose(self, limit: int, length: int) -> int:
        """The tokens to draft for the next step, at most `limit`; `length` is the cache's."""
        policy = self.policy
        if self._must_measure(limit) or (not self._on and self._waited < self._wait):
            return 0  # asked nothing: beside a small model's step the asking would be what drafting costs
        gains = policy.gains(policy.acceptance.kept(limit), length)
        if max(gains.values()) < _GAIN:
            if self._on:
                self._on, self._waited, self._wait = False, 0, _SOONEST
                self.figures.switched_off += 1
                return 0
            gains = policy.gains(_HOPE.kept(limit), length)
            if max(gains.values()) < _GAIN:
                self._waited, self._wait = 0, self._longer()
                return 0
        else:
            self._on = True
        return self._affordable(gains, length)

    def choose_stated(self, limit: int, length: int) -> int:
        """As many as there may be: each draft is judged by its chances once it is there."""
        return 0 if self._must_measure(limit) else lengths(limit)[-1]

    def worth(self, chances: Sequence[float], length: int) -> int:
        """The nodes that give the most tokens a second by what they are stated, and have so far been found, to keep."""
        gains = self.policy.gains(self.policy.belief.kept(chances), length, stated=True)
        return self._affordable(gains, length, stated=True) if max(gains.values(), default=0.0) >= _GAIN else 0

    def _must_measure(self, limit: int) -> bool:
        """Whether the step is plain: the first ones, for there is nothing to compare with, and where that is old."""
        return limit < 1 or not self.policy.steps.settled(1) or self._unmeasured >= _FRESH

    def _longer(self) -> int:
        """The steps to wait after a trial that failed, or was not worth making."""
        return min(max(2 * self._wait, _SOONEST), _LATEST)

    def _affordable(self, gains: Mapping[int, float], length: int, *, stated: bool = False) -> int:
        """The best length whose worst case the allowance bears."""
        policy = self.policy
        best = max(gains, key=lambda k: gains[k])
        plain = policy.step_seconds(0, length)
        allowed = (CREDIT + SHARE * self._tokens) * plain - self._lost
        borne = (k for k in gains if k <= best and policy.worst_seconds(k, length, stated=stated) - plain <= allowed)
        k = max(borne, default=0)
        # A shorter draft than wanted, which loses and teaches nothing: rather save up for the longer one.
        return 0 if 0 < k < best and gains[k] < 1 and policy.steps.settled(1 + k) else k

    def observe(self, length: int, draft: Drafted | None, *, step_seconds: float, draft_seconds: float = 0.0) -> None:
        """Take in what a step over a cache of `length` tokens took, and what of its draft was kept."""
        policy = self.policy
        self.figures.chosen[0 if draft is None else draft.k] += 1
        if draft is None:
            policy.steps.observe(1, length, step_seconds)
            plain = policy.step_seconds(0, length)
            self._charge(min(draft_seconds, plain), 1.0, plain)
            self._waited, self._unmeasured = self._waited + 1, 0
            return
        k, plain, stated = draft.k, policy.step_seconds(0, length), draft.chances is not None
        kept, drafts = sum(map(len, draft.kept)) / len(draft.kept), policy.drafting(stated)
        # What is prepared in the first step of a width or the first draft of a length is no cost of drafting.
        if not policy.steps.knows(1 + k):
            step_seconds = min(step_seconds, policy.steps.at_most(1 + k, length) or step_seconds)
        if not drafts.knows(k) and plain > 0:
            draft_seconds = min(draft_seconds, k * plain)
        policy.steps.observe(1 + k, length, step_seconds)
        drafts.observe(k, length, draft_seconds)
        if draft.chances is not None:
            policy.belief.observe(draft.chances, kept)
        else:
            policy.acceptance.observe(k, draft.parents, draft.kept)
        seconds = step_seconds + draft_seconds
        if policy.steps.settled(1 + k) and drafts.settled(k):
            seconds = policy.step_seconds(k, length, stated=stated)  # medians: nor is a hiccup of the machine
        gained = 1 + kept
        self._charge(seconds - gained * plain, gained, plain)
        self._unmeasured += 1
        if stated:
            self._waited += 1
        else:
            self._waited, self._wait = 0, 0 if seconds < gained * plain else self._longer()

    def _charge(self, lost: float, tokens: float, plain: float) -> None:
        self._lost += lost
        self._tokens += tokens
        self.figures.lost = max(self._lost / (self._tokens * plain), 0.0) if plain > 0 else 0.0


def usual_policy(drafter: Drafter, samplings: Sequence[Sampling], learned: Adaptive | None = None) -> Policy:
    """The policy where none is asked for: `learned` or a fresh `Adaptive`, but where draws are to come out the same.

    How many random numbers drawn drafts take depends on their lengths, which `Adaptive` chooses by the clock.
    """
    seeded = any(one.seed is not None and not one.greedy for one in samplings)
    return ALWAYS if seeded and drafter.draws else learned or Adaptive()


def lengths(limit: int) -> list[int]:
    """The draft lengths to choose from, up to `limit`.

    >>> lengths(9)
    [1, 2, 3, 4, 5, 6, 7, 9]
    """
    return [k for k in LADDER if k <= limit]
