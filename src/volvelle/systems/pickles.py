"""Checkpoints that are pickles, opened without running anything they hold.

torch's weights_only=True admits tensors and plain containers. Files that Lightning wrote hold more beside the weights:
names of callbacks, hyperparameters of OmegaConf. Those names, and no others, are read as empty objects of ours; any
other name, such as a function to be called, is refused with the file.
"""

from __future__ import annotations

import os
from typing import Any

import torch

BOOKKEEPING = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "argparse.Namespace", "numpy.",
    "collections.defaultdict", "typing.Any", "pathlib.",
)  # fmt: skip
"""Beginnings of names that trainers leave in their checkpoints beside the weights."""


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """What a .pt, .pth, .bin or .ckpt file holds, on the CPU. Raises pickle.UnpicklingError for what could run code."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path))
    except (ValueError, RuntimeError):
        names = []  # not the zip that torch has written since 1.6: nothing beyond weights is admitted
    if not names or not all(name.startswith(BOOKKEEPING) for name in names):
        return torch.load(path, map_location="cpu", weights_only=True)
    with torch.serialization.safe_globals([(_empty(), name) for name in names]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _empty() -> type:
    """A class whose objects take anything and keep nothing."""

    class Empty:
        def __new__(cls, *given: Any, **named: Any) -> Any:
            return super().__new__(cls)

        def __init__(self, *given: Any, **named: Any):
            pass

        def __setstate__(self, state: Any) -> None:
            pass

        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    return Empty
