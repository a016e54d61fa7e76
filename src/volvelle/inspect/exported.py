"""Any nn.Module as a graph of torch operations with shapes, by torch.export on fake tensors: nothing is computed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor

from volvelle.errors import VolvelleError
from volvelle.systems.modes import evaluating

Node = fx.Node
VIEWS = frozenset({
    "slice", "select", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "unbind", "split",
    "chunk", "split_with_sizes", "narrow", "diagonal", "unfold", "t", "swapaxes", "movedim", "flatten", "unflatten",
    "detach", "alias", "view_as", "expand_as", "numpy_T", "mT", "tensor_split",
})  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """The graph, the node of the input, and tensors that are known by value (constants and buffers) by node name."""

    graph: fx.Graph
    input: Node
    values: Mapping[str, torch.Tensor]
    program: torch.export.ExportedProgram


def exported(module: nn.Module, example: torch.Tensor, *, call: str) -> Exported:
    """Trace `module` in eval mode on a fake `example`; its training flags are as before afterwards.

    `call` is the function named in errors. Raises VolvelleError with the source line where tracing stopped.
    """
    with evaluating(module), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(module, (example,), strict=False)
            if _writes_into_views(program.graph):
                program = program.run_decompositions({})
        except Exception as error:
            raise VolvelleError(
                f"{call}: {type(module).__name__} cannot be traced on an input of shape {tuple(example.shape)}: "
                f"{_reason(error)}",
                tip="the forward pass must run on this shape, and may not branch on the values of tensors",
            ) from error
    signature = program.graph_signature
    held: dict[str, Any] = {**program.constants, **program.state_dict}
    names = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
    values = {node: held[target] for node, target in names.items() if isinstance(held.get(target), torch.Tensor)}
    inputs = [node for node in program.graph.nodes if node.name in signature.user_inputs]
    return Exported(program.graph, inputs[0], values, program)


def example_input(module: nn.Module, shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
    """An input on the module's device, fake where it is; of its floating type unless `dtype` is given."""
    found = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = found.device if found is not None else torch.device("cpu")
    kind = dtype or (found.dtype if found is not None else torch.get_default_dtype())
    with found.fake_mode if isinstance(found, FakeTensor) else contextlib.nullcontext():
        return torch.zeros(tuple(shape), dtype=kind, device=device)


def bound(node: Node) -> dict[str, Any]:
    """The arguments of an operation by the names of its schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(enumerate_names(node.args)) | dict(node.kwargs)
    given = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {a.name: given.get(a.name, defaults.get(a.name)) for a in schema.arguments}


def enumerate_names(values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Positional arguments of a function without a schema."""
    return ((str(i), value) for i, value in enumerate(values))


def operation(node: Node) -> str:
    """The operation's name without its overload, and without the underscore of the in-place form: "conv2d"."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    space, _, name = schema.name.partition("::")
    if schema.is_mutable and name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    return name if space == "aten" else f"{space}.{name}"


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of a node's result, None when it is no tensor."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else None


def home(node: Node) -> tuple[str, str]:
    """Path and class name of the innermost module that ran the operation; the path of the root is ""."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return path.split("@")[0], kind.rpartition(".")[2]


def _writes_into_views(graph: fx.Graph) -> bool:
    """Whether an operation changes a tensor that shares memory with another one that the graph reads."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], Node):
            continue
        changed = node.args[0]
        if operation(changed) in VIEWS and changed.op == "call_function":
            return True
        if any(user.op == "call_function" and operation(user) in VIEWS for user in changed.users):
            return True
    return False


def _reason(error: Exception) -> str:
    """The first line of the message, and the last line of the traced module's own code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<"):
            place = f" ({file.rpartition('/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{lines[0] if lines else type(error).__name__}{place}"
