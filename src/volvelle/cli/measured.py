"""How `eval` says what to measure on and prints what it found: figures, and classes with theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from volvelle.cli.console import result, say, table
from volvelle.errors import UsageError


def chosen_part(data: str, parts: Sequence[str], split: str | None) -> str:
    """The part of the data to measure on: the one asked for, else val or test, else the first.

    >>> chosen_part("camvid", ["train", "val"], None)
    'val'
    """
    chosen = split or next((name for name in ("val", "test") if name in parts), parts[0])
    if chosen not in parts:
        raise UsageError(f"{data}: has no {split} part", tip=f"it has: {', '.join(filter(None, parts)) or 'no parts'}")
    return chosen


def percent(value: float) -> str:
    """A share in percent; "none" for what does not exist, which is NaN or below 0.

    >>> percent(0.25), percent(float("nan"))
    ('25.00 %', 'none')
    """
    return f"{100 * value:.2f} %" if value >= 0 else "none"


def figures(metrics: Mapping[str, float], form: Callable[[float], str] = "{:.4f}".format) -> None:
    """Print one figure a line, under each other."""
    wide = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        say(f"{name:<{wide}} {form(value)}")


def by_class(
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    rows: Iterable[Sequence[Any]],
    columns: Mapping[str, str],
    worst: Sequence[str],
) -> None:
    """Print a table of classes, the worst pictures and the metrics; the record is `facts` with all of these.

    A row is a class's name and its values, of which whole numbers are counts and others shares; `columns` are the
    values' names in the record with their headings.
    """
    rows = list(rows)
    shown = [[f"{value:,}" if isinstance(value, int) else percent(value) for value in values] for _, *values in rows]
    table(("class", *columns.values()), [(row[0], *values) for row, values in zip(rows, shown, strict=True)])
    say("", *(f"worst    {name}" for name in worst), "")
    figures(metrics, percent)
    classes = {name: dict(zip(columns, values, strict=True)) for name, *values in rows}
    result({**facts, **metrics, "classes": classes, "worst": worst})
