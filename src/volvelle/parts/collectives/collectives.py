"""all_reduce, reduce_scatter and all_gather over point-to-point transfers, with torch.distributed's arguments.

What ours add, keyword-only: which algorithm, for which topology, a count of the bytes sent, a bound on waiting whose
error names the lost rank, and blocks of different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist

from volvelle.parts.collectives import halving_doubling, recursive_doubling, ring, star, tree
from volvelle.parts.collectives.blocks import bounds_of, combiner
from volvelle.parts.collectives.selection import choose
from volvelle.parts.collectives.topology import Topology
from volvelle.parts.collectives.two_level import Algorithm, TwoLevel
from volvelle.parts.collectives.wire import Traffic, Wire

AlgorithmName = Literal["auto", "ring", "halving-doubling", "recursive-doubling", "tree", "two-level", "star"]

FLAT: dict[str, Algorithm] = {
    "ring": ring,
    "halving-doubling": halving_doubling,
    "recursive-doubling": recursive_doubling,
    "tree": tree,
    "star": star,
}
"""The algorithms that take all ranks as equal, by name."""


def all_reduce(
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    *,
    algorithm: AlgorithmName = "auto",
    topology: Topology | None = None,
    traffic: Traffic | None = None,
    timeout: float | None = None,
) -> torch.Tensor:
    """Reduce a tensor over all ranks, in place, and return it: y = op over ranks of x, the same bits on every rank.

    tensor: any shape, stride and dtype that the op is defined for; the same count and dtype on every rank. `algorithm`
    is a file of this folder, or "auto" (see selection.py). `topology` says which ranks share a machine; None takes
    all as equal. `traffic` counts this rank's bytes. `timeout` bounds every wait, in seconds.

    Raises:
        ValueError: unknown algorithm or op, "two-level" without a topology, a topology of another size, a tensor whose
            elements share memory (`expand`).
        TypeError: an op without meaning for the dtype, a sparse tensor, one on a device that the back end cannot send.
        PeerLost: a peer died or was silent; its `rank` is the one that began it.
        RanksDisagree: at the time-out all are alive, but another rank gave another count, dtype, op or algorithm.

    Thakur, Rabenseifner and Gropp 2005; Patarasuk and Yuan 2009.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> all_reduce(torch.arange(3.0), algorithm="ring")
    tensor([0., 1., 2.])
    >>> dist.destroy_process_group()
    """
    wire = _wire("all_reduce", group, traffic, timeout)
    _carried(wire, tensor)
    combine = combiner(wire.call, op, tensor.dtype, tensor.device)
    _writable(wire.call, tensor)
    chosen = _algorithm(wire, algorithm, topology, tensor.numel() * tensor.element_size())
    wire.means(f"{wire.call}{_over(chosen)} {_name(op)} of {tensor.numel()} x {_name(tensor.dtype)}")
    if wire.size == 1 or tensor.numel() == 0:
        return tensor
    with torch.no_grad():
        # What travels is memory, so a lazy conjugate or a stride must become real first.
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
        chosen.all_reduce(wire, flat, combine)
        if op == dist.ReduceOp.AVG:
            flat.div_(wire.size)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
    return tensor


def reduce_scatter(
    output: torch.Tensor,
    input_list: Sequence[torch.Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    *,
    algorithm: AlgorithmName = "auto",
    topology: Topology | None = None,
    traffic: Traffic | None = None,
    timeout: float | None = None,
) -> torch.Tensor:
    """Reduce a list of p tensors over all ranks; rank r keeps the r-th in `output`, which is returned.

    The tensors of the list may differ in size, empty ones included; every rank must give the same sizes. Options and
    errors as in `all_reduce`; ValueError also for a list of another length or an output of another size or dtype.
    """
    wire = _wire("reduce_scatter", group, traffic, timeout)
    sizes = _list_sizes(wire, input_list, output, "input_list", "output")
    combine = combiner(wire.call, op, output.dtype, output.device)
    chosen = _algorithm(wire, algorithm, topology, sum(sizes) * output.element_size())
    bounds = bounds_of(sizes)
    _writable(wire.call, output)
    wire.means(f"{wire.call}{_over(chosen)} {_name(op)} of {_name(output.dtype)} blocks {_words(sizes)}")
    with torch.no_grad():
        x = torch.cat([block.detach().reshape(-1) for block in input_list])
        if wire.size > 1 and x.numel():
            chosen.reduce_scatter(wire, x, bounds, combine)
        mine = x[bounds[wire.rank] : bounds[wire.rank + 1]]
        if op == dist.ReduceOp.AVG:
            mine.div_(wire.size)
        output.copy_(mine.view(output.shape))
    return output


def all_gather(
    tensor_list: Sequence[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    algorithm: AlgorithmName = "auto",
    topology: Topology | None = None,
    traffic: Traffic | None = None,
    timeout: float | None = None,
) -> Sequence[torch.Tensor]:
    """Copy every rank's tensor into `tensor_list`, the r-th from rank r; the list is returned.

    The tensors of the list say every rank's size and may differ, empty ones included; every rank must give the same
    sizes. Options and errors as in `reduce_scatter`.
    """
    wire = _wire("all_gather", group, traffic, timeout)
    sizes = _list_sizes(wire, tensor_list, tensor, "tensor_list", "tensor")
    chosen = _algorithm(wire, algorithm, topology, sum(sizes) * tensor.element_size())
    bounds = bounds_of(sizes)
    for target in tensor_list:
        _writable(wire.call, target)
    wire.means(f"{wire.call}{_over(chosen)} of {_name(tensor.dtype)} blocks {_words(sizes)}")
    with torch.no_grad():
        x = tensor.new_empty(bounds[-1])
        x[bounds[wire.rank] : bounds[wire.rank + 1]] = tensor.detach().reshape(-1)
        if wire.size > 1 and x.numel():
            chosen.all_gather(wire, x, bounds)
        for r, target in enumerate(tensor_list):
            target.copy_(x[bounds[r] : bounds[r + 1]].view(target.shape))
    return tensor_list


def _wire(call: str, group: dist.ProcessGroup | None, traffic: Traffic | None, timeout: float | None) -> Wire:
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError(f"{call}: no process group, call torch.distributed.init_process_group first")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{call}: this rank is not a member of the group")
    return Wire(group, call=call, traffic=traffic, timeout=timeout)


def _algorithm(wire: Wire, name: str, topology: Topology | None, size: int) -> Algorithm:
    if topology is not None and topology.size != wire.size:
        raise ValueError(f"{wire.call}: topology has {topology.size} ranks, the group {wire.size}")
    if name not in get_args(AlgorithmName):
        raise ValueError(f"{wire.call}: algorithm must be one of {', '.join(get_args(AlgorithmName))}, got {name!r}")
    if name == "auto":
        name = choose(size, wire.size, topology).algorithm
    wire.call = f"{wire.call} ({name})"
    if name != "two-level":
        return FLAT[name]
    if topology is None:
        raise ValueError(f"{wire.call}: needs a topology, for example topology=Topology.detect()")
    share = size // min(len(node) for node in topology.nodes)
    return TwoLevel(topology, FLAT[choose(share, len(topology.nodes)).algorithm])


def _carried(wire: Wire, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{wire.call}: needs a dense tensor, got layout {tensor.layout}")
    if wire.plain and tensor.device.type != "cpu":
        backend = dist.get_backend(wire.group)
        raise TypeError(f"{wire.call}: {backend} sends memory of the CPU, got a tensor on {tensor.device.type}")


def _writable(call: str, tensor: torch.Tensor) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{call}: needs a tensor of its own memory, got one of shape {tuple(tensor.shape)} by expand")


def _over(chosen: Algorithm) -> str:
    return f" over {chosen.topology.nodes}" if isinstance(chosen, TwoLevel) else ""


def _name(value: object) -> str:
    """RedOpType.SUM and torch.float32 as `sum` and `float32`."""
    return str(value).rpartition(".")[2].lower()


def _words(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _list_sizes(wire: Wire, many: Sequence[torch.Tensor], one: torch.Tensor, names: str, name: str) -> list[int]:
    if len(many) != wire.size:
        raise ValueError(f"{wire.call}: {names} needs one tensor a rank, {wire.size}, got {len(many)}")
    for tensor in (one, *many):
        _carried(wire, tensor)
        if tensor.dtype != one.dtype:
            raise TypeError(f"{wire.call}: {names} must be {one.dtype} like {name}, got {tensor.dtype}")
    if many[wire.rank].numel() != one.numel():
        raise ValueError(
            f"{wire.call}: {name} must hold {many[wire.rank].numel()} elements like {names}[{wire.rank}], "
            f"got shape {tuple(one.shape)}"
        )
    return [tensor.numel() for tensor in many]
