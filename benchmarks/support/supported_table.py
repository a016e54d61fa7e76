"""The table of what every public function can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = {
    "fp64": "fp64", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "gradient": "gradient",
    "second": "second derivative", "compile": "compile", "export": "export",
}  # fmt: skip


def supported(record: Mapping[str, Any]) -> list[str]:
    """A row a function, a column a trial."""
    lines = [f"| function | family | {' | '.join(HEADS.values())} |", "|---" * (len(HEADS) + 2) + "|"]
    for row in record["rows"]:
        lines.append(f"| `{row['name']}` | {row['family']} | {' | '.join(row[trial] for trial in HEADS)} |")
    machine = record["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    return [*lines, "", f"Tried with {versions} on a CPU, {machine['date'][:10]}, by `python -m benchmarks.supported`."]
