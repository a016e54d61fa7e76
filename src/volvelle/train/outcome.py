"""What a recipe hands back to whoever started it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volvelle.runs import RunFolder
    from volvelle.train.loop import FitResult


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


def settled(
    run: RunFolder,
    result: FitResult,
    *,
    before: dict[str, float],
    after: dict[str, float],
    report: Path,
    commands: tuple[str, ...],
    samples: list[Sample] | None = None,
    facts: dict[str, Any] | None = None,
) -> Outcome:
    """Write the manifest's last words, `facts` among them, and give the outcome of a run.

    `commands` are what to try next; of an interrupted run the first one continues it.
    """
    stopped = result.interrupted
    run.update_manifest(
        status="interrupted" if stopped else "finished",
        step=result.step,
        steps=result.steps,
        before=before,
        after=after,
        best=result.best,
        **facts or {},
    )
    return Outcome(
        run=run.path,
        step=result.step,
        steps=result.steps,
        before=before,
        after=after,
        samples=samples or [],
        interrupted=stopped,
        resume=commands[0] if stopped else None,
        report=report,
        seconds=result.seconds,
        next=commands,
    )
