"""What a recipe hands back to whoever started it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One prompt with its right answers, and what the model wrote before and after training."""

    prompt: str
    references: tuple[str, ...]
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished or interrupted run: held-out metrics before and after, samples, and where things are.

    `unit` is what `step` and `steps` count. `resume` is the command that continues an interrupted run, `next` are
    commands to try.
    """

    run: Path
    step: int
    steps: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    interrupted: str | None = None
    resume: str | None = None
    report: Path | None = None
    seconds: float = 0.0
    next: tuple[str, ...] = ()
    unit: str = "step"

    def record(self) -> dict[str, Any]:
        """The outcome as plain data, for machines."""
        return {
            "run": str(self.run),
            "step": self.step,
            "steps": self.steps,
            "before": self.before,
            "after": self.after,
            "interrupted": self.interrupted,
            "resume": self.resume,
            "report": str(self.report) if self.report else None,
            "seconds": round(self.seconds, 2),
            "samples": [vars(sample) for sample in self.samples],
            "next": list(self.next),
        }
