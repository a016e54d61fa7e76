"""NaN and infinity: what was trained on, where it began, and how many updates were left out for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from volvelle.errors import VolvelleError
from volvelle.train.random_state import set_random_state, untouched_random_state

IN_A_ROW = 20
"""Updates left out in a row after which a run stops: by then no update will ever succeed."""


class NonFinite(VolvelleError):
    """A loss or a gradient is NaN or infinite. The update was not applied."""


@dataclass
class Skipped:
    """Updates that were left out: `overflow` because the loss scale was too large, `nan` with `on_nan="skip"`."""

    overflow: int = 0
    nan: int = 0
    in_a_row: int = 0

    @property
    def too_many(self) -> bool:
        """Whether nothing but failures came of the last updates."""
        return self.in_a_row >= IN_A_ROW

    def state_dict(self) -> dict[str, Any]:
        """The three counts."""
        return asdict(self)

    def said(self, name: str, attempts: int, scale: float | None) -> list[str]:
        """What the user should hear at the end, a line a reason."""
        lines = []
        if self.overflow:
            lines.append(
                f"phase {name!r}: {self.overflow} of {attempts} updates were left out, because fp16 gradients "
                f"overflowed; the loss scale is now {scale:g}"
            )
        if self.nan:
            lines.append(f"phase {name!r}: {self.nan} of {attempts} updates were left out as NaN or infinite (on_nan)")
        return lines


class _All(nn.Module):
    """Several modules as one, under their names in the objective."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self._modules.update(modules)


def where_it_began(modules: Mapping[str, nn.Module], run: Callable[[], Tensor], moment: dict[str, Any]) -> str | None:
    """Run a micro-batch once more, with the random state it had, and name the operation and module of the first NaN.

    `run` gives the loss. None when it is finite this time. Weights, gradients, buffers and generators are as before
    afterwards.
    """
    from volvelle.inspect.gradients import nonfinite_origin

    whole = next(iter(modules.values())) if len(modules) == 1 else _All(modules)
    with untouched_random_state():
        set_random_state(moment)
        try:
            found = nonfinite_origin(whole, run)
        except RuntimeError as error:
            # Looking closer needs more memory than training. The first error matters more than this one.
            return f"where it began could not be traced ({error})"
    return None if found is None else str(found)
