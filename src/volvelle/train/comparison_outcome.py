"""What a comparison of methods found: a row a method. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from volvelle.train.outcome import Outcome

HEADERS = (
    "method", "trained %", "stored %", "peak memory", "s/step", "learning rate", "held-out loss", "of full's gain",
    "BLEU",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method at its best learning rate, or the model as it came (`base`, which costs nothing).

    Shares are of the model's own parameters. `peak` are bytes of tensors in a training step on the largest batch,
    `seconds` the median of a step. `tuning` maps every learning rate to the loss by which the best was chosen. `gain`
    is the fall of the held-out loss over that of full fine-tuning, where that is compared too. `run` is the folder of
    the best training.
    """

    method: str
    loss: float
    trained: float = 0.0
    stored: float = 0.0
    peak: int | None = None
    seconds: float | None = None
    rate: float | None = None
    tuning: dict[str, float] = field(default_factory=dict)
    gain: float | None = None
    bleu: float | None = None
    run: str | None = None

    def cells(self) -> list[object]:
        """The row under HEADERS."""
        return [
            self.method,
            f"{100 * self.trained:.3g}" if self.trained else "",
            f"{100 * self.stored:.3g}" if self.stored else "",
            f"{self.peak / 1e9:.2f} GB" if self.peak else "",
            f"{self.seconds:.2f}" if self.seconds else "",
            f"{self.rate:g}" if self.rate else "",
            f"{self.loss:.4f}",
            f"{100 * self.gain:.1f} %" if self.gain is not None else "",
            f"{self.bleu:.1f}" if self.bleu is not None else "",
        ]


@dataclass(frozen=True)
class Compared(Outcome):
    """The outcome of a comparison, with its table."""

    rows: list[Row] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The outcome as plain data, for machines."""
        return {**super().record(), "rows": [dataclasses.asdict(row) for row in self.rows]}


def with_gains(rows: list[Row]) -> list[Row]:
    """The rows with `gain`, where the base's and full fine-tuning's losses are known and differ.

    >>> [row.gain for row in with_gains([Row("base", 3.0), Row("full", 1.0), Row("lora", 1.5)])]
    [None, 1.0, 0.75]
    """
    losses = {row.method: row.loss for row in rows}
    if "full" not in losses or losses["full"] >= losses["base"]:
        return rows
    whole = losses["base"] - losses["full"]
    return [
        row if row.method == "base" else dataclasses.replace(row, gain=(losses["base"] - row.loss) / whole)
        for row in rows
    ]
