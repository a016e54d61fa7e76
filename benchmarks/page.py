"""One page of all benchmarks: every figure with a target, from the JSON in results/, and whether it held.

    python -m benchmarks.page [--json]

It measures nothing. `volvelle bench all` runs the benchmarks one after another and prints this page at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import protocol
from benchmarks.targets import TARGETS, Step, Target
from volvelle.cli.console import table

Verdict = Literal["held", "NOT held", "no ratio", "no target", "not measured yet"]


@dataclass(frozen=True)
class Row:
    """One line of the page."""

    bench: str
    what: str
    value: float | None
    range: tuple[float, float] | None
    peer: str
    target: str
    verdict: Verdict
    why: str | None = None
    measured: str | None = None

    @property
    def figure(self) -> str:
        """The value with its range, or why there is none."""
        if self.value is None:
            return self.why or ""
        text = f"{self.value:.4g}" if self.value < 100 else f"{self.value:,.0f}"
        return text + (f" ({self.range[0]:.2f} to {self.range[1]:.2f})" if self.range else "")


class Absent:
    """Nothing was measured at that place."""


def find(record: Any, path: Sequence[Step]) -> Any:
    """What stands at `path`; `Absent` when a key is missing or no row has these values.

    >>> find({"rows": [{"n": 1}, {"n": 2, "speed": 3.0}]}, ("rows", {"n": 2}, "speed"))
    3.0
    """
    for step in path:
        if isinstance(step, Mapping):
            rows = record if isinstance(record, list) else []
            record = next((row for row in rows if all(row.get(k) == v for k, v in step.items())), Absent)
        else:
            record = record.get(step, Absent) if isinstance(record, Mapping) else Absent
    return record


def row_of(target: Target, record: Mapping[str, Any]) -> Row:
    """The line of a target, from the JSON of its benchmark."""
    machine = record.get("machine", {})
    rule = "" if target.bound is None else f"{'<=' if target.most else '>='} {target.bound:.4g} {target.unit}".strip()
    empty = Row(
        target.bench, target.what, None, None, versioned(target.peer, machine), rule, "not measured yet",
        measured=machine.get("date"),
    )  # fmt: skip
    found, whole = find(record, target.at), find(record, target.over) if target.over else 1.0
    if found is Absent or whole is Absent:
        return empty
    spread, why = None, "the peer drifted"
    if isinstance(found, Mapping):
        spread, why, found = found.get("range"), found.get("refused"), found["ratio"]
    if found is None:
        return dataclasses.replace(empty, verdict="no ratio", why=f"no ratio: {why}")
    span = (spread[0], spread[1]) if spread else None
    value = found / whole
    return dataclasses.replace(empty, value=value, range=span, verdict=verdict(value, target))


def versioned(peer: str, machine: Mapping[str, Any]) -> str:
    """The peer with its version, where the JSON has it.

    >>> versioned("transformers fp32", {"packages": {"transformers": "5.0"}})
    'transformers fp32 5.0'
    """
    known = {key: value for key, value in machine.items() if isinstance(value, str)} | machine.get("packages", {})
    name = peer.partition(",")[0].partition(" ")[0].replace("_", "-")
    return f"{peer} {known[name].partition(':')[0]}" if name in known else peer


def verdict(value: float, target: Target) -> Verdict:
    """Whether a value keeps the bound; NaN never does."""
    if target.bound is None:
        return "no target"
    return "held" if (value <= target.bound if target.most else value >= target.bound) else "NOT held"


def rows(read: Callable[[str], dict[str, Any]] = protocol.read) -> list[Row]:
    """All lines, in the order of the targets."""
    records = {target.bench: read(target.bench) for target in TARGETS}
    return [row_of(target, records[target.bench]) for target in TARGETS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page; exit code 1 when a target is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    every = rows()
    counts = Counter(row.verdict for row in every)
    if options.json:
        json.dump({"rows": [dataclasses.asdict(row) for row in every], "verdicts": counts}, sys.stdout)
        print()
    else:
        heads = ("bench", "what", "figure", "held against", "target", "verdict", "measured")
        cells = [
            (row.bench, row.what, row.figure, row.peer, row.target, row.verdict, (row.measured or "")[:10])
            for row in every
        ]
        table(heads, cells)
        print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if counts["NOT held"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
