"""What one step is fed, at any batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_iter, tree_map_only

from volvelle.errors import VolvelleError
from volvelle.inspect.memory_values import KnownValues


class Inputs:
    """Inputs by batch size: from a function `size -> inputs`, or from an example whose first dimension is the batch.

    An example may be a tensor, or a tuple, list or mapping of tensors, real or on the meta device. A tensor that stands
    in it twice is one tensor of the step too.

    >>> inputs = Inputs({"x": torch.zeros(4, 3)})
    >>> inputs.size, inputs.real(2)["x"].shape
    (4, torch.Size([2, 3]))
    """

    def __init__(self, batch: Callable[[int], Any] | Any, size: int | None = None):
        self.batch = batch
        if callable(batch) and not isinstance(batch, Tensor):
            self.size = 1 if size is None else size
        else:
            tensors = [t for t in tree_iter(batch) if isinstance(t, Tensor) and t.dim() > 0]
            if not tensors:
                raise VolvelleError(
                    f"plan_memory: batch must be a function of its size or hold tensors, got {type(batch).__name__}"
                )
            self.size = int(tensors[0].shape[0]) if size is None else size
        if self.size < 1:
            raise VolvelleError(f"plan_memory: the batch size must be positive, got {self.size}")

    @property
    def elements(self) -> int:
        """Elements of the largest input of whole numbers, for one sample; at least 1."""
        example = self.batch(1) if callable(self.batch) and not isinstance(self.batch, Tensor) else self.batch
        tensors = [t for t in tree_iter(example) if isinstance(t, Tensor) and t.dim() > 0 and not t.is_floating_point()]
        return max([1, *(t[:1].numel() for t in tensors)])

    def real(self, size: int) -> Any:
        """Real inputs: rows of the example, repeated."""
        if callable(self.batch) and not isinstance(self.batch, Tensor):
            return self.batch(size)
        return _each(lambda example: _rows(example, size), self.batch)

    def fake(self, size: int, values: KnownValues) -> Any:
        """The same under a FakeTensorMode; small examples keep their values."""
        if callable(self.batch) and not isinstance(self.batch, Tensor):
            return self.batch(size)

        def convert(example: Tensor) -> Tensor:
            shape = (size, *example.shape[1:]) if example.dim() else ()
            fake = torch.empty(shape, dtype=example.dtype)
            if example.is_meta:
                return fake
            with unset_fake_temporarily():
                return values.give(fake, _rows(example, size))

        return _each(convert, self.batch)


def _each(convert: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with each of its tensors converted once, wherever it stands."""
    made: dict[int, Tensor] = {}

    def once(example: Tensor) -> Tensor:
        if id(example) not in made:
            made[id(example)] = convert(example)
        return made[id(example)]

    return tree_map_only(Tensor, once, batch)


def _rows(example: Tensor, size: int) -> Tensor:
    if example.is_meta:
        example = torch.zeros(example.shape, dtype=example.dtype)
    if example.dim() == 0 or example.shape[0] == size:
        return example.clone()
    if example.shape[0] > size:
        return example[:size].clone()
    return example[:1].expand(size, *example.shape[1:]).clone()
