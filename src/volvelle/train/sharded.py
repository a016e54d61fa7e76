"""Fully sharded data parallelism (FSDP2): every rank keeps 1/p of the weights, gradients and optimiser states.

Zhao et al. 2023, "PyTorch FSDP", section 3; Rajbhandari et al. 2020, "ZeRO", stage 3. The weights of a block are
gathered when it runs and dropped again; its gradients are averaged and scattered. The steps are those of `Group`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, Shard, zeros

from volvelle.errors import VolvelleError
from volvelle.inspect.memory_step import sharded_blocks
from volvelle.train.checkpoint import CorruptCheckpoint, pack, read, unpack, write
from volvelle.train.distributed import Group, SharedCheckpoints
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Phase
from volvelle.train.watch import Watch


class ShardedGroup(Group):
    """A process among those of the default process group, with 1/p of every weight."""

    def __init__(self, *, watch: Watch | None = None):
        super().__init__(watch=watch)
        self.mesh: DeviceMesh | None = None
        self._units: list[FSDPModule] = []
        self._roots: list[FSDPModule] = []
        self._methods: Sequence[str] = ()

    def prepare(self, modules: Mapping[str, nn.Module], methods: Sequence[str] = ()) -> None:
        """Shard every block of a deep model on its own (`sharded_blocks`), and the rest with the module."""
        device = next(p.device for module in modules.values() for p in module.parameters())
        self.mesh, self._methods = init_device_mesh(device.type, (self.world,)), methods
        for module in modules.values():
            for p in module.parameters():
                p.data = p.data.contiguous()  # of weights in channels-last order there are no shards
            self._units += [fully_shard(block, mesh=self.mesh) for block in sharded_blocks(module)]
            # The root's weights (embeddings, head) are used beside its forward, so they stay whole until the backward.
            root = fully_shard(module, mesh=self.mesh, reshard_after_forward=False)
            for name in methods:
                register_fsdp_forward_method(module, name)
            # What torch leaves to the first forward pass: until then no weights can be gathered.
            root._get_fsdp_state()._lazy_init()
            self._roots.append(root)

    def wrap(self, phase: Phase, modules: Mapping[str, nn.Module]) -> Callable[[Any], Loss]:
        """The phase's loss: the modules themselves average their gradients."""
        return phase.loss

    @contextlib.contextmanager
    def accumulating(self, loss: Callable[[Any], Loss], *, last: bool) -> Iterator[None]:
        """Every micro-batch's gradients are scattered: kept until the last one, they would be whole on every rank."""
        yield
        if last:
            # A player that was run and not trained keeps its weights whole; its next turn changes the shards only.
            for unit in (*self._units, *self._roots):
                unit.reshard()

    def size(self, norm: Tensor) -> Tensor:
        """The norm over all shards."""
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextlib.contextmanager
    def whole(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Gather all weights on every rank, and let no forward pass drop or gather them meanwhile.

        A forward pass in the state before a backward pass (when activations are recomputed) leaves weights as they are.
        Only not to drop them behind it would not do: a method inside another one drops them all the same.
        """
        units = (*self._roots, *self._units)
        for unit in units:
            unit.unshard()
        for unit in units:
            unit._get_fsdp_state()._training_state = TrainingState.PRE_BACKWARD
        try:
            yield
        finally:
            for unit in units:
                unit._get_fsdp_state()._training_state = TrainingState.IDLE
                unit.reshard()
            for root in self._roots:
                root.reset_iter_state()

    def finish(self, modules: Mapping[str, nn.Module]) -> None:
        """Plain modules again, with whole weights on every rank."""
        for unit in (*self._units, *self._roots):
            unit.reshard()
        for module in modules.values():
            _gather(module)
        for unit in (*self._units, *self._roots):
            _plain(unit, self._methods)
        self._units, self._roots = [], []

    def checkpoints(self, folder: Path, options: FitOptions) -> SharedCheckpoints:
        """Every rank writes its shards."""
        return ShardedCheckpoints(self, folder, keep_last=options.keep_last)


def _gather(module: nn.Module) -> None:
    """Replace sharded parameters by whole ones; tied ones stay tied."""
    found: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if isinstance(p, DTensor):
                if id(p) not in found:
                    whole = nn.Parameter(DTensor.full_tensor(p.detach()), requires_grad=p.requires_grad)  # type: ignore[arg-type]
                    found[id(p)] = (p, whole)
                part._parameters[name] = found[id(p)][1]


def _plain(unit: FSDPModule, methods: Sequence[str]) -> None:
    """Take off what `fully_shard` has put on; torch has no call for it."""
    assert isinstance(unit, nn.Module)
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
    for name in methods:
        unit.__dict__.pop(name, None)
    unit.__class__ = type(unit).__bases__[1]


class ShardedCheckpoints(SharedCheckpoints):
    """Checkpoints to which every rank adds a file with its shards (torch.distributed.checkpoint), in `shards/`.

    What is not sharded lies beside it as in any other checkpoint. The folder gets its name when all ranks are done, and
    the manifest covers every file of every rank. The index of the shards is a pickle, as torch makes it.
    """

    ranks: ShardedGroup

    def save(self, step: int, state: Any, *, best: int | None = None) -> Path:
        """Write together. Every rank has to call it; a failure of one is raised by all."""
        temporary = self._temporary(step)
        tensors: dict[str, Tensor] = {}
        shards: dict[str, Tensor] = {}
        tree = pack(state, tensors, shards=shards)

        def begin() -> None:
            if self.ranks.leads:
                self._sweep()
                temporary.mkdir(parents=True)
                write(temporary, tree, tensors)

        def publish() -> None:
            if self.ranks.leads:
                self._publish(step)
                self._prune(step, best)

        for action in (begin, lambda: _save_shards(shards, temporary / "shards"), publish):
            self._together(step, action)
        return self.path(step)

    def _together(self, step: int, action: Callable[[], None]) -> None:
        error: Exception | None = None
        try:
            action()
        except (OSError, SafetensorError) as found:
            error = found
        found = next((one for one in self.ranks.collect(_plain_error(error)) if one is not None), None)
        if found is None:
            return
        failure = self._failed(step, OSError(*found)) if self.ranks.leads else None
        text, tip = self.ranks.share((str(failure), failure.tip) if failure else ("", None))
        raise VolvelleError(text, tip=tip) from error

    def newest(self, say: Callable[[str], None]) -> tuple[int, Any] | None:
        """The newest checkpoint that rank 0 finds sound, each rank with its shards."""
        step: int | None = None
        if self.ranks.leads:
            step = self._sound(say)
        step = self.ranks.share(step)
        return None if step is None else (step, self.load(step))

    def _sound(self, say: Callable[[str], None]) -> int | None:
        self._recover()
        steps = self.steps()
        for step in reversed(steps):
            try:
                self.verify(step)
                return step
            except CorruptCheckpoint as error:
                say(f"checkpoint of step {step} is corrupt and was passed over: {error}")
        if steps:
            raise VolvelleError(f"{self.folder}: all {len(steps)} checkpoints are corrupt")
        return None

    def load(self, step: int) -> Any:
        """What was saved at `step`, of the shards this rank's. Every rank has to call it."""
        folder, mesh = self.path(step), self.ranks.mesh
        assert mesh is not None
        tree, tensors = read(folder)
        reader = FileSystemReader(folder / "shards")
        shards: dict[str, Any] = {
            name: zeros(*meta.size, dtype=meta.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
            for name, meta in reader.read_metadata().state_dict_metadata.items()
            if isinstance(meta, TensorStorageMetadata)
        }
        load(shards, storage_reader=reader)
        return unpack(tree, tensors, shards)


def _plain_error(error: Exception | None) -> tuple[int | None, str] | None:
    """Number and words of an error, to be sent to other ranks."""
    return None if error is None else (getattr(error, "errno", None), str(error))


def _save_shards(shards: dict[str, Any], folder: Path) -> None:
    try:
        save(shards, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:  # not an Exception in torch; it holds what every rank met
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(getattr(cause, "errno", None), f"rank {rank}: {cause}") from error
    dist.barrier()


__all__ = ["ShardedCheckpoints", "ShardedGroup"]
