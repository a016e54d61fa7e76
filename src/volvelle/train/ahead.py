"""What drafters learn: the tokens after the next one, from the states of a model whose own prediction is the next one.

With N positions that have a next token to learn, and for place k = 1 .. K behind it the positions i whose token
t_{i+k+1} is one of the same text to learn and can be drafted,

    L_k = - 1/N Σ_i log p_i^k[t_{i+k+1}]        L = Σ_k λ_k L_k

(Cai et al. 2024, "Medusa", arXiv 2401.10774, section 2.2.1, with λ_k = 0.8^k.) Beside the backbone (section 2.2.2,
"Medusa-2"), whose loss of the next token is L_0: L_0 + λ_0 L.

Shapes: b batch, n tokens, K places, r tokens that can be drafted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from volvelle.data.loader import Loader
from volvelle.data.tokens import IGNORE, batch_tokens
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHead
from volvelle.systems.language.medusa import MedusaHeads
from volvelle.systems.language.mtp import MTP
from volvelle.systems.language.projections import fuse_projections
from volvelle.train.language import held_out_means, states, token_loss, with_perplexity
from volvelle.train.losses import chunk_rows, head_cross_entropy, linear_cross_entropy
from volvelle.train.mtp import further_targets
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Objective, OptimizerFactory, Phase, adamw, trainable
from volvelle.train.schedule import schedule

RANKS = 10
"""How many of a head's best guesses are counted one by one."""


class Prediction(NamedTuple):
    """Of one place: the states (b, n, width) that its projection reads, and the projection's matrix (r, width).

    `matrix` None: that of the model, or of its tokens that can be drafted.
    """

    states: Tensor
    matrix: Tensor | None = None


class Ahead(Protocol):
    """Heads or modules beside a model, as training sees them."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def predict(self, model: Decoder, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Prediction]]:
        """The model's own final states (b, n, width), and the predictions of places 1 .. K."""
        ...


class AheadOfHidden:
    """Medusa's heads, which read the final states alone; `frozen` runs the model without gradients."""

    def __init__(self, heads: MedusaHeads, *, frozen: bool = True):
        self.module, self.frozen = heads, frozen

    def predict(self, model: Decoder, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Prediction]]:
        """See `Ahead`."""
        heads = self.module
        hidden = still(model, batch) if self.frozen else states(model, batch)
        wide = hidden.float() if hidden.dtype.itemsize == 2 else hidden
        matrices = [heads.projection(k).weight if heads.own else None for k in range(heads.count)]
        return hidden, [Prediction(heads.state(k, wide), matrix) for k, matrix in enumerate(matrices)]


class AheadOfBlocks:
    """Modules of multi-token prediction, which read the texts again."""

    def __init__(self, mtp: MTP):
        self.module = mtp

    def predict(self, model: Decoder, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Prediction]]:
        """See `Ahead`."""
        hidden, *further = self.module(model, batch["ids"], positions=batch.get("positions"), mask=batch.get("mask"))
        return hidden, [Prediction(state) for state in further]


def still(model: Decoder, batch: Mapping[str, Tensor]) -> Tensor:
    """The final states of a model that is not trained: no graph, and in the dtype in which its weights are stored."""
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        return states(model, batch)


def targets_of(batch: Mapping[str, Tensor], count: int, head: DraftHead) -> list[Tensor]:
    """Of places 1 .. `count` the place in the draft vocabulary of the token to learn (b, n), or -100."""
    return [head.places(further_targets(batch, k), IGNORE) for k in range(1, count + 1)]


def ahead_loss(
    model: Decoder,
    ahead: Ahead,
    batch: Mapping[str, Tensor],
    head: DraftHead,
    weights: Sequence[float],
    *,
    backbone: float | None = None,
) -> Loss:
    """L, with λ_k = weights[k - 1]; with `backbone` = λ_0 it is L_0 + λ_0 L, and trains the model too.

    Its metrics are the mean losses a token, `token_2_loss` onwards. The weight is N.
    """
    hidden, predictions = ahead.predict(model, batch)
    n = max(1, int((batch["targets"] != IGNORE).sum()))
    metrics: dict[str, Tensor | float] = {}
    total = hidden.new_zeros((), dtype=torch.float32)
    wanted = targets_of(batch, len(predictions), head)
    for k, (prediction, targets, weight) in enumerate(zip(predictions, wanted, weights, strict=True), 1):
        value, count = _loss(prediction, targets, head)
        total = total + value * (weight * count / n)
        metrics[f"token_{k + 1}_loss"] = value.detach()
    if backbone is not None:
        own, _ = token_loss(model, hidden, batch["targets"])
        metrics["next_token_loss"] = own.detach()
        total = own + backbone * total
    return Loss(total, metrics, weight=n)


def _loss(prediction: Prediction, targets: Tensor, head: DraftHead) -> tuple[Tensor, int]:
    """Mean cross-entropy where there is a target, and how many there are."""
    chosen, wanted = _kept(prediction.states, targets)
    matrix = head.plain if prediction.matrix is None else prediction.matrix
    if matrix is None:
        value = head_cross_entropy(chosen, head.logits, wanted, vocabulary=head.model.config.vocabulary)
    else:
        value = linear_cross_entropy(chosen, matrix, wanted)
    return value, len(wanted)


def _kept(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    kept = (targets != IGNORE).reshape(-1).nonzero()[:, 0]
    return hidden.flatten(0, 1).index_select(0, kept), targets.reshape(-1).index_select(0, kept)


def rank_hits(prediction: Prediction, targets: Tensor, head: DraftHead, ranks: int = RANKS) -> Tensor:
    """How many of the targets (b, n), tokens of the model or -100, are ranked 1st, 2nd, … `ranks`-th: (ranks,)."""
    chosen, wanted = _kept(prediction.states, targets)
    rows = chunk_rows(head.size)
    hits = torch.zeros(ranks, dtype=torch.long, device=targets.device)
    for h, t in zip(chosen.split(rows), wanted.split(rows), strict=True):
        logits = head.logits(h.to(head.model.dtype)) if prediction.matrix is None else h @ prediction.matrix.T
        best = head.words(logits.topk(min(ranks, head.size)).indices)
        hits[: best.shape[1]] += (best == t[:, None]).sum(0)
    return hits


class Measured(NamedTuple):
    """Held-out metrics, and the shares (K, ranks) of tokens that were ranked 1st, 2nd, … at each place."""

    metrics: dict[str, float]
    acceptance: Tensor


def held_out_ahead(
    model: Decoder, ahead: Ahead, loader: Loader, head: DraftHead, precision: Any = "fp32", ranks: int = RANKS
) -> Measured:
    """Over the loader: the next token's `loss`, `perplexity`, `accuracy`; `token_2_accuracy`, `token_2_top5` and so on.

    Accuracies are shares of all tokens, of which those that cannot be drafted are missed; losses (`token_2_loss`) are
    those of the tokens that can.
    """
    whole = DraftHead(model)
    totals: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def measure(batch: Mapping[str, Tensor]) -> dict[str, tuple[Any, float]]:
        hidden, predictions = ahead.predict(model, batch)
        loss, learnt = token_loss(model, hidden, batch["targets"])
        right = rank_hits(Prediction(hidden), batch["targets"], whole, 1)
        found: dict[str, tuple[Any, float]] = {
            "loss": (loss, learnt),
            "accuracy": (float(right) / max(1, learnt), learnt),
        }
        wanted = targets_of(batch, len(predictions), head)
        for k, (prediction, places) in enumerate(zip(predictions, wanted, strict=True), 1):
            targets = further_targets(batch, k)
            hits, count = rank_hits(prediction, targets, head, ranks), int((targets != IGNORE).sum())
            totals[k], counts[k] = totals.get(k, 0) + hits, counts.get(k, 0) + count
            found[f"token_{k + 1}_loss"] = _loss(prediction, places, head)
            for name, best in (("accuracy", 1), ("top5", 5)):
                found[f"token_{k + 1}_{name}"] = float(hits[:best].sum()) / max(1, count), count
        return found

    metrics = with_perplexity(held_out_means(model, loader, measure, precision))
    shares = [totals[k].double() / max(1, counts[k]) for k in sorted(totals)]
    return Measured(metrics, torch.stack(shares).float().cpu())


@dataclass(frozen=True)
class UntilPhase(Phase):
    """A phase that plays before step `end` only."""

    end: int = 0

    def plays(self, step: int) -> bool:
        """Whether this phase has a turn at `step`."""
        return step < self.end and super().plays(step)


class Joint(NamedTuple):
    """How the backbone is trained too: λ_0, its learning rate over the heads', the share of steps before it begins."""

    weight: float = 0.2
    rate: float = 0.25
    warmup: float = 0.3


class AheadObjective(Objective):
    """Train what predicts further tokens beside a model, which stays as it is but for `joint`.

    `weights` are λ_1 .. λ_K. With `joint` the parameters of the model that ask for gradients (an adapter's) are trained
    too, at a learning rate of their own, after the heads have had a share of the steps alone: their first gradients
    would only harm the model (Cai et al. 2024, section 2.2.2). Evaluations are those of `held_out_ahead`.
    """

    best = ("token_2_accuracy", "max")
    forward_methods = ("hidden",)

    def __init__(
        self,
        model: Decoder,
        ahead: Ahead,
        options: FitOptions,
        *,
        weights: Sequence[float],
        head: DraftHead,
        held_out: Loader | None = None,
        joint: Joint | None = None,
    ):
        self.model, self.ahead, self.options, self.joint = model, ahead, options, joint
        self.weights, self.head, self.held_out = list(weights), head, held_out
        self.last: Measured | None = None
        if joint is None:
            model.requires_grad_(False)

    def modules(self) -> Mapping[str, nn.Module]:
        """The model and what is trained beside it."""
        return {"model": self.model, "ahead": self.ahead.module}

    def train_mode(self) -> None:
        """A model that is not trained runs as it is used: without dropout, on its fast path."""
        self.ahead.module.train()
        self.model.train(self.joint is not None)
        if self.joint is None:
            fuse_projections(self.model)

    def phases(self, steps: int) -> Sequence[Phase]:
        """One phase; with `joint` a second one, of all together, follows it."""
        options, beside = self.options, trainable(self.ahead.module, "ahead.")

        def common(length: int) -> dict[str, Any]:
            return {"schedule": schedule(options.schedule, length, options.warmup), "clip": options.clip}

        joint = self.joint
        if joint is None:
            return [Phase("heads", beside, self.loss, adamw(options), **common(steps))]
        alone = min(steps - 1, round(joint.warmup * steps))
        make = two_rates(options, {"model.": joint.rate * options.learning_rate})
        both = beside | trainable(self.model, "model.")
        second = Phase("both", both, self.joint_loss, make, start=alone, **common(steps - alone))
        if not alone:
            return [second]
        return [UntilPhase("heads", beside, self.loss, adamw(options), end=alone, **common(alone)), second]

    def loss(self, batch: Any) -> Loss:
        """L."""
        return ahead_loss(self.model, self.ahead, batch, self.head, self.weights)

    def joint_loss(self, batch: Any) -> Loss:
        """L_0 + λ_0 L."""
        assert self.joint is not None
        return ahead_loss(self.model, self.ahead, batch, self.head, self.weights, backbone=self.joint.weight)

    def units(self, batch: Any) -> tuple[float, str]:
        """Real tokens."""
        return float(batch_tokens(batch)), "tokens"

    def evaluate(self) -> Mapping[str, float]:
        """Held-out losses and accuracies."""
        if self.held_out is None:
            return {}
        self.last = held_out_ahead(self.model, self.ahead, self.held_out, self.head, self.options.precision)
        return self.last.metrics

    def measured(self) -> Measured:
        """What the last evaluation found, at the end of a run the trained heads'."""
        if self.last is None:
            self.evaluate()
        assert self.last is not None
        return self.last


def two_rates(options: FitOptions, others: Mapping[str, float]) -> OptimizerFactory:
    """AdamW as `adamw` makes it, with other peak rates for parameters whose names begin as `others` says."""

    def build(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = adamw(options)(parameters)
        rates = {id(p): next((r for start, r in others.items() if name.startswith(start)), options.learning_rate)
                 for name, p in parameters.items()}  # fmt: skip
        groups = []
        for group in optimizer.param_groups:
            for rate in dict.fromkeys(rates[id(p)] for p in group["params"]):
                groups.append(group | {"params": [p for p in group["params"] if rates[id(p)] == rate], "lr": rate})
        optimizer.param_groups[:] = groups
        return optimizer

    return build
