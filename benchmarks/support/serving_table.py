"""The table of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import protocol
from benchmarks.support.footer import footer


def serving(record: Mapping[str, Any]) -> list[str]:
    """Tokens a second beside loops over transformers, and a minute of streams."""
    lines: list[str] = []
    for row in record["rows"]:
        who = f"{row['clients']} clients" + (f", draft={row['draft']}" if row["draft"] else "")
        if row["what"] == "speed":
            lines += ["| who | tokens a second | ours : it |", "|---|---|---|"]
            for name, rate in row["rates"].items():
                told = "" if name == "ours" else protocol.shown(row["speed"][name])
                lines.append(f"| {name}, {who} | {rate:.0f} | {told} |")
        else:
            exact = row.get("exact", "bitwise")
            lines += [
                f"A minute of streams, {who}, exact={exact}: {row['answers']} answers, {row['different']} of them "
                f"different from the one given alone; {row['tokens_a_second']:.0f} tokens a second; between two tokens "
                f"{1e3 * row['gap_median']:.0f} ms, p95 {1e3 * row['gap_p95']:.0f} ms; to the first one p95 "
                f"{row['first_p95']:.1f} s; memory {row['memory_mib'][0]} to {max(row['memory_mib'])} MiB.",
            ]
        lines.append("")
    return [*lines, "SmolLM2-135M in bf16. " + footer("serving", record["machine"])]
