"""Trace training steps under fake tensors: one model built, steps at any batch size, each with its peak."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from volvelle.inspect.memory_branches import eager_branches, one_tile
from volvelle.inspect.memory_cuda import CUBLAS_WORKSPACE, GRAIN, CudaForm
from volvelle.inspect.memory_inputs import Inputs
from volvelle.inspect.memory_interrupt import Deferred
from volvelle.inspect.memory_kernels import Kernels
from volvelle.inspect.memory_ledger import Block, Ledger
from volvelle.inspect.memory_options import StepOptions
from volvelle.inspect.memory_step import TrainingStep, sharded_blocks, units_of
from volvelle.inspect.memory_tracker import StorageTracker
from volvelle.inspect.memory_values import Assumption, KnownValues


@dataclass
class Trace:
    """One traced stretch: the ledger's entries [start, stop), its peak in bytes, and the entry where it is reached.

    `gradient_units` has the ledger's blocks that hold gradients, and of which of the model's repeated blocks (None: of
    parameters outside these); `in_blocks` are the entries between which the forward pass runs through these.
    """

    ledger: Ledger
    start: int
    stop: int
    peak: int
    at: int
    gradient_units: Mapping[int, int | None] = field(default_factory=dict)
    in_blocks: range = range(0)

    @property
    def composition(self) -> dict[str, int]:
        """Bytes of each category at the peak."""
        return self.ledger.composition(self.at)


class Session:
    """Fake mode, tracker and patches, entered together; `trace` then runs steps inside.

    >>> with Session() as session, session.tracker.during("forward"):
    ...     start = session.position
    ...     x = torch.ones(256, 256)
    >>> session.trace_since(start).peak
    262144
    """

    def __init__(self, options: StepOptions | None = None, *, threads: int | None = None, eager: bool = True):
        options = options or StepOptions()
        self.threads = torch.get_num_threads() if threads is None else threads
        self.values = KnownValues()
        cuda = options.device == "cuda"
        kernels = Kernels(options.device, self.threads)
        ctrl_c, grain = Deferred(), GRAIN if cuda else 1
        self.tracker = StorageTracker(workspace=kernels, values=self.values, grain=grain, check=ctrl_c.check)
        # Constants that a module made before the session (masks kept as plain attributes) are real: they are taken in.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._modes = [ctrl_c, fake, self.tracker, *([CudaForm()] if cuda else [])]
        self._eager, self._cuda = eager, cuda
        self._stack = contextlib.ExitStack()
        self._named: dict[str, set[int]] = {}
        self._adopted: list[nn.Module | torch.optim.Optimizer] = []

    def __enter__(self) -> Session:
        for mode in self._modes:
            self._stack.enter_context(mode)
        if self._cuda:
            self.tracker.ledger.allocate(
                Block(CUBLAS_WORKSPACE, "cuBLAS workspace", "setup", "", category="temporaries")
            )
        return self

    def __exit__(self, *details: Any) -> None:
        self.tracker.let_go()  # while Ctrl-C still waits: a callback would lose it
        self._stack.close()

    @property
    def position(self) -> int:
        """The ledger's next entry."""
        return len(self.tracker.ledger.entries)

    @property
    def assumptions(self) -> list[Assumption]:
        """What had to be assumed so far."""
        return self.values.assumptions

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, code that asks for fake tensors takes its eager branch, and copies of the random state count."""
        original = torch.get_rng_state
        torch.get_rng_state = self.tracker.see_random_state
        try:
            with eager_branches(self.values, eager=self._eager), one_tile():
                yield
        finally:
            torch.get_rng_state = original

    def name(self, category: str, value: Any) -> None:
        """Say that the tensors in `value` (nested as you like) belong to `category`."""
        for tensor in tree_iter(value):
            index = self.tracker.block_of(tensor) if isinstance(tensor, Tensor) else None
            if index is not None:
                self._named.setdefault(category, set()).add(index)

    def adopt(self, *parts: nn.Module | torch.optim.Optimizer) -> None:
        """Sort the tensors of these modules and optimisers into categories, those that they get later too."""
        self._adopted += parts

    def _name_adopted(self) -> None:
        for part in self._adopted:
            if isinstance(part, nn.Module):
                self.name("weights", list(part.parameters()))
                self.name("buffers", list(part.buffers()))
                self.name("gradients", [p.grad for p in part.parameters() if p.grad is not None])
            else:
                self.name("optimiser", list(part.state.values()))

    def trace_since(self, start: int) -> Trace:
        """Settle the categories and find the peak since `start`."""
        self._name_adopted()
        ledger = self.tracker.ledger
        ledger.settle(self._named)
        peak, at = ledger.peak(start)
        # What is let go of after the last named phase is no part of the stretch.
        stop = len(ledger.entries)
        while stop > at + 1 and ledger.entries[stop - 1].phase == "setup":
            stop -= 1
        return Trace(ledger, start, stop, peak, at)


class StepSession(Session):
    """A session that holds one `TrainingStep`."""

    def __init__(self, build: Callable[..., Any], inputs: Inputs, options: StepOptions, **settings: Any):
        self._loss = settings.pop("loss")
        super().__init__(options, **settings)
        self._build, self._inputs, self._options = build, inputs, options
        self._warm = False

    def __enter__(self) -> StepSession:
        super().__enter__()
        try:
            self.step = TrainingStep(self._build, self._options, self._loss)
        except BaseException:
            self.__exit__()
            raise
        self.values.clear()  # what building assumed (initialisation draws) says nothing about the step
        return self

    def trace(self, size: int) -> Trace:
        """Trace a step at this batch size, with the optimiser's state in place: what a second step takes.

        The state is made first, for all trained parameters. Should some of them get no gradient, they have no state
        either; then it is built again from a step that really ran.
        """
        if not self._warm:
            self._warm = True
            with self.tracker.during("optimiser"):
                self.step.prepare()
            first = self._run(size)
            if all(p.grad is not None for p in self.step.trainable):
                return first
            self.step.renew_optimizer()
            self._run(size)
        return self._run(size)

    def _run(self, size: int) -> Trace:
        self.step.clear()
        with self.eager(), self.tracker.watching(self.step.model):
            with self.tracker.during("inputs"):
                inputs = self._inputs.fake(size, self.values)
            self.name("inputs", inputs)
            start = self.position
            self.step.run(inputs, self.tracker.during)
        for category, tensors in self.step.named_tensors().items():
            self.name(category, tensors)
        trace = self.trace_since(start)
        trace.gradient_units = self._gradient_units()
        trace.in_blocks = self._in_blocks(start)
        return trace

    def _gradient_units(self) -> dict[int, int | None]:
        units, root = units_of(self.step.model)
        owners = [*((p, number) for number, unit in enumerate(units) for p in unit), *((p, None) for p in root)]
        found = ((self.tracker.block_of(p.grad), unit) for p, unit in owners if p.grad is not None)
        return {block: unit for block, unit in found if block is not None}

    def _in_blocks(self, start: int) -> range:
        wanted = {id(block) for block in sharded_blocks(self.step.model)}
        paths = {path for path, module in self.step.model.named_modules() if id(module) in wanted}
        below = tuple(f"{path}." for path in paths)
        ledger = self.tracker.ledger
        made = [
            index
            for index, entry in enumerate(ledger.entries[start:], start)
            if entry.sign > 0
            and entry.phase == "forward"
            and ((module := ledger.blocks[entry.block].module) in paths or module.startswith(below))
        ]
        return range(made[0], made[-1] + 1) if made else range(0)
