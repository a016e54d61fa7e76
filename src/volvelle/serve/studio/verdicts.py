"""What claims were found to be: the records that `volvelle claim` wrote here, and those that the checkout came with."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import volvelle
from volvelle.claims.run import machine

SHIPPED = Path(volvelle.__file__).parents[2] / "benchmarks" / "results" / "claims"
"""The project's own measurements; only a checkout has them."""
SAME = ("processor", "cores", "system")
"""What two records must share to be of the same kind of machine."""


@dataclass(frozen=True)
class Found:
    """One record of a claim, and where it comes from."""

    record: Mapping[str, Any]
    folder: Path
    own: bool
    """Measured in this folder (`volvelle claim`), not shipped with the checkout."""

    @property
    def here(self) -> bool:
        """Whether its machine is of this machine's kind."""
        theirs, ours = self.record.get("machine", {}), this_machine()
        return all(theirs.get(key) == ours[key] for key in SAME)

    def short(self) -> dict[str, Any]:
        """What a card or a row says of it."""
        record = self.record
        return {
            "verdict": record.get("verdict"),
            "why": record.get("why"),
            "budget": record.get("budget"),
            "seconds": record.get("seconds"),
            "measured": record.get("measured"),
            "machine": record.get("machine", {}),
            "own": self.own,
            "here": self.here,
            "main": main_finding(record),
        }

    def picture(self, title: str) -> Path | None:
        """The file of one of the record's pictures."""
        if title not in self.record.get("pictures", ()) or Path(title).name != title:
            return None
        path = self.folder / f"{self.record['claim']}-{title}.svg"
        return path if path.is_file() else None


def main_finding(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The figure to show where there is room for one: the first that failed, else the first that was judged."""
    judged = [one for one in record.get("findings", ()) if one.get("held") is not None]
    return next((one for one in judged if not one["held"]), judged[0] if judged else None)


class Verdicts:
    """The records of both folders; read when they are asked for, so that a new measurement shows at once."""

    def __init__(self, own: Path, shipped: Path | None = SHIPPED):
        self.own, self.shipped = own, shipped

    def of(self, claim: str) -> list[Found]:
        """The records of a claim: this folder's first."""
        found = (_read(self.own, claim, own=True), _read(self.shipped, claim, own=False))
        return [one for one in found if one is not None]

    def best(self, claim: str | None) -> Found | None:
        """The record that speaks for a claim: one of this machine before one of another."""
        found = self.of(claim) if claim else []
        return min(found, key=lambda one: (not one.here, not one.own), default=None)


@functools.cache
def this_machine() -> dict[str, Any]:
    """Processor, cores and system of this machine."""
    return machine()


def _read(folder: Path | None, claim: str, *, own: bool) -> Found | None:
    if folder is None:
        return None
    try:
        record = json.loads((folder / f"{claim}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not measured, or a file of another program
    good = isinstance(record, dict) and record.get("claim") == claim
    return Found(record, folder, own) if good else None
