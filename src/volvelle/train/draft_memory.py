"""The memory of a step that trains something beside a model which stays as it is, from sizes alone."""

from __future__ import annotations

from torch import nn

from volvelle.data.loader import Loader
from volvelle.systems.language.config import GatedMLP
from volvelle.systems.language.decoder import Decoder
from volvelle.train.estimate import MemoryEstimate, largest_batch
from volvelle.train.losses import CHUNK_BYTES

_STATES = 6  # of the width: residual stream, normed, q k v and their result, alive together in a block
_KEPT = 12  # of the width: what a trained block keeps for its backward pass, in fp32


def beside_memory(
    model: Decoder,
    module: nn.Module,
    loader: Loader,
    places: int,
    *,
    blocks: int = 0,
    backbone: MemoryEstimate | None = None,
) -> MemoryEstimate:
    """A rough estimate: one block of the model alive at a time, `places` states kept, the loss in chunks.

    `blocks` are those that are trained with all they keep; `backbone` is what training the model itself takes.
    """
    config, rows = model.config, largest_batch(loader)["ids"].numel()
    own = [p.nbytes for p in module.parameters()]
    inner = 3 * config.mlp.width if isinstance(config.mlp, GatedMLP) else 2 * config.mlp.width
    alive = rows * (_STATES * config.width + inner) * model.dtype.itemsize
    kept = 4 * rows * config.width * (3 * places + _KEPT * blocks) + 4 * rows * blocks * inner
    if backbone is None:
        weights = sum(p.nbytes for p in model.parameters())
        backbone = MemoryEstimate(weights, 0, 0, alive)
    return MemoryEstimate(
        backbone.weights + sum(own),
        backbone.gradients + sum(own),
        backbone.optimizer + 2 * sum(own),
        backbone.activations + kept + 3 * CHUNK_BYTES,
    )
