"""Training a decoder to predict several tokens at once, and measuring each of them.

With N positions that have a next token to learn, and for depth k the positions i whose token t_{i+k+1} is one of the
same text to learn,

    L_k = - 1/N Σ_i log P_i^k[t_{i+k+1}]        L = L_0 + λ/D Σ_{k=1..D} L_k

(DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2, equations 24 and 25; they used λ = 0.3 and later 0.1).
λ = D gives the plain sum of Gloeckle et al. 2024, section 2. Dividing every L_k by the same N makes the mean over
micro-batches, weighted by N, the loss of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from volvelle.data.loader import Loader
from volvelle.data.tokens import IGNORE
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.mtp import MultiToken, ParallelMTP
from volvelle.train.language import LanguageObjective, held_out_means, token_loss, with_perplexity
from volvelle.train.losses import chunk_rows, computing_in
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss

SEQUENTIAL_WEIGHT = 0.3
"""λ of DeepSeek-V3 for most of its training (section 4.2)."""


def usual_weight(kind: str, depths: int) -> float:
    """The λ of the kind's paper."""
    return SEQUENTIAL_WEIGHT if kind == "sequential" else float(depths)


def further_targets(batch: Mapping[str, Tensor], k: int) -> Tensor:
    """The token to learn k places behind each position's next one (b, n), or -100.

    There is none where it is not to be learnt, where the row ends, and where another text begins: by a mask (b, n)
    that is padding or the number of the text, from 1 on, by a mask (b, n, n) a token that cannot see this position.

    >>> further_targets({"targets": torch.tensor([[5, 6, -100, 8]])}, 1)
    tensor([[   6, -100,    8, -100]])
    """
    targets, mask = batch["targets"], batch.get("mask")
    if k == 0:
        return targets
    found = torch.full_like(targets, IGNORE)
    if k >= targets.shape[1]:
        return found
    there = targets[:, k:]
    if mask is not None:
        together = mask.diagonal(-k, 1, 2) if mask.ndim == 3 else (mask[:, k:] == mask[:, :-k]) & (mask[:, k:] > 0)
        there = there.masked_fill(~together, IGNORE)
    found[:, :-k] = there
    return found


def multi_token_loss(model: MultiToken, batch: Mapping[str, Tensor], weight: float, *, frugal: bool = True) -> Loss:
    """L with λ = `weight`; its metrics are the mean losses a token, `next_token_loss` and `token_2_loss` onwards.

    The batch is that of `completion_loss`, and so is the loss's weight N. Parallel heads run forward and backward one
    after the other where `frugal` (Gloeckle et al. 2024, figure 2), so that the block and the logits of one head are
    alive at a time; not in fp16, whose gradients need the loss scale, nor with sharded weights.
    """
    decoder, mtp = model.model, model.mtp
    targets = [further_targets(batch, k) for k in range(1 + mtp.depths)]
    counts = [int((wanted != IGNORE).sum()) for wanted in targets]
    shares = [1.0] + [weight / mtp.depths] * mtp.depths
    factors = [share * count / max(counts[0], 1) for share, count in zip(shares, counts, strict=True)]
    ids = batch["ids"]
    given: dict[str, Any] = {"mask": batch.get("mask"), "positions": batch.get("positions")}
    if frugal and isinstance(mtp, ParallelMTP) and _can_be_frugal(model):
        z, heads = mtp.trunk(decoder, ids, **given)

        def branch(head: Callable[[Tensor], Tensor], wanted: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda z: token_loss(decoder, head(z), wanted)[0]

        branches = [branch(head, wanted) for head, wanted in zip(heads, targets, strict=True)]
        total, values = one_at_a_time(z, branches, factors, _behind_the_trunk(decoder, mtp))
    else:
        pairs = zip(model.states(ids, **given), targets, strict=True)
        values = torch.stack([token_loss(decoder, state, wanted)[0] for state, wanted in pairs])
        total = (values * values.new_tensor(factors)).sum()
    metrics = {name: value.detach() for name, value in zip(loss_names(mtp.depths), values, strict=True)}
    return Loss(total, metrics, weight=counts[0])


def loss_names(depths: int) -> list[str]:
    """The names of the losses, the next token's first."""
    return ["next_token_loss", *(f"token_{k + 1}_loss" for k in range(1, depths + 1))]


def _can_be_frugal(model: MultiToken) -> bool:
    weight = model.model.output_weight
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    return not sharded and computing_in(weight) != torch.float16


def _behind_the_trunk(decoder: Decoder, mtp: nn.Module) -> list[Tensor]:
    """What the branches train: the last block, the norm, the head and the modules, each once."""
    parts = (decoder.model.layers[-1], decoder.model.norm, decoder.head_transform, decoder.lm_head, mtp)
    found = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    return list(found.values())


def one_at_a_time(
    x: Tensor, branches: Sequence[Callable[[Tensor], Tensor]], factors: Sequence[float], parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ_j factors[j] branches[j](x), and the values of the branches, a scalar each, without gradient.

    Each branch runs forward and backward before the next one begins: what one keeps for its backward pass is never
    alive together with that of another. `parameters` are all tensors besides x that the branches differentiate in.
    Differentiable once.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> total, values = one_at_a_time(x, [lambda x: x.sum(), lambda x: (x * x).sum()], [1.0, 0.5], [])
    >>> total.backward()
    >>> float(total), values.tolist(), x.grad.tolist()
    (4.0, [2.0, 4.0], [3.0])
    """
    if not torch.is_grad_enabled():
        values = torch.stack([branch(x) for branch in branches])
        return (values * values.new_tensor(list(factors))).sum(), values
    return _OneAtATime.apply(branches, factors, x, *parameters)  # type: ignore[return-value]


class _OneAtATime(torch.autograd.Function):
    """Forward makes the gradients branch by branch; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, branches: Any, factors: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        sums: list[Tensor | None] = [None] * (1 + len(parameters))
        values = []
        for branch, factor in zip(branches, factors, strict=True):
            with torch.enable_grad():
                own = x.detach().requires_grad_()
                value = branch(own)
                found = torch.autograd.grad(value * factor, (own, *parameters), allow_unused=True)
            values.append(value.detach())
            for i, gradient in enumerate(found):
                if gradient is not None:
                    known = sums[i]
                    sums[i] = gradient if known is None else known + gradient
            del value, found
        ctx.save_for_backward(*sums)
        each = torch.stack(values)
        ctx.mark_non_differentiable(each)
        return (each * each.new_tensor(list(factors))).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return (None, None, *scaled)


class MultiTokenObjective(LanguageObjective):
    """Train decoder and modules together; `weight` is λ, and other arguments are those of `LanguageObjective`.

    Evaluations give the next token's loss as `loss`, which is the same number as without modules, then its accuracy,
    and `token_2_loss`, `token_2_accuracy` onwards, each token given those before it.
    """

    forward_methods = ("states",)

    def __init__(
        self,
        model: MultiToken,
        options: FitOptions,
        *,
        weight: float,
        held_out: Loader | None = None,
        also: Callable[[], Mapping[str, float]] | None = None,
    ):
        super().__init__(model, options, held_out=held_out, also=also)
        self.multi, self.weight = model, weight

    def loss(self, batch: Any) -> Loss:
        """L."""
        return multi_token_loss(self.multi, batch, self.weight)

    def measure(self, held_out: Loader) -> Mapping[str, float]:
        """Held-out loss and accuracy of every token."""
        return held_out_tokens(self.multi, held_out, self.options.precision)


def held_out_tokens(model: MultiToken, loader: Loader, precision: Any = "fp32") -> dict[str, float]:
    """Over the whole loader: `loss`, `perplexity` and `accuracy` of the next token, `token_2_loss` and so on.

    Accuracy is the share of tokens that the model holds most likely, given all tokens before them.
    """

    def measure(batch: Mapping[str, Tensor]) -> dict[str, tuple[Any, float]]:
        states = model.states(batch["ids"], mask=batch.get("mask"), positions=batch.get("positions"))
        found: dict[str, tuple[Any, float]] = {}
        for k, state in enumerate(states):
            wanted, prefix = further_targets(batch, k), f"token_{k + 1}_" if k else ""
            value, count = token_loss(model.model, state, wanted)
            found[f"{prefix}loss"] = value, count
            found[f"{prefix}accuracy"] = _hits(model.model, state, wanted) / max(count, 1), count
        return found

    return with_perplexity(held_out_means(model, loader, measure, precision))


TOKEN_HEADER = ("token", "held-out loss", "accuracy, %", "among the best 5, %", "loss before")


def token_rows(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[object, ...]]:
    """Rows of a report under `TOKEN_HEADER`; none for a model without modules."""
    found, rows = after or before, []
    k = 1
    while f"{_prefix(k)}accuracy" in found:
        label = "next" if k == 1 else f"{k - 1} after the next"
        loss, accuracy = (found[f"{_prefix(k)}{what}"] for what in ("loss", "accuracy"))
        five = f"{_prefix(k)}top5"
        best = 100 * found[five] if five in found else ""
        rows.append((label, loss, 100 * accuracy, best, before.get(f"{_prefix(k)}loss", "")))
        k += 1
    return rows if k > 2 else []


def _prefix(token: int) -> str:
    return f"token_{token}_" if token > 1 else ""


def _hits(decoder: Decoder, hidden: Tensor, targets: Tensor) -> int:
    """How many of the targets are the most likely token."""
    kept = targets.reshape(-1) != IGNORE
    chosen, wanted = hidden.flatten(0, 1)[kept], targets.reshape(-1)[kept]
    rows = chunk_rows(decoder.config.vocabulary)
    pairs = zip(chosen.split(rows), wanted.split(rows), strict=True)
    return sum(int((decoder.logits(h).argmax(-1) == t).sum()) for h, t in pairs)
