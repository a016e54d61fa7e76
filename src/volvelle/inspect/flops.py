"""The arithmetic of any nn.Module, exactly and layer by layer: multiply-accumulates, FLOPs, and what is beside them.

One multiply-accumulate (MAC) is two floating-point operations (FLOPs). Papers on vision networks often print MACs and
call them FLOPs: EfficientNet-B0's "0.39B FLOPs" are MACs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from volvelle.errors import UsageError, did_you_mean
from volvelle.inspect.exported import example_input, exported, home, operation
from volvelle.inspect.flops_rules import Count, count


@dataclass(frozen=True)
class LayerCount:
    """All calls of one operation in one module; the path of the root is ""."""

    module: str
    kind: str
    """Class of the module."""
    op: str
    calls: int
    macs: int
    """Multiply-accumulates of products: convolution, linear, matmul, attention."""
    other: int
    """Operations beside the products: biases, pointwise arithmetic, norms, pooling, interpolation."""
    shape: tuple[int, ...]
    """Shape of the last result."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the products: 2 a MAC."""
        return 2 * self.macs


@dataclass(frozen=True)
class FlopCount:
    """The counts of every layer in the order they run; `str()` is the table, sums are properties."""

    model: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerCount, ...]
    parameters: int
    unknown: Mapping[str, int]
    """Operations without a rule and how often they ran; they count 0."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations of all products: 2 a MAC. What is beside them is `other`."""
        return 2 * self.macs

    @property
    def other(self) -> int:
        """Operations beside the products."""
        return sum(layer.other for layer in self.layers)

    def __iter__(self) -> Iterator[LayerCount]:
        return iter(self.layers)

    def __getitem__(self, module: str) -> FlopCount:
        """The counts inside one module, by its path."""
        inside = tuple(layer for layer in self.layers if _within(layer.module, module))
        if not inside:
            tip = did_you_mean(module, dict.fromkeys(layer.module for layer in self.layers))
            raise UsageError(f"count_flops: no operation of {self.model} runs in {module!r}", tip=tip)
        return FlopCount(f"{self.model}.{module}", self.input_shape, inside, self.parameters, self.unknown)

    def by_op(self) -> dict[str, Count]:
        """Sums for each kind of operation, the largest first."""
        found: dict[str, Count] = {}
        for layer in self.layers:
            had = found.get(layer.op, Count())
            found[layer.op] = Count(had.macs + layer.macs, had.other + layer.other)
        return dict(sorted(found.items(), key=lambda item: (-item[1].macs, -item[1].other)))

    def __str__(self) -> str:
        shown = [layer for layer in self.layers if layer.macs or layer.other]
        headers = ("module", "operation", "calls", "result", "MACs", "FLOPs", "other")
        rows = [headers, *(_cells(layer) for layer in shown)]
        total = ("total", "", "", "", f"{self.macs:,}", f"{self.flops:,}", f"{self.other:,}")
        widths = [max(len(row[i]) for row in (*rows, total)) for i in range(len(headers))]
        lines = ["  ".join(map(_padded, range(len(headers)), row, widths)) for row in (*rows, total)]
        shape = "x".join(map(str, self.input_shape))
        lines.insert(0, f"{self.model}, input {shape}, {self.parameters:,} parameters; one MAC is two FLOPs")
        if self.unknown:
            lines.append(f"not counted, for want of a rule: {', '.join(self.unknown)}")
        return "\n".join(line.rstrip() for line in lines)

    def record(self) -> dict[str, Any]:
        """All values for JSON."""
        layers = [{**asdict(layer), "shape": list(layer.shape), "flops": layer.flops} for layer in self.layers]
        sums = {"macs": self.macs, "flops": self.flops, "other": self.other, "parameters": self.parameters}
        head = {"model": self.model, "input_shape": list(self.input_shape)}
        return {**head, **sums, "unknown": dict(self.unknown), "layers": layers}


def count_flops(module: nn.Module, input_shape: Sequence[int], *, dtype: torch.dtype | None = None) -> FlopCount:
    """Count the arithmetic of one forward pass of `module` in evaluation on an input of `input_shape`.

    Convolution: MACs = outputs * C_in / groups * prod(k) (transposed: inputs * C_out / groups * prod(k)); linear and
    matmul: outputs * the contracted length; attention: visible pairs * (d + d_v), half of them when causal; an
    embedding 0. FLOPs = 2 MACs. All other arithmetic is `other`, by the rules at the head of `flops_rules.py`.
    Functional calls count as modules do: the module is traced by torch.export on fake tensors, nothing is computed.
    `dtype` is the input's type, torch.int64 for token ids; otherwise that of the parameters. Operations without a rule
    are listed in `unknown`. Raises VolvelleError for a module that cannot be traced.

    >>> found = count_flops(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU()), (1, 3, 10, 10))
    >>> found.macs == 8 * 8 * 8 * 3 * 9, found.flops == 2 * found.macs, found.other == 8 * 8 * 8
    (True, True, True)
    """
    shape = tuple(int(n) for n in input_shape)
    if any(n < 0 for n in shape):
        raise ValueError(f"count_flops: sizes cannot be negative, got input_shape {shape}")
    traced = exported(module, example_input(module, shape, dtype), call="count_flops")
    found: dict[tuple[str, str], LayerCount] = {}
    unknown: dict[str, int] = {}
    for node in _operations(traced.graph):
        counted = count(node)
        if counted is None:
            unknown[operation(node)] = unknown.get(operation(node), 0) + 1
            counted = Count()
        path, kind = home(node)
        had = found.get((path, operation(node)))
        value = node.meta.get("val")
        value = value[0] if isinstance(value, list | tuple) and value else value
        result = tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()
        calls, macs, other = (had.calls, had.macs, had.other) if had else (0, 0, 0)
        found[path, operation(node)] = LayerCount(
            path, kind, operation(node), calls + 1, macs + counted.macs, other + counted.other, result
        )
    parameters = sum(p.numel() for p in module.parameters())
    return FlopCount(type(module).__name__, shape, tuple(found.values()), parameters, unknown)


def _operations(graph: fx.Graph) -> Iterator[fx.Node]:
    """All operations, those inside blocks of another mode (no_grad, autocast) too."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        owner = graph.owning_module
        bodies = [getattr(owner, str(arg.target)) for arg in node.args if _is_body(arg)] if owner else []
        if bodies:
            for body in bodies:
                yield from _operations(body.graph)
        else:
            yield node


def _is_body(arg: Any) -> bool:
    owner = arg.graph.owning_module if isinstance(arg, fx.Node) and arg.op == "get_attr" else None
    return isinstance(getattr(owner, str(arg.target), None), fx.GraphModule) if owner is not None else False


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.") or not module


def _padded(column: int, cell: str, width: int) -> str:
    return f"{cell:>{width}}" if column in {2, 4, 5, 6} else f"{cell:<{width}}"


def _cells(layer: LayerCount) -> tuple[str, ...]:
    shape = "x".join(map(str, layer.shape))
    sums = (f"{layer.macs:,}", f"{layer.flops:,}", f"{layer.other:,}")
    return (layer.module or layer.kind, layer.op, str(layer.calls), shape, *sums)
