"""Watch every storage that a program makes, under fake tensors, without allocating one of them.

A `StorageTracker` sits on top of torch's FakeTensorMode: operations run on shapes and dtypes only, autograd keeps what
it would keep, and a storage ends when Python and autograd let go of it. So the account is the real one, except for
memory that a kernel takes and gives back inside an operation, which `workspace` adds from rules.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from volvelle.inspect.memory_ledger import Block, Ledger
from volvelle.inspect.memory_values import KnownValues

_random_state = torch.get_rng_state
_DEVICE = torch.ops.prim.device.default
_ATEN = torch.ops.aten
_WRAPPERS = ("torch/_compile.py", "_dynamo/eval_frame.py")  # torch puts them around every dispatch function
_ADD = _ATEN.add.Tensor
# Autograd's own formulas branch on tensor subclasses, to which fake tensors belong: there they scatter a gradient into
# a copy of fresh zeros, for plain tensors into the zeros themselves. The plan is about plain tensors.
_IN_PLACE: dict[Any, Any] = {
    _ATEN.index_put.default: _ATEN.index_put_.default,
    _ATEN.index_add.default: _ATEN.index_add_.default,
    _ATEN.scatter.src: _ATEN.scatter_.src,
    _ATEN.scatter.value: _ATEN.scatter_.value,
    _ATEN.scatter_add.default: _ATEN.scatter_add_.default,
}
Workspace = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], int]
"""(op, args, kwargs, result) -> bytes that the kernel holds, besides its results, at its own peak."""


class StorageTracker(TorchDispatchMode):
    """Record allocations and releases in a `Ledger`. Enter it inside a FakeTensorMode.

    `grain` rounds every block up to a multiple (512 bytes for CUDA's caching allocator, 1 for the CPU). `check` is
    called before every operation, and may raise.

    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> with FakeTensorMode(), StorageTracker() as tracker:
    ...     x = torch.ones(1000, 1000)
    ...     y = x.t() * 2
    ...     del x
    >>> tracker.ledger.peak()[0], tracker.live_bytes
    (8000000, 4000000)
    """

    def __init__(
        self,
        *,
        workspace: Workspace | None = None,
        values: KnownValues | None = None,
        grain: int = 1,
        check: Callable[[], None] | None = None,
    ):
        super().__init__()
        self.ledger = Ledger()
        self.values = values or KnownValues()
        self.live_bytes = 0
        self._workspace, self._grain, self._check = workspace, grain, check
        self._phase, self._op = "setup", ""
        self._modules: list[str] = []
        # The key is the address of the C++ storage: the Python wrapper of a storage may be made anew.
        self._blocks: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # more than half of all calls only ask this
            return args[0].fake_device
        if self._check is not None:
            self._check()
        kwargs = kwargs or {}
        self._op = func.name()
        answer = self.values.answer(func, args)
        if answer is not None:
            return answer
        if func in _IN_PLACE and self.in_engine and self._made_by(args[0], "zeros"):
            func = _IN_PLACE[func]
        elif func is _ADD and self.in_engine and _sums_gradients(args, sys._getframe(1)):
            func = _ATEN.add_.Tensor
        result = self.values.follow(func, args, kwargs)
        if func.is_view:
            return result
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor):  # a real one is a known value beside the program
                self._see(tensor)
        extra = self._workspace(func, args, kwargs, result) if self._workspace is not None else 0
        if extra > 0:
            block = Block(extra, self._op, self.phase, self.module, workspace=True)
            self.ledger.release(self.ledger.allocate(block), self._op, self.phase)
        return result

    @property
    def phase(self) -> str:
        """The phase that new blocks belong to."""
        # The engine runs backward without gradients; a checkpointed block switches them on to run forward again.
        again = self._phase == "backward" and torch.is_grad_enabled() and self.in_engine
        return "recompute" if again else self._phase

    @property
    def in_engine(self) -> bool:
        """Whether autograd's engine is running."""
        return torch._C._current_graph_task_id() != -1

    @property
    def module(self) -> str:
        """Path of the innermost module that is running, empty outside."""
        return self._modules[-1] if self._modules else ""

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Everything inside belongs to `phase`."""
        before, self._phase = self._phase, phase
        self.ledger.mark(phase)
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Note, for each block made inside, the path of the submodule of `module` that was running."""
        paths = {id(child): path for path, child in module.named_modules()}

        def enter(child: nn.Module, _: Any) -> None:
            self._modules.append(paths.get(id(child), type(child).__name__))

        def leave(*_: Any) -> None:
            if self._modules:
                self._modules.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            # always_call: checkpointing leaves a recomputed forward by an exception.
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._modules.clear()

    def block_of(self, tensor: Tensor) -> int | None:
        """Index of the block that holds `tensor`, or None when it is not tracked."""
        return self._blocks.get(tensor.untyped_storage()._cdata)

    def _made_by(self, tensor: Tensor, name: str) -> bool:
        index = self.block_of(tensor)
        return index is not None and name in self.ledger.blocks[index].op

    def see_random_state(self) -> Tensor:
        """The random generator's state, counted: checkpointing keeps a copy (5 kB) for every block."""
        state = _random_state()
        self._op = "random state"
        self._see(state)
        return state

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        size = -(-size // self._grain) * self._grain
        known = self._blocks.get(key)
        if known is not None:
            if self.ledger.blocks[known].size == size:
                return
            self._end(key)  # resized in place: the old block goes, a new one comes
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        self._blocks[key] = self.ledger.allocate(Block(size, self._op, self.phase, self.module, shape, dtype))
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._end(key))
        self.live_bytes += size

    def let_go(self) -> None:
        """Forget the storages that are still alive: nothing is noted, or called, when they end."""
        self._references.clear()
        self._blocks.clear()

    def _end(self, key: int) -> None:
        index = self._blocks.pop(key, None)
        self._references.pop(key, None)
        if index is not None:
            self.live_bytes -= self.ledger.blocks[index].size
            self.ledger.release(index, self._op, self.phase)


def _sums_gradients(args: tuple[Any, ...], caller: FrameType) -> bool:
    """Whether the engine itself adds a second gradient to one that nobody else holds.

    It does so in place, but not for tensor subclasses.
    """
    frame: FrameType | None = caller
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back
    if frame is None or torch.is_grad_enabled() or not frame.f_code.co_filename.endswith("autograd/graph.py"):
        return False
    old, new = args[:2]
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or (old.shape, old.dtype) != (new.shape, new.dtype):
        return False
    # Held by the engine's buffer, and by the Python object that is asked here.
    return torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2
