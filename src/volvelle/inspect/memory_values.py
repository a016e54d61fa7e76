"""The few values that a program without data still has, and the assumptions made for the others.

Models branch on values: `if mask.all()`, `rates = torch.linspace(0, p, depth).tolist()`. A fake tensor has no values.
Small tensors that follow from constants alone (ranges, filled tensors, arithmetic on them) are computed beside their
fake twins. Any other true-or-false question is answered as for ordinary data and written down: `any` finds nothing
(no NaN, no padding), everything else holds. A floating-point number is taken for 1.0. Any other number, which may be
a size, is an error that names the line.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_iter, tree_map_only

from volvelle.errors import VolvelleError

# Elements. Masks and indices decide branches: 256 x 16384 tokens still count as small. Numbers do so rarely.
LARGEST, LARGEST_FLOAT = 1 << 22, 4096
MOST_QUESTIONS = 10_000  # at one line: more is a loop that waits for a value
_VALUE, _FROM_ANY = "_volvelle_value", "_volvelle_from_any"
_ATEN = torch.ops.aten
_FACTORIES = {_ATEN.ones, _ATEN.zeros, _ATEN.full, _ATEN.arange, _ATEN.linspace, _ATEN.scalar_tensor}


@dataclass(frozen=True, order=True)
class Assumption:
    """A question about values that the plan answered: where it was asked, and what was taken to hold."""

    where: str
    answer: str

    def __str__(self) -> str:
        return f"{self.where}: {self.answer}"


class KnownValues:
    """Follow constants through a traced program. `assumptions` lists what had to be assumed, without repetition."""

    def __init__(self) -> None:
        self._assumed: dict[Assumption, None] = {}
        self._asked: dict[str, int] = {}

    @property
    def assumptions(self) -> list[Assumption]:
        """The assumptions, in the order in which they were made."""
        return list(self._assumed)

    def assume(self, where: str, answer: str) -> None:
        """Write one down."""
        self._assumed[Assumption(where, answer)] = None

    def clear(self) -> None:
        """Forget the assumptions made so far."""
        self._assumed.clear()
        self._asked.clear()

    def give(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Attach a real value to a fake tensor of the same shape, when it is small; returns the fake one."""
        if _is_small(value):
            setattr(tensor, _VALUE, value)
        return tensor

    def answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """The number behind `.item()` and `bool(tensor)`; None when `func` is another operation.

        Raises VolvelleError when an integer is asked for that does not follow from constants.
        """
        if func is not _ATEN._local_scalar_dense.default:
            return None
        tensor = args[0]
        value = getattr(tensor, _VALUE, None)
        if value is None:
            value = getattr(tensor, "constant", None)
        if value is not None:
            with unset_fake_temporarily():
                return value.item()
        if tensor.dtype == torch.bool:
            return self._decide(not hasattr(tensor, _FROM_ANY))
        if tensor.is_floating_point():  # a norm, a loss for the log: it scales something, it sizes nothing
            self.assume(caller(), "a number read out of a tensor was taken for 1.0")
            return 1.0
        raise VolvelleError(
            f"plan_memory: {caller()} reads a number out of a {str(tensor.dtype).removeprefix('torch.')} tensor, "
            "and a plan has no values",
            tip="take the number from shapes or from the configuration, or measure with measure_memory",
        )

    def _decide(self, truth: bool) -> bool:
        where = caller()
        self._asked[where] = self._asked.get(where, 0) + 1
        if self._asked[where] > MOST_QUESTIONS:
            raise VolvelleError(
                f"plan_memory: {where} asks a tensor's value again and again, and a plan has no values",
                tip="bound the loop by a number, or measure with measure_memory",
            )
        self.assume(where, f"took the branch for {truth} (the tensor's value is not known without data)")
        return truth

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `func` on fake tensors, and on the known values beside them when every input has one."""
        known = _all_known(func, args, kwargs)
        if func is _ATEN.index.Tensor:
            args = (args[0], self._as_indices(args[1]))
        try:
            result = func(*args, **kwargs)
        except DynamicOutputShapeException as error:
            values = _compute(func, args, kwargs) if known else None
            if not isinstance(values, Tensor):
                raise VolvelleError(
                    f"plan_memory: {caller()} calls {func}, whose result's shape depends on values",
                    tip="replace it by torch.where or a mask, or measure with measure_memory",
                ) from error
            result = torch.empty(values.shape, dtype=values.dtype)
        else:
            known = known and all(_is_small(t) for t in tree_iter(result) if isinstance(t, Tensor))
            values = _compute(func, args, kwargs) if known else None
        if func.overloadpacket is _ATEN.any and isinstance(result, FakeTensor):
            setattr(result, _FROM_ANY, True)
        if values is not None:
            _attach(result, values)
        elif func._schema.is_mutable:
            _forget_changed(func, args)
        return result

    def _as_indices(self, masks: Any) -> list[Any]:
        """Replace known boolean masks by the indices they choose: their number is then a shape, not a value."""
        indices: list[Any] = []
        for mask in masks:
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and _has_value(mask):
                with unset_fake_temporarily():
                    chosen = _known(mask).nonzero(as_tuple=True)
                indices += [self.give(torch.empty(rows.shape, dtype=rows.dtype), rows) for rows in chosen]
            else:
                indices.append(mask)
        return indices


def _all_known(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call's result follows from constants."""
    # Nearly every call ends here, at its first argument: this is the planner's inner loop.
    if args and isinstance(args[0], Tensor) and not _has_value(args[0]):
        return False
    tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
    if not all(_has_value(tensor) for tensor in tensors) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return bool(tensors) or func.overloadpacket in _FACTORIES


def _is_small(tensor: Tensor) -> bool:
    return tensor.numel() <= (LARGEST_FLOAT if tensor.is_floating_point() else LARGEST)


def _has_value(tensor: Tensor) -> bool:
    return hasattr(tensor, _VALUE) or getattr(tensor, "constant", None) is not None


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The real tensor or tensors."""
    with unset_fake_temporarily(), torch.no_grad():
        result = func(*tree_map_only(Tensor, _known, args), **tree_map_only(Tensor, _known, kwargs))
    return result if isinstance(result, Tensor | tuple | list) else None


def _attach(result: Any, values: Any) -> None:
    fakes = [result] if isinstance(result, Tensor) else list(result)
    for fake, value in zip(fakes, [values] if isinstance(values, Tensor) else values, strict=True):
        if isinstance(fake, FakeTensor) and isinstance(value, Tensor):
            setattr(fake, _VALUE, value)


def _known(tensor: Tensor) -> Tensor:
    value = getattr(tensor, _VALUE, None)
    return getattr(tensor, "constant", tensor) if value is None else value


def _forget_changed(func: Any, args: tuple[Any, ...]) -> None:
    """A tensor that was overwritten with something unknown has no known value any more."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and position < len(args):
            for tensor in tree_iter(args[position]):
                if hasattr(tensor, _VALUE):
                    delattr(tensor, _VALUE)


def caller(skip: str = "") -> str:
    """File and line that led here, outside torch, this package and the module called `skip`."""
    here, torch_folder = Path(__file__).parent, Path(torch.__file__).parent
    passed = sys.modules[skip].__file__ if skip else None
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        outside = torch_folder not in path.parents and path.parent != here and str(path) != passed
        if outside and not path.name.startswith("<"):
            # One folder above the file is enough to recognise it; a machine's own path would say too much.
            return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "the step"
