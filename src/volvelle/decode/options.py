"""How the next token is chosen, as frozen data. Importing this file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from volvelle.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Options for choosing tokens; the defaults are greedy decoding.

    The rules apply in this order, as in transformers: `repetition_penalty` (> 1 makes tokens of the prompt and of the
    answer less likely; Keskar et al. 2019), `temperature` (0 = always the likeliest token), `top_k` (keep the k
    likeliest), `top_p` (keep the likeliest tokens up to that share; Holtzman et al. 2020), `min_p` (keep tokens of at
    least that fraction of the likeliest one's probability; Nguyen et al. 2024). With a `seed` a request gives the same
    tokens every time, whatever else is in its batch; without one it is drawn from torch's global generator.

    >>> Sampling(temperature=0.7, top_p=0.9).greedy, Sampling().greedy
    (False, True)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            f"temperature must be 0 (greedy) or at least 1e-6, got {self.temperature}": (
                self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
            ),
            f"top_k must be at least 1, got {self.top_k}": self.top_k is None or self.top_k >= 1,
            f"top_p must be in (0, 1], got {self.top_p}": self.top_p is None or 0 < self.top_p <= 1,
            f"min_p must be in [0, 1], got {self.min_p}": self.min_p is None or 0 <= self.min_p <= 1,
            f"repetition_penalty must be above 0, got {self.repetition_penalty}": (
                0 < self.repetition_penalty < float("inf")
            ),
        }
        for message, holds in checks.items():
            if not holds:
                raise UsageError(f"sampling: {message}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0
