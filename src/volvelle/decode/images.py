"""Pictures from a prior: `draw_images` lets it write codes, by the loop that writes all texts.

Shapes: n pictures, h x w codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from volvelle.decode.accept_exact import EXACT
from volvelle.decode.contract import Acceptance, Drafter, Policy
from volvelle.decode.generation import Exactness, generate_batch
from volvelle.decode.options import Sampling
from volvelle.decode.policy import usual_policy
from volvelle.decode.request import Generation
from volvelle.errors import UsageError
from volvelle.systems.generation.larger import Larger
from volvelle.systems.generation.prior import Prior, Shows
from volvelle.systems.language.projections import fuse_projections

FREELY = Sampling(temperature=1.0)
ROWS = 32
"""Pictures written together."""


@dataclass(frozen=True)
class Drawn:
    """`codes` int64 (n, h, w), and what each picture's writing took (`Generation`: steps, seconds, accepted drafts)."""

    codes: Tensor
    written: tuple[Generation, ...]

    @property
    def accepted_per_step(self) -> float:
        """Codes gained by a forward pass: 1 without a drafter."""
        return sum(len(one.tokens) for one in self.written) / max(1, sum(one.steps for one in self.written))


def draw_images(
    prior: Prior,
    shows: Sequence[Shows],
    *,
    sampling: Sampling = FREELY,
    size: tuple[int, int] | None = None,
    begins: Tensor | None = None,
    batch: int = ROWS,
    drafter: Drafter | None = None,
    acceptance: Acceptance = EXACT,
    policy: Policy | None = None,
    exact: Exactness = "default",
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draw one picture for each of `shows` (a class's number, a caption, None: anything); `Prior.pictures` shows them.

    `size` are the rows and columns of codes: by default those trained on; a larger picture is written through a window
    that moves over it (RowWindow). `begins` int64 (t,) or (n, t) are codes that every picture, or each one, begins
    with, in raster order. A `sampling` with a seed s gives picture i the seed s + i. `drafter` and what follows it are
    those of `generate`; drafts are checked in pictures of the trained size only.

    Raises UsageError for sizes that hold no code beside `begins`, and for drafts in another size than the trained one.
    """
    layout = prior.layout
    rows, columns = size or (layout.rows, layout.columns)
    known = torch.zeros(0, dtype=torch.long) if begins is None else begins
    known = known.expand(len(shows), -1)
    left = rows * columns - known.shape[1]
    if min(rows, columns) < 1 or left < 1:
        raise UsageError(f"size={rows}x{columns} codes: nothing is left to write behind {known.shape[1]} codes")
    if begins is not None and begins.numel() and not 0 <= int(begins.min()) <= int(begins.max()) < layout.codes:
        raise UsageError(f"begins: codes lie in 0 … {layout.codes - 1}")
    whole = (rows, columns) == (layout.rows, layout.columns)
    if drafter is not None and not whole:
        raise UsageError(
            f"draft: drafts are checked in pictures of {layout.rows} x {layout.columns} codes only",
            tip="leave draft= or size= out",
        )
    prompts = [prior.prompt(one) for one in shows]
    options: dict[str, Any] = {"max_tokens": left, "eos_ids": (), "exact": exact}
    if drafter is not None:
        # One policy for all pictures: they are short, and what drafts are worth is learned once.
        options |= {"drafter": drafter, "acceptance": acceptance, "policy": policy or usual_policy(drafter, [sampling])}
    answers: dict[int, Generation] = {}
    for group in _groups([len(prompt) for prompt in prompts], batch, alike=not whole):
        model: Any = prior.model
        if not whole:
            fuse_projections(prior.model)
            model = Larger(prior.model, layout, rows=rows, columns=columns, said=len(prompts[group[0]]))
        asked = [[*prompts[i], *known[i].tolist()] for i in group]
        found = generate_batch(cast(Any, model), asked, sampling=[_seeded(sampling, i) for i in group], **options)
        answers.update(zip(group, found, strict=True))
        if progress is not None:
            progress(len(answers), len(shows))
    written = tuple(answers[i] for i in range(len(shows)))
    codes = torch.tensor([one.tokens for one in written], dtype=torch.long).reshape(len(shows), left)
    return Drawn(torch.cat((known.to(codes), codes), 1).reshape(len(shows), rows, columns), written)


def _groups(lengths: Sequence[int], batch: int, *, alike: bool) -> list[list[int]]:
    """Numbers of the pictures that are written together; with `alike` only those whose prompts are of one length."""
    if not alike:
        return [list(range(start, min(start + batch, len(lengths)))) for start in range(0, len(lengths), batch)]
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(length, []).append(i)
    return [part[start : start + batch] for part in groups.values() for start in range(0, len(part), batch)]


def _seeded(sampling: Sampling, number: int) -> Sampling:
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
