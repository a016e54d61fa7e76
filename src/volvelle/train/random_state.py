"""The states of every random generator that training may use: Python, NumPy, torch on CPU and on each GPU."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The generators' states as nested plain data and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy = (str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(gauss))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back into `random_state`'s result."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    # Another number of GPUs than at saving cannot continue bit for bit; the seeds of those present still can.
    for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(saved, device)


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Whatever the block draws, the generators afterwards are where they were: evaluation must not steer training."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
