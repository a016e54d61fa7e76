"""Many processes that train one model: data parallelism over torch.distributed, phase by phase.

Every rank holds the weights and computes the gradient of its own micro-batches; the gradients are averaged before each
update, so all ranks take the same step (Li et al. 2020, "PyTorch Distributed", section 3). With p ranks, micro-batches
i of rank r with weights w_ri (tokens, samples) and gradients g_ri of their means, the update uses

    g = Σ_r Σ_i w_ri g_ri / Σ_r Σ_i w_ri

which is the gradient of one process with all of these micro-batches, whatever their sizes.
"""

from __future__ import annotations

import contextlib
import io
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from volvelle.errors import VolvelleError
from volvelle.parts.collectives import HookState, PeerLost, comm_hook
from volvelle.train.checkpoint import Checkpoints, CorruptCheckpoint
from volvelle.train.contracts import Batches
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Phase
from volvelle.train.random_state import seed_all
from volvelle.train.ranks import Ranks
from volvelle.train.watch import RankLost, Watch

T = TypeVar("T")
_WIRE = re.compile(r"gloo|nccl|connection|socket|store|timed? ?out|\bpeer\b", re.IGNORECASE)


class Group(Ranks):
    """A process among those of the default process group, which must exist.

    `watch` names lost ranks; without one, an error of the back end is passed on as it is. `hook`, a `HookState`, makes
    gradients travel through the all-reduce of `parts.collectives` instead of the back end's.
    """

    def __init__(self, *, watch: Watch | None = None, hook: HookState | None = None):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.watch, self.hook = watch, hook
        self._buffers: list[tuple[nn.Module, str]] | None = None

    def split(self, loader: Batches) -> Batches:
        """Let the loader give out this rank's share only."""
        split = getattr(loader, "split", None)
        if split is None:
            raise TypeError(f"fit: {type(loader).__name__} has no split(rank, world), which many ranks need")
        return split(self.rank, self.world)

    def seed(self, seed: int) -> None:
        """Rank 0 keeps its generators, as one process has them; the others get seeds of their own."""
        if self.rank:
            seed_all((seed + 0x9E3779B97F4A7C15 * self.rank) % 2**63)

    def wrap(self, phase: Phase, modules: Mapping[str, nn.Module]) -> Callable[[Any], Loss]:
        """The phase's loss inside a DistributedDataParallel that knows the phase's parameters only."""
        return _Averaged(phase, self.hook)

    def accumulating(self, loss: Callable[[Any], Loss], *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients stay here until the last micro-batch of the update."""
        assert isinstance(loss, _Averaged)
        return contextlib.nullcontext() if last else loss.ddp.no_sync()

    def total(self, weight: float) -> float:
        """Sum of weights over the ranks, divided by their number."""
        return self.sums([weight])[0] / self.world

    def sums(self, values: Sequence[float]) -> list[float]:
        """One small all-reduce."""
        found = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag."""
        return self._largest(int(flag)) > 0

    def heard(self, name: str | None) -> str | None:
        """The signal that any rank has heard."""
        number = self._largest(signal.Signals[name].value if name else 0)
        return signal.Signals(number).name if number else None

    def _largest(self, number: int) -> int:
        found = torch.tensor([number])
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def even(self, modules: Mapping[str, nn.Module]) -> None:
        """Floating buffers that are saved (running statistics, codebook counts) become the ranks' mean.

        In fp64, in which the mean of equal fp32 numbers is that number. Integers (counts of batches) are equal already.
        """
        if self._buffers is None:
            self._buffers = list(_saved_buffers(modules))
        found = [part._buffers[name] for part, name in self._buffers]
        buffers = [b for b in found if b is not None and b.is_floating_point()]
        if not buffers:
            return
        with torch.no_grad():
            flat = torch.cat([b.detach().double().reshape(-1) for b in buffers])
            dist.all_reduce(flat)
            parts = flat.div_(self.world).split([b.numel() for b in buffers])
            for buffer, mean in zip(buffers, parts, strict=True):
                buffer.copy_(mean.view(buffer.shape))

    def share(self, value: T) -> T:
        """Rank 0's value, pickled."""
        values: list[Any] = [_bytes(value) if self.leads else None]
        dist.broadcast_object_list(values, src=0)
        return value if self.leads else _value(values[0])

    def collect(self, value: T) -> list[T]:
        """Every rank's value, pickled, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, _bytes(value))
        return [_value(content) for content in values]

    def checkpoints(self, folder: Path, options: FitOptions) -> Checkpoints:
        """Rank 0 writes; every rank reads the same one."""
        return SharedCheckpoints(self, folder, keep_last=options.keep_last)

    @contextlib.contextmanager
    def guard(self, kept: Callable[[], str]) -> Iterator[None]:
        """Name the lost rank when communication fails; leave a last word when this rank is the one that fails."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            lost = self._explain(error)
            if lost is None:
                raise
            raise RankLost(*lost, kept=kept()) from error

    def tells(self, error: BaseException) -> bool:
        """Whether this rank is the one to tell the user of the error."""
        if self.watch is None:
            return True
        # A rank that fails tells it itself, and knows more.
        return not (isinstance(error, RankLost) and error.how.startswith("failed")) and self.watch.first()

    def _explain(self, error: BaseException) -> tuple[int, str] | None:
        """Which other rank is to blame for this error, or None when it is this one's own."""
        if self.watch is None or isinstance(error, RankLost):
            return None
        self.watch.leave_soon()
        wire = isinstance(error, dist.DistError | PeerLost | KeyboardInterrupt) or (
            isinstance(error, RuntimeError) and bool(_WIRE.search(str(error)))
        )
        if not wire:
            text = str(error).strip().splitlines() or [""]
            self.watch.say(
                {"error": text[0] if isinstance(error, VolvelleError) else f"{type(error).__name__}: {text[0]}"}
            )
            return None
        patience = 1.0 if isinstance(error, KeyboardInterrupt) else self.watch.timeout + 3 * self.watch.interval + 1
        found = self.watch.verdict(patience)
        if found:
            self.watch.say({"lost": found[0], "how": found[1]})
        return found


class _Averaged(nn.Module):
    """A phase's loss whose backward averages the gradients of the phase's parameters over the ranks."""

    def __init__(self, phase: Phase, hook: HookState | None):
        super().__init__()
        flags = {p: p.requires_grad for p in phase.parameters.values()}
        for p in flags:
            p.requires_grad_(True)
        # Searching for unused parameters lets the loss leave some out, on some ranks or on all, as one process may.
        # It also keeps the buckets as they are made here: else DDP would order them anew after the first step, and a
        # resumed run would sum in another order than the run that it continues.
        self.ddp = DistributedDataParallel(_Loss(phase), find_unused_parameters=True)
        if hook is not None:
            self.ddp.register_comm_hook(hook, comm_hook)
        for p, flag in flags.items():
            p.requires_grad_(flag)

    def forward(self, batch: Any) -> Loss:
        value, metrics, weight = self.ddp(batch)
        return Loss(value, metrics, weight)


class _Loss(nn.Module):
    """The phase's loss as a module that has the phase's parameters and no others."""

    def __init__(self, phase: Phase):
        super().__init__()
        for name, p in phase.parameters.items():
            self.register_parameter(f"of/{name.replace('.', '/')}", p)
        self._phase = phase

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any], float]:
        loss = self._phase.loss(batch)
        # DDP follows every tensor that comes out to see which parameters are used: metrics must not lead anywhere.
        metrics = {name: value.detach() if isinstance(value, Tensor) else value for name, value in loss.metrics.items()}
        return loss.value, metrics, loss.weight


class SharedCheckpoints(Checkpoints):
    """Checkpoints in a folder that all ranks see: rank 0 writes and judges, and all read the one it chose."""

    def __init__(self, ranks: Ranks, folder: Path, *, keep_last: int):
        super().__init__(folder, keep_last=keep_last)
        self.ranks = ranks

    def save(self, step: int, state: Any, *, best: int | None = None) -> Path:
        """Write on rank 0. Every rank has to call it; a failure stops rank 0, and so all."""
        return super().save(step, state, best=best) if self.ranks.leads else self.path(step)

    def newest(self, say: Callable[[str], None]) -> tuple[int, Any] | None:
        """The newest checkpoint that rank 0 finds sound, on every rank."""
        found = super().newest(say) if self.ranks.leads else None
        step = self.ranks.share(found[0] if found else None)
        if step is None or found:
            return found
        try:
            return step, self.load(step)
        except CorruptCheckpoint as error:
            raise VolvelleError(f"rank {self.ranks.rank} cannot read what rank 0 can: {error}") from error


def _bytes(value: Any) -> bytes:
    # torch's own object collectives cannot carry every dtype (NumPy's generator has a uint32 state).
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _value(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


def _saved_buffers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    for module in modules.values():
        for part in module.modules():
            for name in part._buffers:
                if name not in part._non_persistent_buffers_set:
                    yield part, name
