"""What the decoding loop, drafters, acceptance rules and policies know of each other.

A drafter proposes tokens behind the newest one, the target scores all of them in one forward, an acceptance rule says
which of them stay, a policy says how many are worth proposing. A new drafter, rule or policy is one class.

Letters: p the target's distribution, q the draft's (Leviathan et al. 2023). Shapes: b rows, k drafted tokens, n = 1 + k
tokens a step, m tokens kept, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor, nn

from volvelle.errors import VolvelleError

if TYPE_CHECKING:
    from volvelle.decode.options import Sampling
    from volvelle.decode.request import Request
    from volvelle.parts.attention.cache import Cache
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.encoder_decoder import Answering

    Writer = Decoder | Answering


class Draft(NamedTuple):
    """Proposed continuations of the newest token.

    `tokens` is (b, k), -1 where a row has none. `parents` (k,) is each one's parent: an index into `tokens`, before its
    own, -1 for the newest token; None for a chain, in which each follows the one before. `q` (b, k, v) holds the
    distribution that each token was drawn from, after the request's own rules (temperature, top-p, penalties): that of
    the place, so siblings, which are drawn without replacement in their order, have the same one. It is None when
    tokens were not drawn but chosen; rows of greedy requests are chosen ones always.

    `chances` (k,), where the drafter knows them, are the shares of rows that it expects to keep each token. They do not
    rise from node to node, so the first j nodes are the best j, and a policy may check only these.
    """

    tokens: Tensor
    parents: Sequence[int] | None = None
    q: Tensor | None = None
    chances: Sequence[float] | None = None

    @property
    def ancestry(self) -> tuple[int, ...]:
        """The parents, for chains too."""
        return tuple(range(-1, self.tokens.shape[1] - 1)) if self.parents is None else tuple(self.parents)

    def only(self, nodes: Sequence[int]) -> Draft:
        """The draft of these nodes alone, in rising order; the parents of each must be among them."""
        if len(nodes) == self.tokens.shape[1]:
            return self
        number = {node: i for i, node in enumerate(nodes)} | {-1: -1}
        parents = None if self.parents is None else [number[self.parents[node]] for node in nodes]
        chances = None if self.chances is None else [self.chances[node] for node in nodes]
        kept = list(nodes)
        return Draft(self.tokens[:, kept], parents, None if self.q is None else self.q[:, kept], chances)


class Seen(NamedTuple):
    """What the target's cache has gained since the drafter was last asked: at first the prompt.

    It ends before the newest token, which is `Request.last`. `ids` (b, m) are the tokens, `hidden` (b, m, width) what
    `Drafting.read` gave for each, `mask` (b, m) is False where a row has none (padding, rejected tokens, all of a
    finished row); None: all are real. Behind the first, column 0 holds every unfinished row's newest token of the last
    time.
    """

    ids: Tensor
    hidden: Tensor
    mask: Tensor | None = None


class Accepted(NamedTuple):
    """What a step gained: new tokens a row (none for a finished one), and which slots of the step stay.

    `path` (b, m) are offsets into the step, -1 = none, or None for all. A row's path holds the newest token (0) and its
    accepted draft tokens; the last of `tokens` comes from the target itself and is not in the step. In a search other
    rows take the place of these: `rows` are those that they go on from, one for each of `tokens`.
    """

    tokens: list[list[int]]
    path: Tensor | None = None
    rows: Sequence[int] | None = None

    @property
    def nodes(self) -> list[list[int]]:
        """Of each row the accepted tokens of the draft, as indices into it."""
        if self.path is None:
            return [[] for _ in self.tokens]
        return [[place - 1 for place in row if place > 0] for row in self.path.tolist()]


Rule = Callable[[Tensor, "Draft | None", "Sequence[Request]"], Accepted]
"""From a step's logits (b, n, v) to what it gained. The requests do not hold the step's tokens yet."""


class Acceptance(Protocol):
    """A rule for steps with a draft."""

    def __call__(self, logits: Tensor, draft: Draft, requests: Sequence[Request]) -> Accepted:
        """See `Rule`."""
        ...

    def lossless(self, sampling: Sampling) -> bool:
        """Whether answers are distributed as without drafts (greedy: equal to them)."""
        ...


class Drafting(Protocol):
    """A drafter's state in one run. Heirs give `width` and `propose`; the rest is what most of them need."""

    width: int
    """The most tokens of one draft."""

    states = False
    """Whether its drafts, or some of them, state their chances."""

    unstated: Callable[[int], int] | None = None
    """Set before each draft: to how many tokens the policy cuts the wish for one that states no chances. Who makes both
    kinds asks it before making such a one."""

    @property
    def depth(self) -> int:
        """The most tokens on one path of a draft: for chains the width."""
        return self.width

    def read(self, writer: Writer, ids: Tensor, mask: Tensor | None, cache: Cache) -> tuple[Tensor, Tensor]:
        """Run the target over a step: its final states (b, n, width), and those that `Seen.hidden` holds."""
        hidden = writer.hidden(ids, mask=mask, cache=cache)
        return hidden, hidden

    def propose(self, requests: Sequence[Request], seen: Seen, k: int) -> Draft | None:
        """Draft up to k tokens behind each row's newest one; None when nothing is worth checking.

        What was seen is told only once. Tokens deeper than a row may still take are ignored.
        """
        ...

    def observe(self, requests: Sequence[Request], accepted: Accepted, draft: Draft | None) -> None:
        """Learn what came of a step, once the requests hold its tokens; for statistics of acceptance."""

    def join(self, row: int, request: Request) -> None:
        """Another text takes the place of row `row`, which had finished; its prompt comes with what is seen next.

        Raises VolvelleError where texts can only begin together, as they do unless an heir says otherwise.
        """
        raise VolvelleError(
            f"{type(self).__name__}: texts that come and go cannot be drafted for with this",
            tip="prompt lookup, n-grams, Medusa's heads, MTP modules and a smaller model can",
        )


class Drafter(Protocol):
    """What proposes tokens: weights or a rule, usable in many runs."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The networks that draft; dropout is off in them during a run."""
        return ()

    @property
    def draws(self) -> bool:
        """Whether it draws drafts for sampled requests, with random numbers of theirs, rather than choosing them."""
        return False

    def begin(self, writer: Writer, requests: Sequence[Request], room: int) -> Drafting:
        """Make ready for one run: texts of up to `room` tokens, behind the prompts of `requests`.

        `writer` is the target: a Decoder, or an encoder-decoder that has read the sources (`Answering`). Raises
        VolvelleError where the drafter does not fit it.
        """
        ...


class Drafted(NamedTuple):
    """A draft of k nodes as it was checked, and the nodes that each row kept; rows that had finished are not here."""

    k: int
    parents: Sequence[int] | None
    kept: Sequence[Sequence[int]]
    chances: Sequence[float] | None = None


class Checked(NamedTuple):
    """What became of one row's draft in a step: its tokens, in the draft's order, and whether each was kept."""

    tokens: list[int]
    kept: list[bool]


class Pacing(Protocol):
    """A policy's state in one run."""

    def choose(self, limit: int, length: int) -> int:
        """How many tokens to ask the drafter for, at most `limit`; 0: a plain step. `length` is the cache's."""
        ...

    def choose_stated(self, limit: int, length: int) -> int:
        """The same for a drafter that states chances: `worth` says afterwards how many of them to check."""
        return self.choose(limit, length)

    def worth(self, chances: Sequence[float], length: int) -> int:
        """How many nodes of a draft that states its chances to check; 0: a plain step."""
        return len(chances)

    def observe(self, length: int, draft: Drafted | None, *, step_seconds: float, draft_seconds: float = 0.0) -> None:
        """Learn from a step over a cache of `length` tokens; the prompt's is not reported.

        `draft_seconds` is the time of proposing (also where nothing came of it), `step_seconds` that of the target and
        of the acceptance.
        """
        ...


class Policy(Protocol):
    """How many tokens are worth drafting: usable in many runs."""

    def begin(self) -> Pacing:
        """Make ready for one run."""
        ...


class Always:
    """The policy that always asks for as many tokens as possible."""

    def begin(self) -> Pacing:
        """Nothing to prepare, and nothing to learn."""
        return _Always()


class _Always:
    def choose(self, limit: int, length: int) -> int:
        return limit

    choose_stated = choose

    def worth(self, chances: Sequence[float], length: int) -> int:
        return len(chances)

    def observe(self, length: int, draft: Drafted | None, *, step_seconds: float, draft_seconds: float = 0.0) -> None:
        pass


ALWAYS = Always()
