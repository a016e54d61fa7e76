"""Buffers of modules, kept to be put back: a forward pass moves them, and not every one of them is to count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Buffer(NamedTuple):
    """A module's buffer as it was: the tensor that it had, and what that held."""

    module: nn.Module
    name: str
    tensor: Tensor
    held: Tensor

    @torch.no_grad()
    def restore(self) -> None:
        """Put it back, also where the module has another tensor by now.

        Always copied: batch norm moves its statistics without raising their version counter.
        """
        self.module._buffers[self.name] = self.tensor
        self.tensor.copy_(self.held)


def buffers_of(module: nn.Module) -> list[Buffer]:
    """Every buffer of a module and the modules in it, as it is.

    >>> norm = nn.BatchNorm1d(1)
    >>> before = buffers_of(norm)
    >>> norm.running_mean = norm(torch.ones(2, 1)).sum(0).detach() + 7
    >>> for buffer in before:
    ...     buffer.restore()
    >>> norm.running_mean, norm.num_batches_tracked
    (tensor([0.]), tensor(0))
    """
    held = ((part, name, value) for part in module.modules() for name, value in part._buffers.items())
    return [Buffer(part, name, value, value.detach().clone()) for part, name, value in held if value is not None]
