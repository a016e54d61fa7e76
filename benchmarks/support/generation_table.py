"""The tables of pictures from priors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import protocol
from benchmarks.support.footer import footer


def generation(record: Mapping[str, Any]) -> list[str]:
    """Speeds of sampling and with drafts, and what was measured to choose windows and positions."""
    lines: list[str] = []
    if "sampling" in record:
        rows = record["sampling"]
        lines += [
            f"| pictures of {rows[0]['codes']} codes at once "
            "| codes a second | : transformers | : no cache | same codes |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            rate = row["batch"] * row["codes"] / row["seconds"]["ours"]["wall_median"]
            speed = row["speed"]
            told = " | ".join(
                protocol.shown(speed[who]) if who in speed else "" for who in ("transformers", "no cache")
            )
            lines.append(f"| {row['batch']} | {rate:,.0f} | {told} | {row['same']['ours']:.2%} |")
        lines.append("")
    if "drafts" in record:
        lines += [
            "| drafts of image tokens | temperature | : plain | codes a step |",
            "|---|---|---|---|",
            *(
                f"| {row['drafter']} for {row['run']} | {row['temperature']:g} | {protocol.shown(row['speed'])} "
                f"| {row['codes_per_step']:.2f} |"
                for row in record["drafts"]
            ),
            "",
        ]
    if "window" in record:
        found = record["window"]
        lines += [
            f"| {found['pictures']} pictures of {found['rows']} x {found['columns']} codes, twice the trained side "
            "| nats a code outside it |",
            "|---|---|",
            *(f"| {who} | {nats:.4f} |" for who, nats in found["nats"].items()),
            "",
        ]
    if "positions" in record:
        found = record["positions"]
        lines += [
            f"| positions, after {found['steps']:,} steps on the codes of {found['run']} | held-out nats a code |",
            "|---|---|",
            *(f"| {who} | {nats:.4f} |" for who, nats in found["nats"].items()),
            "",
        ]
    return [*lines, footer("generation", record["machine"])]
