"""What makes images larger or measures them, as functions of one tensor, small and of odd sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volvelle import functional
from volvelle.nn import Upsample2d

SHAPE = (2, 4, 5, 3)


def images(dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """Seeded images of `SHAPE`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *SHAPE[1:], generator=generator, dtype=torch.float64).to(dtype)


def switches(batch: int = 2, size: tuple[int, int] = (11, 7)) -> Tensor:
    """The indices of a pooling by 2 of images of this size, which makes 5 x 3 of them."""
    generator = torch.Generator().manual_seed(2)
    return F.max_pool2d(torch.randn(batch, 4, *size, generator=generator), 2, return_indices=True)[1]


class Up(nn.Module):
    """An Upsample2d with whatever else its method needs, as a function of the image alone."""

    def __init__(self, method: Any, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Upsample2d(4, 3, method=method, **options)
        self.indices = switches(1) if method == "unpool" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.indices is None:
            return self.layer(x, size=(9, 5))
        return self.layer(x, self.indices.expand(x.shape[0], -1, -1, -1), size=(11, 7))


CASES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    **{
        method: functools.partial(Up, method)
        for method in ("nearest", "bilinear", "bilinear_aligned", "pixel_shuffle", "transposed", "unpool")
    },
    "resize_nearest": lambda: lambda x: functional.resize_nearest(x, (8, 2)),
    "resize_bilinear": lambda: lambda x: functional.resize_bilinear(x, (8, 2)),
    "aligned": lambda: lambda x: functional.resize_bilinear(x, (4, 7), align_corners=True),
    "shuffle": lambda: lambda x: functional.pixel_shuffle(x, 2),
    "checkerboard": lambda: functional.checkerboard,
}
