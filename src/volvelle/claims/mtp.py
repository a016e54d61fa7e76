"""Small language models that learn one token at a position, and others that learn several, in equally many steps."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most
from volvelle.claims.position_zoo import corpus

if TYPE_CHECKING:
    from torch import Tensor

CLAIM = Claim(
    title="Multi-token prediction: what learning further tokens does to the next one",
    family="language",
    paper=Paper(
        "Gloeckle et al.",
        2024,
        "Better & Faster Large Language Models via Multi-token Prediction",
        "abstract",
        "https://arxiv.org/abs/2404.19737",
    ),
    sentence="training language models to predict multiple future tokens at once results in higher sample efficiency; "
    "as an additional benefit, models trained with 4-token prediction are up to 3 times faster at inference",
    measured_by="next-token loss on held-out text after equally many steps on the same batches from the same initial "
    "weights: without further tokens, with DeepSeek-V3's sequential modules (which “may improve data efficiency”, its "
    "section 2.2) and with parallel heads; small byte-level decoders on Python's own language reference; then answers "
    "of the models with drafts by their own modules and without, in turn, and the bound that the cost of a step sets",
    summary="A decoder learns the tokens after the next one too, by modules that plain decoding leaves out and that "
    "can draft for it.",
    summary_zh="解码器同时学习预测后续多个词元；附加模块在普通解码时可省去，也可用于起草。",
    seconds={"quick": 60, "full": 900},
    recipe="volvelle train language data=book.txt mtp=2 mtp_kind=sequential",
)

LENGTH, BATCH, SEEDS, INIT_STD = 64, 8, 3, 0.1
ANSWERS, PROMPT = 6, 16
SIZES: dict[Budget, dict[str, Any]] = {
    "quick": {"tokens": 2, "steps": 240, "width": 48, "depth": 2, "mlp": 128},
    "full": {"tokens": 4, "steps": 1800, "width": 64, "depth": 3, "mlp": 160},
}


def measure(budget: Budget) -> Measurement:
    """Train without and with modules of both kinds, three seeds each; compare the next token's loss seed by seed."""
    import torch

    size = SIZES[budget]
    train, held = corpus()
    first: dict[str | None, Any] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small are slower with two
    try:
        kinds = (None, "sequential", "parallel")
        found = {kind: [run(kind, train, held, seed, size, first) for seed in range(SEEDS)] for kind in kinds}
        drafted = [one for kind in kinds[1:] for one in decoding(kind, first[kind], held)]
    finally:
        torch.set_num_threads(before)
    findings = []
    for kind, runs in found.items():
        findings.append(
            _reported(f"{kind or 'one token'}: held-out loss of the next token", runs, "loss", "nats a byte")
        )
    for kind in ("sequential", "parallel"):
        pairs = zip(found[kind], found[None], strict=True)
        changes = [mine["loss"] - plain["loss"] for mine, plain in pairs]
        what = f"{kind}: what the further tokens add to the next one's loss, mean of {SEEDS} pairs"
        findings.append(at_most(what, statistics.mean(changes), 0.0, "nats", spread=(min(changes), max(changes))))
    for kind in ("sequential", "parallel"):
        for token in range(1, size["tokens"] + 1):
            name = "accuracy" if token == 1 else f"token_{token}_accuracy"
            findings.append(_reported(f"{kind}: accuracy of token {token}", found[kind], name, ""))
    second = {
        kind: statistics.mean(one["token_2_accuracy"] for one in found[kind]) for kind in ("sequential", "parallel")
    }
    common = float((held == held.mode().values).float().mean())
    findings += [
        at_least(
            "accuracy of the second token over that of the most common byte, parallel", second["parallel"] / common, 1
        ),
        at_least(
            "accuracy of the second token, sequential over parallel (which is not told the first)",
            second["sequential"] / second["parallel"],
            1,
        ),
    ]
    findings += drafted
    setting = {**size, "L": LENGTH, "seeds": SEEDS, "batch": BATCH, "weight": "0.3 sequential, 1 a head parallel"}
    notes = (
        "the paper finds its gains to grow with the model: “the method is increasingly useful for larger model sizes”; "
        "a model of this size says nothing about large ones",
        "accuracies are those of the text's tokens, each given the text before it",
        "a module is a third to a half of a model this small, a hundredth of a large one: here drafts cost far more",
    )
    return Measurement(findings, setting=setting, notes=notes)


def run(
    kind: str | None,
    train: Tensor,
    held: Tensor,
    seed: int,
    size: dict[str, Any],
    first: dict[str | None, Any] | None = None,
) -> dict[str, float]:
    """Train one model, with modules of that kind or without any; its held-out figures.

    The first pair of model and modules of a kind is kept in `first`.
    """
    import torch

    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.systems.language import config as c
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.mtp import KINDS, MultiToken
    from volvelle.train.language import LanguageObjective, held_out_loss
    from volvelle.train.loop import fit
    from volvelle.train.mtp import MultiTokenObjective, held_out_tokens, usual_weight
    from volvelle.train.observer import Quiet
    from volvelle.train.options import FitOptions

    torch.manual_seed(seed)
    model = Decoder(
        c.LanguageConfig(
            "llama",
            vocabulary=256,
            width=size["width"],
            depth=size["depth"],
            heads=4,
            context=LENGTH,
            norm=c.RMSNorm(),
            mlp=c.GatedMLP(size["mlp"]),
            position=c.Rope(),
            init_std=INIT_STD,  # with the usual 0.02 a model this small learns nothing in so few steps
        )
    )
    options = FitOptions(steps=size["steps"], batch=BATCH, learning_rate=5e-3, seed=seed, checkpoint_every=None)
    loader = Loader(Windows(train, LENGTH), options.batch, seed=seed, collate=collate_windows)
    windows = Windows(held, LENGTH)
    part = [windows[i] for i in range(min(len(windows) - 1, 256))]
    reader = Loader(part, 32, seed=0, collate=collate_windows, shuffle=False)
    if kind is None:
        fit(LanguageObjective(model, options), loader, options=options, observer=Quiet())
        return held_out_loss(model, reader)
    further = size["tokens"] - 1
    both = MultiToken(model, KINDS[kind](model.config, further))
    objective = MultiTokenObjective(both, options, weight=usual_weight(kind, further))
    fit(objective, loader, options=options, observer=Quiet())
    if first is not None:
        first.setdefault(kind, both)
    return held_out_tokens(both, reader)


def decoding(kind: str, both: Any, held: Tensor) -> list[Finding]:
    """Answers to beginnings of held-out text, with drafts by the modules and without."""
    import copy

    from volvelle.claims.decode_runs import compare, decoding_findings, same_answers, step_costs
    from volvelle.decode.drafters.mtp import MTP

    model, k = both.model.eval(), both.mtp.depths
    stride = len(held) // (ANSWERS + 1)
    prompts = [held[i * stride : i * stride + PROMPT].tolist() for i in range(1, ANSWERS + 1)]
    tokens = LENGTH - PROMPT - k
    costs = step_costs(model, [1 + k], length=PROMPT)
    found = compare(model, MTP(both.mtp.eval(), k=k), prompts, max_tokens=tokens, rounds=3)
    wide = copy.deepcopy(both).double()  # where widths make no difference
    exact = compare(wide.model, MTP(wide.mtp, k=k), prompts, max_tokens=tokens, rounds=1)
    return [
        *decoding_findings(kind, found, costs[1 + k], k),
        same_answers(kind, exact, "fp64"),
        at_least(f"{kind}: speed-up of decoding", found.speed_up, 1.0, "x"),
    ]


def _reported(what: str, runs: list[dict[str, float]], name: str, unit: str) -> Finding:
    values = [one[name] for one in runs]
    return Finding(what, statistics.mean(values), unit, spread=(min(values), max(values)))
