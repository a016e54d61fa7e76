"""Tables that follow from the code alone."""

from __future__ import annotations

from volvelle.export import PUBLIC, import_parts
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


def names() -> list[str]:
    """Every public name: since when, stable or not, the function that a Module wraps, other names."""
    import_parts()
    lines = ["| name | since | | wraps | also |", "|---|---|---|---|---|"]
    for entry in PUBLIC:
        twin = f"`{entry.twin.__name__}`" if entry.twin else ""
        also = ", ".join(f"`{name}`" for name in entry.aliases)
        also += "".join(f", `{name}` until {version}" for name, version in entry.deprecated.items())
        kind = "stable" if entry.stable else "experimental"
        lines.append(f"| `{entry.name}` | {entry.since} | {kind} | {twin} | {also} |")
    return lines
