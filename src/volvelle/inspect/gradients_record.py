"""What a forward pass did: every torch call with its module, its source line and the autograd nodes it made."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

OUTSIDE = "outside the module"
_TORCH = str(Path(torch.__file__).parent)
_LOOKS = frozenset({"size", "dim", "stride", "__get__", "isfinite", "isnan", "isinf", "__repr__"})
_UNWRITTEN = frozenset({"empty", "empty_like", "new_empty", "empty_strided"})  # hold whatever was in memory


@dataclass
class Call:
    """One torch call. `nodes` are its outputs' autograd nodes, `first` and `last` the sequence numbers it made."""

    op: str
    module: str
    scope: tuple[tuple[str, int], ...]
    where: str
    first: int
    last: int = 0
    nodes: list[Any] = field(default_factory=list)
    cut: str | None = None
    """Why a differentiable input became an output without history; None when none did."""
    cut_inputs: list[Any] = field(default_factory=list)
    parameters: set[int] = field(default_factory=set)
    """Identities of the parameters among its arguments."""
    sick: str | None = None
    """"NaN" or "Inf" when the output holds it and no input explains it."""
    given: str | None = None
    """What was non-finite in its arguments already."""


class Recorder(TorchFunctionMode):
    """Notes the calls inside `with`. Scopes are kept by hooks that `watch` puts on the modules."""

    def __init__(self, module: nn.Module, *, values: bool = True):
        super().__init__()
        self.calls: list[Call] = []
        self.values = values
        self.parameters = {id(p): name for name, p in module.named_parameters()}
        self._names = {id(m): name or type(m).__name__ for name, m in module.named_modules()}
        self._scope: list[tuple[str, int]] = []
        self._count, self._ill = 0, False
        self._hooks = []
        for part in module.modules():
            self._hooks.append(part.register_forward_pre_hook(self._enter, prepend=True))
            self._hooks.append(part.register_forward_hook(self._leave, always_call=True))

    def __exit__(self, *caught) -> None:
        super().__exit__(*caught)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._count += 1
        self._scope.append((self._names[id(module)], self._count))

    def _leave(self, *_: Any) -> None:
        self._scope.pop()

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        """Run the call and note it."""
        kwargs = kwargs or {}
        name = op_name(func)
        if name in _LOOKS:
            return func(*args, **kwargs)
        inputs = list(tensors((args, kwargs)))
        # Before the call: an in-place operation changes its input's history and values.
        histories = [(t.requires_grad, t.grad_fn) for t in inputs]
        bad_before = [bad(t) for t in inputs] if self.values else []
        module = self._scope[-1][0] if self._scope else OUTSIDE
        call = Call(name, module, tuple(self._scope), "", _sequence_number())
        call.parameters = {id(t) for t in inputs if id(t) in self.parameters}
        result = func(*args, **kwargs)
        call.last = _sequence_number()
        outputs = list(tensors(result))
        self._note(call, inputs, outputs, histories)
        if self.values:
            self._judge(call, outputs, bad_before, (args, kwargs))
        if call.nodes or call.cut or call.sick or call.parameters:
            call.where = source_line()
            self.calls.append(call)
        return result

    def _note(self, call: Call, inputs: list[Tensor], outputs: list[Tensor], histories: list[tuple[bool, Any]]) -> None:
        call.nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
        live = [(t, fn) for t, (needs, fn) in zip(inputs, histories, strict=True) if needs]
        if not live or any(t.requires_grad for t in outputs):
            return
        call.cut_inputs = [t if fn is None else fn for t, fn in live]
        if not outputs:
            call.cut = f"{call.op} takes the numbers out of torch"
        elif call.op in {"detach", "detach_", "data"}:
            call.cut = call.op
        elif not torch.is_grad_enabled():
            call.cut = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        elif not any(t.is_floating_point() or t.is_complex() for t in outputs):
            call.cut = f"{call.op} gives {str(outputs[0].dtype).removeprefix('torch.')}, which has no gradient"
        else:
            call.cut = f"{call.op} is not differentiable"

    def _judge(self, call: Call, outputs: list[Tensor], before: list[str | None], given: Any) -> None:
        """Decide whether this is a place where something non-finite began.

        An infinity that was asked for (a mask filled with -inf), or passed on, is meant; a NaN never is.
        """
        found = None if call.op in _UNWRITTEN else next(filter(None, map(bad, outputs)), None)
        if found is None:
            return
        if not any(before):
            if found == "NaN" or not any(math.isinf(x) for x in numbers(given)):
                call.sick = found
        elif found == "NaN" and not self._ill:
            worst = "NaN" if "NaN" in before else "Inf"
            names = [self.parameters.get(id(t)) for t, what in zip(tensors(given), before, strict=True) if what]
            known = next((f"parameter {name}" for name in names if name), "an argument")
            call.sick, call.given = found, f"{known} holds {worst} already"
        self._ill = self._ill or call.sick is not None


def _sequence_number() -> int:
    """The number that the next autograd node of this thread will carry."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore


def op_name(func: Callable) -> str:
    """A torch callable's short name: `linear`, `add`, `data` for the attribute."""
    owner = getattr(func, "__self__", None)
    name = getattr(func, "__name__", None) or str(func)
    if name in {"__get__", "__set__"} and owner is not None:
        attribute = getattr(owner, "__name__", "")
        return attribute if attribute in {"data", "real", "imag", "T", "mT", "H"} else "__get__"
    return (name or resolve_name(func) or "?").strip("_") if name.startswith("__") else name


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def numbers(value: Any) -> Iterator[float]:
    """Every float in nested tuples, lists and dicts."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, dict):
        yield from numbers(list(value.values()))


@torch.no_grad()
def bad(tensor: Tensor | None) -> str | None:
    """The worst that a tensor holds: "NaN", "Inf" or None."""
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return None
    if not tensor.numel() or bool(torch.isfinite(tensor).all()):
        return None
    return "NaN" if bool(torch.isnan(tensor).any()) else "Inf"


def source_line() -> str:
    """File and line of the innermost caller that is neither torch nor this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_TORCH)
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
