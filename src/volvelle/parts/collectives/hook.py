"""A communication hook for DistributedDataParallel: gradients averaged by our all-reduce, also compressed to bf16.

`ddp.register_comm_hook(HookState(algorithm="ring"), comm_hook)`. torch's own bf16_compress_hook refuses gloo.
"""

# No postponed annotations here: DDP compares the hook's annotations with the classes themselves.
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from volvelle.parts.collectives.collectives import AlgorithmName, all_reduce
from volvelle.parts.collectives.topology import Topology
from volvelle.parts.collectives.wire import Traffic


@dataclass
class HookState:
    """What `comm_hook` uses: options of `all_reduce`, and `compress`, the dtype that gradients travel in.

    `compress=torch.bfloat16` halves the bytes: gradients are divided by p, rounded, summed in that dtype, and returned
    in their own. `traffic` counts what this rank sent since the state was made.
    """

    group: dist.ProcessGroup | None = None
    algorithm: AlgorithmName = "auto"
    compress: torch.dtype | None = None
    topology: Topology | None = None
    timeout: float | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        if self.compress is not None and not self.compress.is_floating_point:
            raise TypeError(f"HookState: compress must be a floating dtype, got {self.compress}")


def comm_hook(
    state: HookState,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """Average one bucket of gradients over the ranks; the future holds the bucket's buffer.

    Dividing before the sum keeps fp16 and bf16 from overflowing, as torch's compression hooks do.
    """
    buffer = bucket.buffer()
    sent = buffer.div_(dist.get_world_size(state.group))
    if state.compress is not None and state.compress != buffer.dtype:
        sent = sent.to(state.compress)
    all_reduce(
        sent,
        group=state.group,
        algorithm=state.algorithm,
        topology=state.topology,
        traffic=state.traffic,
        timeout=state.timeout,
    )
    if sent is not buffer:
        buffer.copy_(sent)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(buffer)
    return future
