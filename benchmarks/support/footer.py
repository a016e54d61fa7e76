"""What stands below every table of figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def footer(name: str, machine: Mapping[str, Any], above: str = "ours is faster") -> str:
    """How the figures of `python -m benchmarks.NAME` were made, and on what."""
    packages = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    threads = f"{machine['threads']} threads, " if "threads" in machine else ""  # else each row says how many
    before: dict[tuple[str, str], list[str]] = {}
    for part, of in machine.get("earlier", {}).items():
        if (of["cpu"], of["date"][:10]) != (machine["cpu"], machine["date"][:10]):
            before.setdefault((of["cpu"], of["date"][:10]), []).append(part)
    kept = "".join(f" On {cpu}, {date}: {', '.join(parts)}." for (cpu, date), parts in before.items())
    return (
        f"Medians of at least 5 interleaved rounds; a ratio above 1 means that {above}, its range over the "
        f"rounds stands in parentheses. {machine['cpus']} cores of {machine['cpu']}, {threads}"
        f"Python {machine['python']}, {packages}, {machine['date'][:10]}. Made by `python -m benchmarks.{name}`.{kept}"
    )
