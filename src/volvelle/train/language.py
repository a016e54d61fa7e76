"""Language modelling as an objective: one phase, cross-entropy on the tokens that are to be learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from volvelle.data.loader import Loader
from volvelle.data.tokens import IGNORE, batch_tokens
from volvelle.train.losses import head_cross_entropy, linear_cross_entropy
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Objective, Phase, adamw, trainable
from volvelle.train.player import to_device
from volvelle.train.precision import Precision
from volvelle.train.schedule import schedule


class LanguageModel(Protocol):
    """What the loss asks of a model; `volvelle.systems.language.decoder.Decoder` is one."""

    @property
    def plain_head(self) -> bool:
        """Whether logits are hidden @ output_weight.T and nothing more."""
        ...

    @property
    def output_weight(self) -> Tensor:
        """(V, d)."""
        ...

    def hidden(self, ids: Tensor, *, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """(b, n) -> (b, n, d)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, d) -> (…, V)."""
        ...


def completion_loss(model: Any, batch: Mapping[str, Tensor]) -> Loss:
    """Mean cross-entropy over the positions with a target; only these are projected onto the vocabulary.

    The batch holds ids and targets (b, n), and optionally mask and positions. The loss's weight is their number.
    """
    hidden = states(model, batch)
    value, count = token_loss(model, hidden, batch["targets"])
    return Loss(value, weight=count)


def states(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's final states (b, n, d) of a batch; an encoder-decoder's batch holds source and source_mask too."""
    read = {name: batch[name] for name in ("source", "source_mask") if name in batch}
    return model.hidden(batch["ids"], mask=batch.get("mask"), positions=batch.get("positions"), **read)


def token_loss(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Mean cross-entropy of the states hidden (b, n, d) on targets (b, n), where there are any, and their number."""
    kept = (targets != IGNORE).reshape(-1).nonzero()[:, 0]
    chosen, wanted = hidden.flatten(0, 1).index_select(0, kept), targets.reshape(-1).index_select(0, kept)
    # An adapter on the head replaces the linear layer, and the matrix alone would then leave it out.
    if model.plain_head and type(getattr(model, "lm_head", None)) in (nn.Linear, type(None)):
        value = linear_cross_entropy(chosen, model.output_weight, wanted)
    else:
        value = head_cross_entropy(chosen, model.logits, wanted, vocabulary=model.output_weight.shape[0])
    return value, len(kept)


class LanguageObjective(Objective):
    """Train what asks for gradients in `model` (all of it, or an adapter) to continue text.

    `held_out` gives batches whose loss is measured at evaluations; `also` adds further held-out metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        options: FitOptions,
        *,
        held_out: Loader | None = None,
        also: Callable[[], Mapping[str, float]] | None = None,
    ):
        self.model, self.options, self.held_out, self.also = model, options, held_out, also

    forward_methods = ("hidden",)

    def modules(self) -> Mapping[str, nn.Module]:
        """The model."""
        return {"model": self.model}

    def phases(self, steps: int) -> Sequence[Phase]:
        """One phase over the parameters that ask for gradients."""
        options = self.options
        rate = schedule(options.schedule, steps, options.warmup)
        parameters = trainable(self.model)
        return [Phase("language", parameters, self.loss, adamw(options), rate, clip=options.clip)]

    def loss(self, batch: Any) -> Loss:
        """Cross-entropy on the learnt tokens."""
        return completion_loss(self.model, batch)

    def units(self, batch: Any) -> tuple[float, str]:
        """Real tokens."""
        return float(batch_tokens(batch)), "tokens"

    def evaluate(self) -> Mapping[str, float]:
        """What `measure` finds, and `also`."""
        if self.held_out is None:
            return {}
        return dict(self.measure(self.held_out)) | dict(self.also() if self.also else {})

    def measure(self, held_out: Loader) -> Mapping[str, float]:
        """Held-out loss a token and its perplexity."""
        return held_out_loss(self.model, held_out, self.options.precision)


def held_out_loss(model: Any, loader: Loader, precision: Any = "fp32") -> dict[str, float]:
    """Mean cross-entropy a learnt token over the whole loader, `loss`, and exp of it, `perplexity`."""

    def measure(batch: Any) -> dict[str, tuple[Tensor, float]]:
        loss = completion_loss(model, batch)
        return {"loss": (loss.value, loss.weight)}

    return with_perplexity(held_out_means(model, loader, measure, precision))


def held_out_means(
    model: Any, loader: Loader, measure: Callable[[Any], Mapping[str, tuple[Any, float]]], precision: Any = "fp32"
) -> dict[str, float]:
    """Averages over the whole loader: `measure` gives each batch's means by name, and the number each is the mean of.

    NaN where there was nothing to measure.
    """
    device = next(model.parameters()).device
    numbers = Precision(precision, device)
    totals, training = dict[str, tuple[float, float]](), model.training
    model.eval()
    try:
        with torch.no_grad():
            for plan in loader.plan(0):
                batch = to_device(loader.load(plan), device)
                with numbers.autocast():
                    found = measure(batch)
                for name, (value, weight) in found.items():
                    total, count = totals.get(name, (0.0, 0.0))
                    totals[name] = total + float(value) * weight, count + weight
    finally:
        model.train(training)
    return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


def with_perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics with exp(loss) behind the loss."""
    loss = metrics.get("loss", math.nan)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **metrics}
