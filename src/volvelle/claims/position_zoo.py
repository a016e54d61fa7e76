"""One small language model per position encoding, trained short and tested long."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.systems.language.config import Position

CLAIM = Claim(
    title="Train short, test long: position encodings beyond the trained length",
    family="attention",
    paper=Paper(
        "Press et al.",
        2022,
        "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
        "section 3, figure 4",
        "https://arxiv.org/abs/2108.12409",
    ),
    sentence="Attention with Linear Biases (ALiBi) … enables input length extrapolation",
    measured_by="the perplexity of a small byte-level decoder per encoding, on held-out text in windows of the trained "
    "length L, of 2 L and of 4 L; the text is Python's own language reference, which every installation carries",
    summary="Which encodings keep working on texts longer than any they were trained on, and which do not.",
    summary_zh="哪些位置编码在比训练更长的文本上仍然有效,哪些则不然。",
    seconds={"quick": 60, "full": 900},
    parts=("nn.ALiBi", "nn.T5Bias", "nn.ShawBias", "nn.TransformerXLBias", "nn.RotaryEmbedding"),
    recipe="volvelle train language data=book.txt position=alibi",
)

LENGTH = 64
QUICK = ("sinusoidal", "rope", "alibi")
BOUNDED = ("learned", "multiplicative")
"""Encodings with one vector a position, which longer texts do not have."""


def measure(budget: Budget) -> Measurement:
    """Train 3 encodings with one seed (full: all, with three seeds) and read longer windows."""
    import torch

    from volvelle.train.scratch import POSITIONS

    names, seeds, steps = (QUICK, 1, 400) if budget == "quick" else (tuple(POSITIONS), 3, 400)
    train, held = corpus()
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    try:
        found = {name: [run(POSITIONS[name], train, held, seed, steps) for seed in range(seeds)] for name in names}
    finally:
        torch.set_num_threads(before)
    findings = []
    for name, runs in found.items():
        for times in (1, 2, 4):
            values = [one[times] for one in runs if times in one]
            if values:
                spread = (min(values), max(values))
                findings.append(Finding(f"{name}: perplexity at {times} L", statistics.mean(values), spread=spread))
    grown = {name: [one[4] / one[1] for one in runs if 4 in one] for name, runs in found.items()}
    findings += [
        at_most("alibi: perplexity at 4 L over that at L, worst seed", max(grown["alibi"]), 1.05),
        at_least(
            "sinusoidal, which the paper finds to break: its growth over alibi's, means",
            statistics.mean(grown["sinusoidal"]) / statistics.mean(grown["alibi"]),
            1.02,
        ),
    ]
    setting = {"L": LENGTH, "width": 64, "blocks": 2, "steps": steps, "seeds": seeds, "tokens": "bytes"}
    notes = tuple(f"{name} has no vectors beyond L" for name in names if name in BOUNDED)
    return Measurement(findings, setting=setting, notes=notes, pictures={"perplexity": _chart(found)})


def corpus() -> tuple[Tensor, Tensor]:
    """Python's language reference as bytes: nine tenths to learn from, by topic, and a tenth to be read."""
    from pydoc_data.topics import topics

    import torch

    texts = [topics[name] for name in sorted(topics)]
    parts = ["\n".join(t for i, t in enumerate(texts) if (i % 10 == 9) == held) for held in (False, True)]
    train, held = (torch.tensor(list(part.encode()), dtype=torch.int32) for part in parts)
    return train, held


def run(position: Position, train: Tensor, held: Tensor, seed: int, steps: int) -> dict[int, float]:
    """Train one model; the held-out perplexity in windows of 1, 2 and 4 times the trained length."""
    import torch

    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.systems.language import config as c
    from volvelle.systems.language.decoder import Decoder
    from volvelle.train.language import LanguageObjective, held_out_loss
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from volvelle.train.options import FitOptions
    from volvelle.train.scratch import embedding_scale

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocabulary": 256, "width": 64, "depth": 2, "heads": 4, "context": LENGTH}
    model = Decoder(
        c.LanguageConfig(
            "volvelle",
            **sizes,
            norm=c.RMSNorm(),
            mlp=c.GatedMLP(160),
            position=position,
            embedding_scale=embedding_scale(position, sizes["width"]),
        )
    )
    options = FitOptions(steps=steps, batch=16, learning_rate=1e-2, seed=seed, checkpoint_every=None)
    loader = Loader(Windows(train, LENGTH), options.batch, seed=seed, collate=collate_windows)
    fit(LanguageObjective(model, options), loader, options=options, observer=Quiet())
    found = {}
    for times in (1, 2, 4):
        if times > 1 and isinstance(position, c.Learned | c.Multiplicative):
            continue
        windows = Windows(held, LENGTH * times)
        # Whole windows only: the last one ends with the text and is shorter in new targets.
        part = [windows[i] for i in range(min(len(windows) - 1, 512 // times))]
        reader = Loader(part, 16, seed=0, collate=collate_windows, shuffle=False)
        found[times] = math.exp(held_out_loss(model, reader)["loss"])
    return found


def _chart(found: dict[str, list[dict[int, float]]]) -> str:
    from volvelle.train.charts import Series, line_chart

    lines = []
    for name, runs in found.items():
        lengths = sorted(set().union(*runs))
        points = [(float(LENGTH * n), statistics.mean(one[n] for one in runs)) for n in lengths]
        lines.append(Series(name, points, dots=True))
    return line_chart(lines, x_label="window, tokens", y_label="held-out perplexity", log_y=True)
