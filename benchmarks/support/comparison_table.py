"""The table of methods of adapting under one budget, for docs/adapt.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = (
    "method",
    "trained",
    "stored",
    "memory of a step",
    "s a step",
    "learning rate",
    "held-out loss",
    "of full's gain",
)


def comparison(record: Mapping[str, Any]) -> list[str]:
    """A row a method; the first is the model as it was."""
    lines = [f"| {' | '.join(HEAD)} | BLEU |", "|---" * (len(HEAD) + 1) + "|"]
    for row in record["rows"]:
        told = ["-"] * 5
        if row["rate"] is not None:
            told = [f"{row['trained']:.3%}", f"{row['stored']:.3%}", f"{row['peak'] / 2**20:.0f} MiB",
                    f"{row['seconds']:.2f}", f"{row['rate']:g}"]  # fmt: skip
        gain = "-" if row["gain"] is None else f"{row['gain']:.1%}"
        lines.append(f"| {row['method']} | {' | '.join(told)} | {row['loss']:.3f} | {gain} | {row['bleu']:.1f} |")
    budget, machine, lora = record["budget"], record["machine"], record["budget"]["lora"]
    return [
        *lines,
        "",
        f"{record['model']} on WebNLG, {budget['precision']}, {budget['steps']} steps of {budget['batch']} examples; "
        f"LoRA of rank {lora['rank']} on {lora['targets']} layers. Loss of {budget['held_out_size']} and BLEU of "
        f"{budget['samples']} examples of the development set. {record['seconds'] / 60:.0f} minutes in all, on "
        f"{machine['cpus']} cores of {machine['cpu']} that were not idle beside it; torch "
        f"{machine['packages']['torch']}, {record['date'][:10]}. Made by `python -m benchmarks.comparison`.",
    ]
