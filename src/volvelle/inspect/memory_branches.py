"""Code that computes something else on fake tensors than it would on real data, or that repeats itself.

transformers does: on fake tensors it believes that a graph is being traced and materialises attention masks that an
eager run leaves out. A plan wants the eager branch. Its question goes through one function, which answers "no" here,
and every place that asked is written down.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor

from volvelle.inspect.memory_values import KnownValues, caller
from volvelle.parts.attention import tiled
from volvelle.parts.attention.spec import Terms
from volvelle.parts.attention.tiles import Tile

_ASKED = (("transformers.utils.import_utils", "is_fake_tensor"),)


@contextlib.contextmanager
def eager_branches(values: KnownValues, *, eager: bool = True) -> Iterator[None]:
    """Inside, the functions that ask for fake tensors answer as in an eager run (or, with `eager` off, truthfully).

    Each place that asks is noted in `values.assumptions` with the branch that it took.
    """
    with contextlib.ExitStack() as stack:
        for module_name, name in _ASKED:
            module = sys.modules.get(module_name)
            if module is not None and hasattr(module, name):
                stack.enter_context(_answering(module, name, values, eager))
        yield


@contextlib.contextmanager
def one_tile() -> Iterator[None]:
    """Inside, our attention in tiles computes the first tile of a call only, and packed rows together.

    The others would allocate and release the same again; results and gradients, whose values are not known anyway, have
    their whole size from the start. Without it a plan of long packed rows takes minutes.
    """
    original = tiled.tile_rows

    def first(*cut: Any) -> Iterator[tuple[int, int, list[Tile]]]:
        for start, end, tiles in itertools.islice(original(*cut), 1):
            yield start, end, tiles[:1]

    instead = ((tiled, "tile_rows", first), (Terms, "by_row", property(lambda self: False)))
    before = [getattr(owner, name) for owner, name, _ in instead]
    for owner, name, value in instead:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(instead, before, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def _answering(module: Any, name: str, values: KnownValues, eager: bool) -> Iterator[None]:
    original = getattr(module, name)

    def is_fake(x: Any) -> bool:
        fake = isinstance(x, FakeTensor)
        if fake:
            branch = "as in an eager run" if eager else "as when a graph is traced"
            # The asking function sits in the same file as the question's wrapper: name the file that called both.
            values.assume(caller(skip=module.__name__), f"branches on fake tensors; took the branch {branch}")
        return fake and not eager

    setattr(module, name, is_fake)
    try:
        yield
    finally:
        setattr(module, name, original)
