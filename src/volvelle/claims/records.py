"""What `volvelle claim` left behind, read back and put into words. Without torch.

The command line, the pages and the studio say the same of a figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from volvelle.errors import VolvelleError


def read(name: str, results: Path) -> dict[str, Any] | None:
    """The record of a claim in the folder `results`; None when there is none."""
    path = results / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VolvelleError(
            f"{path}: not the record of a claim ({error})", tip=f"volvelle claim {name} writes it anew"
        ) from error
    if not isinstance(record, dict) or record.get("claim") != name:
        raise VolvelleError(f"{path}: not a record of the claim {name}", tip=f"volvelle claim {name} writes it anew")
    return record


def figure(finding: Mapping[str, Any]) -> str:
    """The value of a finding with its unit, and its spread in parentheses.

    >>> figure({"value": 1.23456, "unit": "x", "spread": [1.0, 1.5]})
    '1.235 x (1 to 1.5)'
    >>> figure({"value": 0, "unit": "", "spread": None})
    '0'
    """
    value = finding["value"]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    spread = finding["spread"]
    span = f" ({spread[0]:.4g} to {spread[1]:.4g})" if spread else ""
    return f"{text} {finding['unit']}".strip() + span


def mark(held: bool | None) -> str:
    """Whether a bound held: "yes", "no", or nothing for a figure that is only reported."""
    return "" if held is None else "yes" if held else "no"


def bounds(record: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the bounds of a record held, and how many there are."""
    judged = [finding["held"] for finding in record["findings"] if finding["held"] is not None]
    return sum(judged), len(judged)


def deciding(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The finding behind the verdict: the first bound that did not hold, else the first that did."""
    judged = [finding for finding in record["findings"] if finding["held"] is not None]
    return next((finding for finding in judged if not finding["held"]), judged[0] if judged else None)
