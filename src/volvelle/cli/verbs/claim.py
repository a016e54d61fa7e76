"""`volvelle claim`: measure what the papers say, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from volvelle.cli.console import duration, result, say, table

EXAMPLES = ("volvelle claim autograd", "volvelle claim budget=full results=benchmarks/results/claims")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    names: Positional[tuple[str, ...]] = ()
    """Claims from `volvelle ls claims`; all of them when left out."""
    budget: Literal["quick", "full"] = "quick"
    """quick: at most a minute a claim; full: at most 15 minutes, with more seeds and larger sizes."""
    results: Path = Path("runs/claims")
    """Folder for the JSON of each claim."""


def main(options: Options) -> int:
    """Measure the claims one after another; exit code 1 when one did not hold."""
    from volvelle.claims.claim import load, names
    from volvelle.claims.run import run_claim

    chosen = list(options.names) or names()
    claims = {name: load(name).CLAIM for name in chosen}
    declared = sum(claim.seconds.get(options.budget, 0) for claim in claims.values())
    say(f"{len(chosen)} claims, budget {options.budget}: at most {duration(declared)}")
    records = []
    for name, claim in claims.items():
        say("", f"{name}: {claim.sentence}", f"  {claim.paper}", f"  measured by {claim.measured_by}")
        record = run_claim(name, options.budget, options.results)
        _show(record)
        records.append(record)
    held = sum(record["verdict"] == "held" for record in records)
    say("", f"{held} of {len(records)} held; written to {options.results}/")
    result({"claims": records})
    return 0 if all(record["verdict"] != "not held" for record in records) else 1


def _show(record: dict[str, Any]) -> None:
    from volvelle.claims.records import figure, mark

    rows = [(f["what"], figure(f), f["bound"] or "", mark(f["held"])) for f in record["findings"]]
    if rows:
        table(("measured", "figure", "bound", "held"), rows)
    for note in record["notes"]:
        say(f"  {note}")
    peers = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    why = f" ({record['why']})" if record["why"] else ""
    say(f"{record['verdict']}{why}; {record['seconds']} s; against {peers or 'a formula'}")
