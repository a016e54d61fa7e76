"""Why a parameter gets no gradient, a zero one or a non-finite one: the forward pass is recorded, the graph walked."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from volvelle.inspect.gradients_graph import Graph, build_graph
from volvelle.inspect.gradients_record import OUTSIDE, Call, Recorder, bad
from volvelle.systems.buffers import buffers_of

State = Literal["ok", "frozen", "unused", "detached", "zero", "non-finite"]


@dataclass(frozen=True)
class ParameterGradient:
    """What became of one parameter; `why` says it in words when the state is not ok."""

    name: str
    state: State
    why: str | None = None
    norm: float | None = None
    """Euclidean norm of its gradient."""


@dataclass(frozen=True)
class Origin:
    """Where a NaN or Inf began: the operation, its module and source line, in the forward or the backward pass."""

    what: str
    op: str
    module: str
    where: str
    direction: Literal["forward", "backward"]
    given: str | None = None
    """What was non-finite before the operation already."""

    def __str__(self) -> str:
        more = f"; {self.given}" if self.given else ""
        return f"{self.what} began in {self.op} of {self.module} ({self.where}, {self.direction}{more})"


@dataclass(frozen=True)
class GradientReport:
    """The loss, every parameter, where something non-finite began, and the graph (`graph.text()`, `graph.svg()`)."""

    loss: float
    parameters: tuple[ParameterGradient, ...]
    origin: Origin | None
    graph: Graph

    @property
    def problems(self) -> tuple[ParameterGradient, ...]:
        """The parameters that are neither ok nor frozen."""
        return tuple(p for p in self.parameters if p.state not in {"ok", "frozen"})

    def __str__(self) -> str:
        lines = [f"loss {self.loss:g}", *([str(self.origin)] if self.origin else [])]
        lines += [f"{p.name}: {p.state}, {p.why}" for p in self.problems]
        return "\n".join(lines)


def trace_gradients(
    module: nn.Module, loss: Tensor | Callable[[], Tensor], *, depth: int | None = None
) -> GradientReport:
    """Say for every parameter of `module` whether the loss reaches it, and if not, where it was cut off.

    `loss` is best a callable that runs the forward pass and returns the scalar loss: then module names, source lines,
    detached places and the first non-finite operation are known. Of a loss that was computed before, only the
    graph is left. `depth` folds modules below that level of the drawing; left out, it is chosen to stay readable.
    Parameters, .grad, buffers and torch's random generators are as before afterwards. TypeError when the loss is no
    scalar.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> report = trace_gradients(net, lambda: net[0](torch.ones(1, 2)).sum())
    >>> [(p.name, p.state) for p in report.problems]
    [('1.weight', 'unused'), ('1.bias', 'unused')]
    """
    with _unchanged(module):
        calls, value = _forward(module, loss)
        nodes = list(_ancestors(value.grad_fn))
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients, origin = _backward(value, nodes, wanted, calls)
    origin = (_forward_origin(calls, nodes) if bad(value) or origin else None) or origin
    reached = _leaves(nodes) | ({id(value)} if value.is_leaf and value.requires_grad else set())
    recorded = callable(loss)
    found = tuple(
        _judge(name, p, gradients.get(name), id(p) in reached, calls if recorded else None)
        for name, p in module.named_parameters()
    )
    names = {id(p): name for name, p in module.named_parameters()}
    states = {p.name: p.state for p in found}
    graph = build_graph(value.grad_fn, nodes, calls, names, states, depth)
    unreached = tuple(f"{p.name}: {p.state}, {p.why}" for p in found if p.state in {"unused", "detached"})
    return GradientReport(float(value.detach()), found, origin, graph.with_notes(unreached, origin))


def nonfinite_origin(module: nn.Module, run: Callable[[], Tensor]) -> Origin | None:
    """Run the forward pass, and the backward pass when that was clean; return where the first NaN or Inf began.

    `run` returns the loss. An infinity that was asked for, such as a mask of -inf, does not count while the loss and
    the gradients are finite. The module and torch's random generators are as before afterwards.
    """
    with _unchanged(module):
        calls, value = _forward(module, run)
        nodes = list(_ancestors(value.grad_fn))
        if bad(value):
            return _forward_origin(calls, nodes) or Origin(bad(value) or "NaN", "?", OUTSIDE, "?", "forward")
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        _, origin = _backward(value, nodes, wanted, calls)
    return (_forward_origin(calls, nodes) or origin) if origin else None


def first_nonfinite(module: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """Name of the module that produced the first NaN or Inf of `run()`, or None when all is finite.

    The root module goes by its class name; what happens after the forward pass is "outside the module".
    `nonfinite_origin` tells the operation and the line as well.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Softplus())
    >>> poisoned = torch.full((1, 2), float("nan"))
    >>> first_nonfinite(net, lambda: net(poisoned).sum())
    '0'
    """
    origin = nonfinite_origin(module, run)
    return None if origin is None else origin.module


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    buffers = buffers_of(module)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            yield
    finally:
        for buffer in buffers:
            buffer.restore()


def _forward(module: nn.Module, loss: Tensor | Callable[[], Tensor]) -> tuple[list[Call], Tensor]:
    calls: list[Call] = []
    if callable(loss):
        with Recorder(module) as recorder:
            value = loss()
        calls = recorder.calls
    else:
        value = loss
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"trace_gradients: the loss must be a scalar tensor, got {_shown(value)}")
    return calls, value


def _shown(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _ancestors(root: Any) -> Iterator[Any]:
    """Every autograd node above `root`, itself included."""
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in node.next_functions)


def _leaves(nodes: Sequence[Any]) -> set[int]:
    """Identities of the tensors that receive a gradient at the end of these nodes."""
    return {id(node.variable) for node in nodes if hasattr(node, "variable")}


def _backward(
    loss: Tensor, nodes: Sequence[Any], wanted: Mapping[str, Tensor], calls: Sequence[Call]
) -> tuple[dict[str, Tensor | None], Origin | None]:
    """Gradients of the wanted parameters, and the first backward operation that turned finite into non-finite."""
    if not loss.requires_grad or not wanted:
        return {}, None
    found: list[Origin] = []

    def watch(node: Any) -> Callable[..., None]:
        def look(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
            if not found and (what := next(filter(None, map(bad, inputs)), None)) and not any(map(bad, outputs)):
                call = _call_of(node, calls)
                op = f"{call.op} ({node.name()})" if call else node.name()
                module, where = (call.module, call.where) if call else (OUTSIDE, "?")
                found.append(Origin(what, op, module, where, "backward"))

        return look

    hooks = [node.register_hook(watch(node)) for node in nodes]
    try:
        # The graph stays, so that a loss computed by the caller can still be differentiated by him.
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(zip(wanted, gradients, strict=True)), found[0] if found else None


def _call_of(node: Any, calls: Sequence[Call]) -> Call | None:
    """The recorded call that made an autograd node, by its sequence number."""
    number = node._sequence_nr()
    i = bisect.bisect_right(calls, number, key=lambda call: call.first) - 1
    while i >= 0 and calls[i].first <= number:
        if number < calls[i].last:
            return calls[i]
        if calls[i].last < number:
            break
        i -= 1
    return None


def _forward_origin(calls: Sequence[Call], nodes: Sequence[Any]) -> Origin | None:
    """The first sick call whose result the loss depends on, else the first sick one."""
    sick = [call for call in calls if call.sick]
    used = set(nodes)
    call = next((c for c in sick if used.intersection(c.nodes)), sick[0] if sick else None)
    if call is None or call.sick is None:
        return None
    return Origin(call.sick, call.op, call.module, call.where, "forward", call.given)


def _judge(
    name: str, parameter: Tensor, gradient: Tensor | None, reached: bool, calls: Sequence[Call] | None
) -> ParameterGradient:
    if not parameter.requires_grad:
        return ParameterGradient(name, "frozen", "requires_grad is False")
    if not reached or gradient is None:
        state, why = _missing(parameter, calls)
        return ParameterGradient(name, state, why)
    norm = float(torch.linalg.vector_norm(gradient.detach().float()))
    if what := bad(gradient):
        count = int((~torch.isfinite(gradient)).sum())
        return ParameterGradient(name, "non-finite", f"{count} of {gradient.numel()} entries ({what})", norm)
    if not torch.any(gradient):
        return ParameterGradient(name, "zero", "the loss reaches it, but every entry of its gradient is 0", 0.0)
    return ParameterGradient(name, "ok", norm=norm)


def _missing(parameter: Tensor, calls: Sequence[Call] | None) -> tuple[State, str]:
    """Why the loss does not reach this parameter: never used, cut off, or used for something else."""
    if calls is None:
        return "unused", "the loss does not depend on it (give a callable to see where it was cut off)"
    last, known = None, {}
    for call in calls:
        direct = id(parameter) in call.parameters
        if call.cut and (direct or any(_depends(fn, parameter, known) for fn in call.cut_inputs)):
            return "detached", f"cut off by {call.cut}, in {call.module} ({call.where})"
        if direct or any(_depends(node, parameter, known) for node in call.nodes):
            last = call
    if last is None:
        return "unused", "the forward pass does not touch it"
    return "unused", f"its last result, of {last.op} in {last.module} ({last.where}), does not reach the loss"


def _depends(node: Any, parameter: Tensor, known: dict[Any, bool]) -> bool:
    """Whether an autograd node (or a leaf tensor) has the parameter above it; `known` remembers nodes."""
    if isinstance(node, Tensor):
        return node is parameter
    stack = [node]
    while stack:
        top = stack[-1]
        if top in known:
            stack.pop()
            continue
        if getattr(top, "variable", None) is parameter:
            known[top] = True
            continue
        parents = [parent for parent, _ in top.next_functions if parent is not None]
        waiting = [parent for parent in parents if parent not in known]
        if waiting:
            stack.extend(waiting)
        else:
            known[top] = any(known[parent] for parent in parents)
    return known[node]
