"""The memory of a training step, planned from its configuration: nothing is allocated.

`estimate_step` is that of any model, for a run's first line. `plan_language` plans the step that the training loop
takes with a language model, and `estimate_memory` is its quick form: a deep model is planned at two small depths and
continued to its own.

A step's memory at a given moment (the loss, the last block of the backward pass, ...) is a line in the number of equal
blocks: each block adds its weights, gradients, optimiser state and activations. The peak of a stretch of the step is
therefore a line in the depth too, and the peak of the step the largest of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from volvelle.data.loader import Loader
from volvelle.data.tokens import IGNORE
from volvelle.inspect.memory_ledger import CATEGORIES, Point
from volvelle.inspect.memory_options import Cards, Shard
from volvelle.inspect.memory_plan import MemoryPlan, plan_memory
from volvelle.inspect.memory_step import cast
from volvelle.systems.language.config import LanguageConfig
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.encoder_decoder_config import ModelConfig
from volvelle.systems.language.models import LanguageModel
from volvelle.systems.language.models import build as fresh
from volvelle.systems.language.mtp import MTP, MultiToken
from volvelle.train.language import completion_loss, states
from volvelle.train.losses import ChunkedCrossEntropy, chunk_rows
from volvelle.train.mtp import multi_token_loss
from volvelle.train.options import FitOptions

DEPTHS = (3, 5)
"""Planned depths; models of up to `SHALLOW` blocks are planned as they are."""
SHALLOW = 8
CHUNKS = 3
UNLIMITED = 1e6
"""Gigabytes of a rank of which only the need is asked."""

Batch = Mapping[str, Tensor] | Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part at the peak of one rank; `total` is their sum.

    `activations` holds inputs, buffers and temporaries too; `communication` is what many ranks gather whole (fsdp) or
    average in buckets (ddp).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "activations": self.activations,
            "communication": self.communication,
        }
        # Shown from 10 MB up; an adapter's gradients are not worth a number.
        named = ", ".join(f"{name} {_size(value)}" for name, value in parts.items() if value >= 10**7)
        return f"about {_size(self.total)}" + (f" ({named})" if named else "")


def plan_language(
    config: ModelConfig,
    batch: Batch,
    *,
    stored: torch.dtype = torch.float32,
    mtp: MTP | None = None,
    **planning: Any,
) -> MemoryPlan:
    """Plan one step of the training loop for a fresh model of this configuration, weights stored as `stored`.

    With `mtp` a fresh copy of these modules trains with it.

    `batch` holds ids and targets (b, n), and mask and positions where the data has them, or makes them from b.
    `planning` are the arguments of `plan_memory`: method, precision, checkpointing, optimizer, size, gpus and so on.
    """

    def build() -> LanguageModel | MultiToken:
        model = fresh(config)
        if mtp is not None and isinstance(model, Decoder):
            model = MultiToken(model, type(mtp)(model.config, mtp.depths))
        if stored != torch.float32:
            cast(model, stored)
        return model

    method: Any = planning.get("method")
    if getattr(method, "text", None):  # a fresh model has no tokenizer, and where training begins costs nothing
        planning |= {"method": dataclasses.replace(method, text=None)}
    return plan_memory(build, batch, loss=_loss, **planning)


def whole_windows(length: int, *, sources: bool = False) -> Callable[[int], dict[str, Tensor]]:
    """A batch of b windows of `length` tokens, every one of them learnt; with `sources` of as many tokens each.

    Each is a tensor of its own, as in the batches of a loader.
    """
    names = ("ids", "targets", "source") if sources else ("ids", "targets")

    def batch(size: int) -> dict[str, Tensor]:
        return {name: torch.zeros(size, length, dtype=torch.long) for name in names}

    return batch


def estimate_memory(
    config: ModelConfig,
    batch: Mapping[str, Tensor],
    *,
    method: Any = "full",
    autocast: bool = False,
    stored: torch.dtype = torch.float32,
    checkpointing: bool = False,
    average: bool = False,
    device: str = "cpu",
    mtp: MTP | None = None,
    ranks: int = 1,
    shard: Shard = "ddp",
    accumulate: int = 1,
) -> MemoryEstimate:
    """What a step on `batch` takes at its peak on one rank, by category.

    `method` is "full" or a method of volvelle.adapt; `autocast` runs the forward pass in half precision; `average`
    keeps a moving average of what is trained, counted with the optimiser; `mtp` are modules that are trained too. Of
    many `ranks` each takes such a batch; `shard` says whether it holds everything (ddp) or its share (fsdp). With
    `accumulate` micro-batches to an update the gradients of earlier ones are there too.
    """
    options: dict[str, Any] = {
        "method": method,
        "checkpointing": checkpointing,
        "stored": stored,
        "mtp": mtp,
        **_planning(autocast, device, ranks, shard, accumulate),
    }
    # A method that names blocks by index means blocks of the whole model; and an encoder-decoder has two depths.
    whole = not isinstance(config, LanguageConfig) or getattr(method, "layers", None) is not None
    if config.depth <= SHALLOW or whole:
        return _at_peak(plan_language(config, batch, **options), average)
    plans = [plan_language(dataclasses.replace(config, depth=depth), batch, **options) for depth in DEPTHS]
    return _estimate(deeper(plans[0], plans[1], DEPTHS, config.depth), average)


def estimate_step(
    build: Callable[[], nn.Module],
    batch: Mapping[str, Tensor],
    *,
    loss: Callable[[Any, Any], Tensor],
    options: FitOptions,
    device: str = "cpu",
) -> MemoryEstimate:
    """What a step of `loss(model, batch)` with these options takes at its peak on one rank, for any model.

    `build` makes it; it runs on fake tensors.
    """
    planning = _planning(options.precision != "fp32", device, options.ranks, options.shard, options.accumulate)
    return _at_peak(plan_memory(build, batch, loss=loss, **planning), options.average is not None)


def deeper(first: MemoryPlan, second: MemoryPlan, depths: tuple[int, int], depth: int) -> list[float]:
    """The sizes at the peak at `depth`, from plans at two smaller depths: the largest of all stretches' lines."""
    slope = (depth - depths[0]) / (depths[1] - depths[0])
    lines = []
    for one, two in zip(_stretches(first), _stretches(second), strict=True):
        lines.append([low + slope * (high - low) for low, high in zip(one, two, strict=True)])
    return max(lines, key=sum)


def _planning(autocast: bool, device: str, ranks: int, shard: Shard, accumulate: int) -> dict[str, Any]:
    """Arguments of `plan_memory`."""
    return {
        "precision": "amp" if autocast else "fp32",
        "device": "cuda" if device == "cuda" else "cpu",
        "gpus": Cards(ranks, UNLIMITED) if ranks > 1 else None,
        "shard": shard,
        "accumulated": accumulate > 1,
    }


def _at_peak(plan: MemoryPlan, average: bool) -> MemoryEstimate:
    return _estimate(max((moment.sizes for moment in _moments(plan)), key=sum), average)


def _moments(plan: MemoryPlan) -> Sequence[Point]:
    """The timeline of a rank: of one process, or of one of many."""
    return plan.timeline if plan.card is None else plan.card.timeline


def _stretches(plan: MemoryPlan) -> list[tuple[int, ...]]:
    """The largest moments of the halves of the forward and the backward pass, and of the update."""
    phases: dict[str, list[tuple[int, ...]]] = {"forward": [], "backward": [], "optimiser": []}
    for point in _moments(plan):
        name = "backward" if point.phase == "recompute" else point.phase
        if name in phases:
            phases[name].append(point.sizes)
    # A forward pass ends, and a backward pass begins, at the loss, where most activations are alive; at the other ends
    # they are none, but the gradients are there. Each half has its own line.
    halves = []
    for moments in filter(None, phases.values()):  # the fused update allocates nothing
        middle = max(1, len(moments) // 2)
        halves += [moments[:middle], moments[middle:] or moments]
    return [max(half, key=sum) for half in halves]


def largest_batch(loader: Loader) -> Any:
    """The batch of an epoch that holds the most positions, read and collated."""
    batches = loader.plan(0)
    if loader.lengths is not None:
        lengths = loader.lengths
        return loader.load(max(batches, key=lambda ids: len(ids) * max(lengths[i] for i in ids)))
    return loader.load(max(batches, key=len))


def _estimate(sizes: Sequence[float], average: bool) -> MemoryEstimate:
    """From bytes in the order of CATEGORIES, on one of many ranks with those of communication behind them."""
    named = dict(zip((*CATEGORIES, "communication"), map(round, sizes), strict=False))
    main = [named.pop(name) for name in ("weights", "gradients", "optimiser")]
    communication = named.pop("communication", 0)
    # The average is one number a trained parameter, Adam's moments are two.
    kept = main[2] // 2 if average else 0
    return MemoryEstimate(main[0], main[1], main[2] + kept, sum(named.values()), communication)


def _loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The training loop's loss in memory; of its many equal chunks of logits only the first few are planned."""
    if isinstance(model, MultiToken):
        return multi_token_loss(model, batch, 1.0).value
    if not model.plain_head or type(model.lm_head) is not nn.Linear:
        return completion_loss(model, batch).value
    targets = batch["targets"].reshape(-1)
    hidden = states(model, batch).flatten(0, 1)
    kept = (targets != IGNORE).nonzero()[:, 0]
    chosen, wanted = hidden.index_select(0, kept), targets.index_select(0, kept)
    weight = model.output_weight
    rows = chunk_rows(weight.shape[0])
    return ChunkedCrossEntropy.apply(chosen, weight, wanted[: CHUNKS * rows], rows)  # type: ignore[return-value]


def _size(value: int) -> str:
    return f"{value / 10**9:.1f} GB" if value >= 10**9 else f"{value / 10**6:.0f} MB"
