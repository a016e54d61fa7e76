"""Training and evaluation mode, for the time of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) in all of `modules`; afterwards every part of them is in the mode it was in.

    >>> net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    >>> with evaluating(net):
    ...     net.training, net[0].training
    (False, False)
    >>> net.training, net[0].training, net[1].training
    (True, True, False)
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
