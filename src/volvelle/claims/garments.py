"""Fashion-MNIST for claims on images, and the plain training loop that they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

PIXEL_CLASSES = 11
"""The ground and the ten garments."""


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


def scenes(images: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 56, 56) of four garments each in noise, and the class of every pixel, 0 for the ground."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count, 2, 2), generator=draw)
    parts, classes = images[chosen][..., 0, :, :], labels[chosen] + 1  # (count, 2, 2, 28, 28), (count, 2, 2)
    target = (parts > 0.15).long() * classes[..., None, None]
    flat = lambda tensor: tensor.permute(0, 1, 3, 2, 4).reshape(count, 56, 56)  # noqa: E731
    noise = 0.2 * torch.randn(count, 56, 56, generator=draw)
    return (flat(parts) + noise)[:, None], flat(target)


def learn_scenes(net: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    """Train a network to name every pixel of 2000 such pictures."""
    import torch
    from torch.nn.functional import cross_entropy

    x, y = scenes(*data, 2000, seed=seed + 1)
    weights = torch.ones(PIXEL_CLASSES)
    weights[0] = 0.3  # more than half of the pixels are ground
    train(net, lambda rows: cross_entropy(net(x[rows]), y[rows], weights), len(x), steps, seed=seed, rate=5e-3)


def named_pixels(net: nn.Module, pictures: Tensor) -> Tensor:
    """The class that a network gives every pixel, (n, 56, 56)."""
    import torch

    with torch.no_grad():
        return torch.cat([net(part).argmax(1) for part in pictures.split(100)])
