"""One small language model per position encoding, trained short and tested long."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import TYPE_CHECKING

from volvelle.claims.claim import Budget, Claim, Finding, Measurement, Paper, at_least, at_most

if TYPE_CHECKING:
    from torch import Tensor

    from volvelle.systems.language.config import LanguageConfig
    from volvelle.systems.language.decoder import Decoder

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
    measured_by="the perplexity of a small byte-level decoder per encoding, and of one with linear attention, on "
    "held-out text in windows of the trained length L, of 2 L and of 4 L; the text is Python's own language "
    "reference, which every installation carries",
    summary="Which encodings keep working on texts longer than any they were trained on, and which do not.",
    summary_zh="哪些位置编码在比训练更长的文本上仍然有效，哪些则不然。",
    seconds={"quick": 60, "full": 900},
    parts=(
        "nn.ALiBi",
        "nn.T5Bias",
        "nn.ShawBias",
        "nn.TransformerXLBias",
        "nn.DisentangledBias",
        "nn.DynamicBias",
        "nn.RotaryEmbedding",
        "nn.SinusoidalPositions",
        "nn.LearnedPositions",
        "nn.HierarchicalPositions",
        "nn.RecurrentPositions",
        "nn.MultiplicativePositions",
        "nn.ComplexPositions",
        "nn.ConvPositions",
        "nn.LinearAttention",
    ),
    recipe="volvelle train language data=book.txt position=alibi",
)

LENGTH = 64
QUICK = ("sinusoidal", "rope", "alibi")
LINEAR = ", linear attention"
"""Behind the name of an encoding."""
STEPS = 400
"""Of the full budget."""
STRETCHED = ("rope-linear", "rope-ntk", "rope-dynamic", "rope-yarn", "rope-longrope", "rope-llama3")
"""Scalings that a model trained with plain RoPE is read with: what they are for."""
BOUNDED = ("learned", "multiplicative")
"""Encodings with one vector a position, which longer texts do not have."""

Found = dict[str, list[dict[int, float]]]
"""Of each encoding, for each seed: the perplexity by multiples of the trained length."""


def measure(budget: Budget) -> Measurement:
    """Train 3 encodings with one seed (full: all, with three seeds) and read longer windows."""
    import torch

    from volvelle.train.recipes.choices import POSITIONS

    everything = (*(name for name in POSITIONS if name not in STRETCHED), f"rope{LINEAR}")
    names, seeds, steps = (QUICK, 1, 400) if budget == "quick" else (everything, 3, STEPS)
    texts = corpus()
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    found: Found = {}
    try:
        for name in names:
            for seed in range(seeds):
                for reading, values in run(name, texts, seed, steps, stretched=budget == "full").items():
                    found.setdefault(reading, []).append(values)
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
    notes = [f"{name} has no vectors beyond L" for name in names if name in BOUNDED]
    if budget == "full":
        notes.append(f"{', '.join(STRETCHED)}: the models trained with rope, read with factor 4")
    return Measurement(findings, setting=setting, notes=notes, pictures={"perplexity": _chart(found)})


def corpus() -> tuple[Tensor, Tensor]:
    """Python's language reference as bytes: nine tenths to learn from, by topic, and a tenth to be read."""
    from pydoc_data.topics import topics

    import torch

    texts = [topics[name] for name in sorted(topics)]
    parts = ["\n".join(t for i, t in enumerate(texts) if (i % 10 == 9) == held) for held in (False, True)]
    train, held = (torch.tensor(list(part.encode()), dtype=torch.int32) for part in parts)
    return train, held


def run(
    name: str, texts: tuple[Tensor, Tensor], seed: int, steps: int, *, stretched: bool = False
) -> dict[str, dict[int, float]]:
    """Train one model on the first of `texts`; the perplexity of the second in windows of 1, 2 and 4 times the length.

    By the name of the encoding it is read with: `stretched` reads a model of "rope" with all scalings besides.
    """
    import torch

    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.systems.language.decoder import Decoder
    from volvelle.systems.language.positions import build_position
    from volvelle.train.language import LanguageObjective
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from volvelle.train.options import FitOptions
    from volvelle.train.recipes.choices import POSITIONS

    torch.manual_seed(seed)
    config = _config(name)
    model = Decoder(config)
    options = FitOptions(steps=steps, batch=16, learning_rate=1e-2, seed=seed, checkpoint_every=None)
    loader = Loader(Windows(texts[0], LENGTH), options.batch, seed=seed, collate=collate_windows)
    fit(LanguageObjective(model, options), loader, options=options, observer=Quiet())
    found = {name: _read(model, texts[1], (1,) if name in BOUNDED else (1, 2, 4))}
    for other in STRETCHED if stretched and name == "rope" else ():
        model.model.position = build_position(dataclasses.replace(config, position=POSITIONS[other]))
        found[other] = _read(model, texts[1], (1, 2, 4))
    return found


def _config(name: str) -> LanguageConfig:
    from volvelle.systems.language import config as c
    from volvelle.train.recipes.choices import ATTENTIONS, POSITIONS, embedding_scale

    position = POSITIONS[name.removesuffix(LINEAR)]  # type: ignore[index]
    return c.LanguageConfig(
        "volvelle",
        vocabulary=256,
        width=64,
        depth=2,
        heads=4,
        context=LENGTH,
        norm=c.RMSNorm(),
        mlp=c.GatedMLP(160),
        position=position,
        attention=ATTENTIONS["linear" if name.endswith(LINEAR) else "softmax"],
        embedding_scale=embedding_scale(position, 64),
    )


def _read(model: Decoder, text: Tensor, lengths: tuple[int, ...]) -> dict[int, float]:
    """The perplexity in windows of these multiples of the trained length."""
    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.train.language import held_out_loss

    found = {}
    for times in lengths:
        windows = Windows(text, LENGTH * times)
        # Whole windows only: the last one ends with the text and is shorter in new targets.
        part = [windows[i] for i in range(min(len(windows) - 1, 512 // times))]
        reader = Loader(part, 16, seed=0, collate=collate_windows, shuffle=False)
        found[times] = math.exp(held_out_loss(model, reader)["loss"])
    return found


def _chart(found: Found) -> str:
    from volvelle.train.charts import Series, line_chart, standalone

    lines = []
    for name, runs in found.items():
        lengths = sorted(set().union(*runs))
        points = [(float(LENGTH * n), statistics.mean(one[n] for one in runs)) for n in lengths]
        lines.append(Series(name, points, dots=True))
    return standalone(line_chart(lines, x_label="window, tokens", y_label="held-out perplexity", log_y=True, width=760))
