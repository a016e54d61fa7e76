"""Tables that follow from the code alone."""

from __future__ import annotations

from volvelle.hub import ASSETS
from volvelle.parts.attention.capabilities import table


def capabilities() -> list[str]:
    """What every back end of attention serves, asked of the back ends."""
    return [*table("cpu"), "", *table("cuda")]


def assets() -> list[str]:
    """What the hub fetches by name: source, licence, size."""
    lines = ["| name | what | source | licence | stored |", "|---|---|---|---|---|"]
    for name, asset in ASSETS.items():
        size = f"{asset.size / 1e6:.1f} MB"
        lines.append(f"| `{name}` | {asset.what} | {asset.source} | {asset.licence} | {size} |")
    return lines
