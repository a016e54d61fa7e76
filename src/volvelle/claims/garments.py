"""Fashion-MNIST for claims on images, and the plain training loop that they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def garments(train: int, test: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first so many pictures (n, 1, 28, 28) in 0 .. 1 with their labels, to train on and to test on.

    Raises VolvelleError when Fashion-MNIST cannot be had.
    """
    from volvelle.data.idx import read_idx_folder
    from volvelle.hub import fetch

    (images, labels), (others, their_labels) = read_idx_folder(fetch("fashion-mnist"))
    return (images[:train, None] / 255, labels[:train]), (others[:test, None] / 255, their_labels[:test])


@contextlib.contextmanager
def unless_missing(notes: list[str]) -> Iterator[None]:
    """What needs Fashion-MNIST: where it cannot be had, a note says so and the rest of the claim goes on."""
    from volvelle.errors import VolvelleError

    try:
        yield
    except VolvelleError as error:
        notes.append(f"nothing was trained: {error}")


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    """At most two threads of torch: a claim's seconds are declared for two cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], rows: int, steps: int, *, seed: int, rate: float = 2e-3
) -> None:
    """AdamW with a linear decay to zero over seeded batches of 64: `loss` maps row numbers to a scalar."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randint(rows, (64,), generator=draw)).backward()
        optimizer.step()
        decay.step()
    model.eval()
