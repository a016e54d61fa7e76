"""What a claim is, what a measurement of it says, and how the files of this package are found. Without torch."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

from volvelle.errors import UsageError, VolvelleError, did_you_mean

Budget = Literal["quick", "full"]
Verdict = Literal["held", "not held", "not measurable here"]

SECONDS: Mapping[str, int] = {"quick": 60, "full": 900}
"""The most that a claim may declare for each budget, on two cores."""


@dataclass(frozen=True)
class Paper:
    """Where the sentence stands."""

    authors: str
    year: int
    title: str
    where: str
    """Section, table, figure or equation."""
    url: str | None = None

    def __str__(self) -> str:
        return f"{self.authors} {self.year}, {self.title}, {self.where}"


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, with the catalogue entry of the technique that it is about.

    `summary` and `summary_zh` say in a sentence or two what the technique is for; `parts` are the public names that
    implement it, `recipe` the command that uses it. `seconds` is the declared time of each budget on two cores.
    """

    title: str
    family: str
    paper: Paper
    sentence: str
    measured_by: str
    summary: str
    summary_zh: str
    seconds: Mapping[Budget, int]
    parts: tuple[str, ...] = ()
    recipe: str | None = None

    def __post_init__(self) -> None:
        for budget, seconds in self.seconds.items():
            if not 0 < seconds <= SECONDS[budget]:
                raise ValueError(f"Claim {self.title!r}: {budget} must take at most {SECONDS[budget]} s, got {seconds}")


@dataclass(frozen=True)
class Finding:
    """One figure: what was measured, its value and unit, its spread over repeats, and the bound it was held against.

    `bound` is a readable rule such as "<= 1.3"; `held` is None for a figure that is only reported.
    """

    what: str
    value: float | int | str
    unit: str = ""
    spread: tuple[float, float] | None = None
    bound: str | None = None
    held: bool | None = None


@dataclass(frozen=True)
class Measurement:
    """What `measure` returns. The claim held when every finding with a bound held.

    `peers` maps each oracle to its version; `setting` holds shapes, dtypes and seeds; `pictures` maps a title to an
    SVG. `unmeasurable` says why nothing could be measured here (no second GPU, a missing extra).
    """

    findings: Sequence[Finding] = ()
    peers: Mapping[str, str] = field(default_factory=dict)
    setting: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    unmeasurable: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Held, not held, or not measurable here."""
        judged = [finding.held for finding in self.findings if finding.held is not None]
        if self.unmeasurable is not None or not judged:
            return "not measurable here"
        return "held" if all(judged) else "not held"


def at_most(what: str, value: float, bound: float, unit: str = "", **more) -> Finding:
    """A finding that holds when value <= bound.

    >>> at_most("error", 0.5, 1.0).held
    True
    """
    return Finding(what, value, unit, bound=f"<= {bound:g}", held=value <= bound, **more)


def at_least(what: str, value: float, bound: float, unit: str = "", **more) -> Finding:
    """A finding that holds when value >= bound; NaN never holds."""
    return Finding(what, value, unit, bound=f">= {bound:g}", held=value >= bound, **more)


def names() -> list[str]:
    """Names of all claims: the files of this package that define CLAIM, found without importing them."""
    return list(_names())


def load(name: str) -> ModuleType:
    """Import one claim's module. A name that does not exist suggests the nearest."""
    if name not in names():
        raise UsageError(f"claim {name}: there is no such claim", tip=did_you_mean(name, names()))
    module = importlib.import_module(f"volvelle.claims.{name.replace('-', '_')}")
    if not isinstance(getattr(module, "CLAIM", None), Claim) or not callable(getattr(module, "measure", None)):
        raise VolvelleError(f"{module.__file__}: a claim file needs CLAIM (a Claim) and measure(budget)")
    return module


def catalogue() -> Iterator[tuple[str, Claim]]:
    """Every claim with its catalogue entry, by name."""
    for name in names():
        yield name, load(name).CLAIM


@functools.cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(_name(path) for path in _files()))


def _files() -> Iterator[Path]:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = (t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets)
        if any(isinstance(target, ast.Name) and target.id == "CLAIM" for target in targets):
            yield path


def _name(path: Path) -> str:
    return path.stem.replace("_", "-")
