"""`volvelle resume`: go on with a run that was stopped, exactly where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

EXAMPLES = (
    "volvelle resume runs/adapt-smollm2-lora-1",
    "volvelle resume runs/language-1 --json",
)


@dataclass(frozen=True)
class Options:
    """Which run."""

    run: Positional[Path]
    """A run folder; `volvelle ls runs` shows which were interrupted."""
    lost: bool = False
    """The run was going on on another machine, and that is gone."""


def main(options: Options) -> int:
    """Continue from the newest sound checkpoint with the options of the run's config.yaml."""
    from volvelle.cli.training import resume

    return resume(options.run, lost=options.lost)
