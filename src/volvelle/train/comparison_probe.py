"""A method's cost before it is trained: two real steps on the largest batch, and the memory that they took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from volvelle.data.loader import Batch, Loader
from volvelle.data.tokens import batch_tokens
from volvelle.inspect.memory_measure import measure_peak
from volvelle.train.adaptation import adapt_base, open_base, stored_as
from volvelle.train.estimate import largest_batch
from volvelle.train.isolation import Isolation
from volvelle.train.language import LanguageObjective
from volvelle.train.player import Player, to_device
from volvelle.train.precision import Precision
from volvelle.train.random_state import seed_all, untouched_random_state
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.adapt import AdaptLanguage

AVERAGED = 50
"""Batches whose mean length stands for all."""


class Probe(NamedTuple):
    """Bytes of tensors at the peak of a step, seconds of an average one, batches in an epoch."""

    peak: int
    seconds: float
    batches: int


def probe(trial: AdaptLanguage, device: torch.device, loader_of: Callable[[Any, AdaptLanguage], Loader]) -> Probe:
    """Load the model, take the loop's own step twice on the largest batch, and forget it all."""
    seconds, batches, share = 0.0, 0, 1.0

    def setup() -> Callable[[], None]:
        nonlocal batches, share
        seed_all(trial.seed)
        model = open_base(trial.model, stored_as(trial, device), device)
        adapt_base(model, trial)
        loader = loader_of(model, trial)
        largest = largest_batch(loader)
        batches, share = len(loader), _mean_tokens(loader) / max(1.0, batch_tokens(largest))
        batch = Batch(value=to_device(largest, device), ids=[])
        objective = LanguageObjective(model, trial)
        objective.train_mode()
        [phase] = objective.phases(trial.steps or 1)
        modules = objective.modules()
        player = Player(phase, Isolation([phase], modules), Precision(trial.precision, device), Ranks())

        def step() -> None:
            nonlocal seconds
            began = time.monotonic()
            player.update([batch] * trial.accumulate, loader.describe)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - began

        return step

    with untouched_random_state():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step = setup()
            step()
            step()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = measure_peak(setup).peak
    return Probe(peak, seconds * share, max(1, batches // trial.accumulate))


def _mean_tokens(loader: Loader) -> float:
    plan = loader.plan(0)
    some = plan[:: max(1, len(plan) // AVERAGED)]
    return sum(batch_tokens(loader.load(ids)) for ids in some) / len(some)
