"""rsLoRA: divided by the square root of the rank, adapters of every rank get gradients of one size, and learn.

With A uniform in +-1/√k and B = 0 the first gradient of B is γ δ (A x)ᵀ, whose norm grows as γ √r; after steps of
gradient descent the update γ B A x has the size γ² r. So γ = α/√r keeps both at every rank r, and with γ = α/r they
fall as r^-1/2 and r^-1.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor, nn

    from volvelle.adapt.methods import LoRA

CLAIM = Claim(
    title="Rank-stabilised LoRA (rsLoRA)",
    family="adapt",
    paper=Paper(
        "Kalajdzievski",
        2023,
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
        "abstract, definition 3.1, theorem 3.2 and section 4",
        "https://arxiv.org/abs/2312.03732",
    ),
    sentence="dividing adapters by the rank results in slowed learning and stunted performance with higher-rank "
    "adapters; divided by the square root of the rank, larger ranks give better fine-tuning performance",
    measured_by="a network for Fashion-MNIST that adapts to pictures turned upside down, ranks 4 to 512 with both "
    "scales, several seeds: how the first gradient, and update and gradient after steps of gradient descent, grow "
    "with the rank (exponents); loss and gradient norms after equal steps of AdamW; in full also the first gradient "
    "on SmolLM2",
    summary="LoRA with α/√r for its scale: the same learning rate serves every rank, and a higher rank learns more.",
    summary_zh="缩放因子取 α/√r 的 LoRA：各种秩都能用同一学习率，秩越高学得越多。",
    seconds={"quick": 60, "full": 600},
    parts=("functional.lora_linear", "nn.LoRALinear"),
    recipe="volvelle adapt smollm2 data=examples.jsonl method=lora lora.rank=64 lora.rslora=true",
)

ALPHA = 16.0
RATE = 1e-4
"""AdamW's rate behind the bounds, the same for all ranks and both scales."""
OTHERS = (3e-4, 1e-3)
"""Further rates, only reported."""
DESCENT, STEPS = 1e-3, 20
"""Rate and steps of plain gradient descent: ten times this rate, and rank 4, whose scale is the largest, runs away."""
QUICK, FULL = ((4, 32, 256), 1, 60), ((4, 16, 64, 256, 512), 3, 150)
"""Ranks, seeds and steps of AdamW."""
DRAWS = 8
"""Beginnings of A behind each size."""
WIDTH = 1024
NAMES = {False: "LoRA, α/r", True: "rsLoRA, α/√r"}
Pictures = tuple[tuple["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]


class Run(NamedTuple):
    """A training: held-out loss at its end, and the mean norm of the adapters' gradient over its steps."""

    loss: float
    gradient: float


def measure(budget: Budget) -> Measurement:
    """Ranks 4, 32, 256 and one seed (full: 4 to 512, three seeds, two more rates, SmolLM2)."""
    from volvelle.claims.garments import garments, two_threads
    from volvelle.errors import VolvelleError

    quick = budget == "quick"
    ranks, seeds, steps = QUICK if quick else FULL
    try:
        pictures = garments(6000 if quick else 20000, 2000)
    except VolvelleError as error:
        return Measurement(unmeasurable=f"Fashion-MNIST cannot be had: {error}")
    notes = []
    with two_threads():
        bases = [base(pictures[0], seed, steps=2 * steps) for seed in range(seeds)]
        turned: Pictures = tuple((x.flip(2), y) for x, y in pictures)  # type: ignore[assignment]
        findings = [
            *_exponents(bases, turned, ranks),
            *_trainings(bases, turned, ranks, steps, () if quick else OTHERS),
        ]
        if not quick:
            found = _language(ranks)
            findings += found if isinstance(found, list) else []
            notes += [found] if isinstance(found, str) else []
    setting = {
        "network": f"784 - {WIDTH} - {WIDTH} - 10, ReLU, trained upright; adapters on the first two layers",
        "alpha": ALPHA,
        "ranks": list(ranks),
        "seeds": seeds,
        "beginnings of A": DRAWS,
        "steps": f"{steps} of 64 pictures, {STEPS} of plain descent at rate {DESCENT:g}",
        "AdamW": f"rate {RATE:g}, falling to a fiftieth",
        "dtype": "fp32",
    }
    notes += [
        "The paper's theorem is one of large ranks and says nothing of how many steps; here they are few and small, so "
        "that products of trained A and B hardly count.",
        "The exponents follow from gradients as they are. AdamW divides by their size, so there α/r does not collapse: "
        "its update keeps its size at every rank, and with α/√r it grows as √r. Part of what a higher rank gains under "
        "AdamW is therefore a larger step; the other rates show how much a larger rate gives LoRA.",
        "The paper trains Llama 2 on 20,000 examples; a small network on pictures stands in for it.",
    ]
    return Measurement(findings, peers=_peers(), setting=setting, notes=notes)


def _peers() -> dict[str, str]:
    import torch

    return {"torch.optim.AdamW": torch.__version__}


def base(pictures: tuple[Tensor, Tensor], seed: int, *, steps: int) -> nn.Module:
    """A network that knows the pictures as they are."""
    import torch
    from torch import nn

    from volvelle.claims.garments import train

    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )
    train(model, lambda rows: _loss(model, pictures, rows), len(pictures[0]), steps, seed=seed, rate=1e-3)
    return model


def _loss(model: nn.Module, pictures: tuple[Tensor, Tensor], rows: Any = slice(None)) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(pictures[0][rows]), pictures[1][rows])


def method(rank: int, *, root: bool) -> LoRA:
    """The two ways to scale: alpha / √rank, or alpha / rank."""
    from volvelle.adapt.methods import LoRA

    return LoRA(rank=rank, alpha=ALPHA, rslora=root, targets=("1", "3"))


def adapted(model: nn.Module, rank: int, seed: int, *, root: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy of the model with fresh adapters, and these."""
    import torch

    from volvelle.adapt import apply

    model = copy.deepcopy(model)
    found = apply(model, method(rank, root=root), generator=torch.Generator().manual_seed(seed))
    return model, list(found.trainable.values())


def norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of the gradients of all of them."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def exponent(sizes: Mapping[int, float]) -> float:
    """The slope of log size over log rank.

    >>> round(exponent({4: 1.0, 16: 0.5, 64: 0.25}), 9)
    -0.5
    """
    x, y = [math.log(rank) for rank in sizes], [math.log(size) for size in sizes.values()]
    return statistics.linear_regression(x, y).slope


def _exponents(bases: Sequence[nn.Module], pictures: Pictures, ranks: Sequence[int]) -> list[Finding]:
    """The first gradient, and what gradient descent makes of it, by the rank."""
    words = (
        ("norm of the first gradient", 0.05, -0.5),
        (f"size of the update γ B A x after {STEPS} steps of gradient descent", 0.15, -1.0),
        ("norm of the gradient after these steps", 0.15, -0.5),
    )
    findings = []
    for root, name in NAMES.items():
        of = [{rank: _descents(model, pictures, rank, seed, root=root) for rank in ranks}
              for seed, model in enumerate(bases)]  # fmt: skip
        for place, (what, within, expected) in enumerate(words):
            slopes = [exponent({rank: sizes[place] for rank, sizes in one.items()}) for one in of]
            findings.append(_near(f"{name}: {what}, exponent of the rank", slopes, 0.0 if root else expected, within))
    return findings


def _near(what: str, values: Sequence[float], expected: float, within: float) -> Finding:
    """A finding that holds when the mean lies that near what the mathematics says."""
    mean = statistics.mean(values)
    held = abs(mean - expected) <= within
    return Finding(what, mean, spread=(min(values), max(values)), bound=f"{expected:g} +- {within:g}", held=held)


def _descents(model: nn.Module, pictures: Pictures, rank: int, seed: int, *, root: bool) -> list[float]:
    """Geometric means over `DRAWS` beginnings: A x of a few rows is as long as its draw happens to be."""
    drawn = [descend(model, pictures, rank, DRAWS * seed + draw, root=root) for draw in range(DRAWS)]
    return [statistics.geometric_mean(sizes) for sizes in zip(*drawn, strict=True)]


def descend(model: nn.Module, pictures: Pictures, rank: int, seed: int, *, root: bool) -> tuple[float, float, float]:
    """The first gradient's norm; after plain steps the size of the second layer's update, and the norm again."""
    import torch

    model, parameters = adapted(model, rank, seed, root=root)
    optimizer = torch.optim.SGD(parameters, lr=DESCENT)
    rows = torch.randint(len(pictures[0][0]), (64,), generator=torch.Generator().manual_seed(seed))
    norms, seen = [], []
    hook = model.get_submodule("3").register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        _loss(model, pictures[0], rows).backward()
        norms.append(norm(parameters))
        if len(norms) <= STEPS:
            optimizer.step()
    hook.remove()
    a, b = parameters[2:]
    with torch.no_grad():
        update = method(rank, root=root).scale_of("3") * seen[-1] @ a.T @ b.T
        return norms[0], float(update.norm()), norms[-1]


def _trainings(
    bases: Sequence[nn.Module], pictures: Pictures, ranks: Sequence[int], steps: int, others: Sequence[float]
) -> list[Finding]:
    """Loss and gradients over equal steps of AdamW, at one rate for all; the other rates are shown."""
    runs = {
        (root, rank, rate): [
            trained(model, pictures, rank, seed, steps, rate, root=root) for seed, model in enumerate(bases)
        ]
        for rate in (RATE, *others)
        for root in NAMES
        for rank in (ranks if rate == RATE else (min(ranks), max(ranks)))
    }
    low, high = min(ranks), max(ranks)
    findings = []
    for root, name in NAMES.items():
        for rank in ranks:
            losses = [run.loss for run in runs[root, rank, RATE]]
            findings.append(_shown(f"{name}, rank {rank}: held-out loss", losses, "nats"))
    mean = {key: statistics.mean(run.loss for run in found) for key, found in runs.items()}
    gradients = {root: [statistics.mean(r.gradient for r in runs[root, k, RATE]) for k in ranks] for root in NAMES}
    findings += [
        at_most(f"rsLoRA: loss at rank {high} over rank {low}", mean[True, high, RATE] / mean[True, low, RATE], 1, "x"),
        at_most(f"rank {high}: loss of rsLoRA over LoRA", mean[True, high, RATE] / mean[False, high, RATE], 1, "x"),
        at_least(
            f"fall of the loss from rank {low} to {high}: rsLoRA's minus LoRA's",
            (mean[True, low, RATE] - mean[True, high, RATE]) - (mean[False, low, RATE] - mean[False, high, RATE]),
            0.0,
            "nats",
        ),
        at_most("LoRA: smallest over largest mean gradient norm of all ranks", _least_over_most(gradients[False]), 0.5),
        at_least("rsLoRA: the same, one order of magnitude", _least_over_most(gradients[True]), 0.1),
    ]
    for rate in others:
        for root, name in NAMES.items():
            for rank in (low, high):
                losses = [run.loss for run in runs[root, rank, rate]]
                findings.append(_shown(f"{name}, rank {rank}, rate {rate:g}: held-out loss", losses, "nats"))
    return findings


def _least_over_most(values: Sequence[float]) -> float:
    return min(values) / max(values)


def _shown(what: str, values: Sequence[float], unit: str) -> Finding:
    return Finding(what, statistics.mean(values), unit, spread=(min(values), max(values)))


def trained(model: nn.Module, pictures: Pictures, rank: int, seed: int, steps: int, rate: float, *, root: bool) -> Run:
    """Adapters after AdamW's steps, on pictures that it has not seen."""
    import torch

    from volvelle.claims.garments import train

    model, parameters = adapted(model, rank, seed, root=root)
    squares: list[float] = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: squares.append(float(p.grad.square().sum())))  # type: ignore[union-attr]
    train(model, lambda rows: _loss(model, pictures[0], rows), len(pictures[0][0]), steps, seed=seed, rate=rate)
    each = len(parameters)
    norms = [math.sqrt(sum(squares[i : i + each])) for i in range(0, len(squares), each)]
    with torch.no_grad():
        return Run(float(_loss(model, pictures[1])), statistics.mean(norms))


def _language(ranks: Sequence[int]) -> list[Finding] | str:
    """The first gradient on SmolLM2 and its own text; or why it was left out."""
    import torch

    from volvelle.adapt import apply, remove
    from volvelle.adapt.methods import LoRA
    from volvelle.claims.position_zoo import corpus
    from volvelle.errors import VolvelleError
    from volvelle.systems.language.load import load_language_model

    try:
        model: Any = load_language_model("smollm2", dtype=torch.float32).eval()
    except VolvelleError as error:
        return f"the first gradient on SmolLM2 was left out: {error}"
    text = bytes(corpus()[1][:1200].tolist()).decode(errors="replace")
    ids = torch.tensor([model.tokenizer.encode(text)[:129]])
    findings = []
    for root, name in NAMES.items():
        sizes = {}
        for rank in ranks:
            found = apply(
                model,
                LoRA(rank=rank, alpha=ALPHA, rslora=root, targets="all-linear"),
                generator=torch.Generator().manual_seed(rank),
            )
            logits = model(ids[:, :-1]).logits[0]
            torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
            sizes[rank] = norm(found.trainable.values())
            remove(model)
        findings.append(_near(f"SmolLM2, {name}: norm of the first gradient, exponent of the rank",
                              [exponent(sizes)], 0.0 if root else -0.5, 0.05))  # fmt: skip
    return findings
