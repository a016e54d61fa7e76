"""The trainings behind the claim prompt-tuning: on the bench of the claim prefix, and on decoders of several sizes."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from volvelle.adapt import apply
from volvelle.adapt.methods import Full, Method
from volvelle.adapt.prefix_methods import PromptTuning
from volvelle.claims.claim import Budget
from volvelle.claims.position_zoo import corpus
from volvelle.claims.prefix_runs import Bench, open_bench
from volvelle.data.loader import Loader
from volvelle.data.packing import Windows, collate_windows
from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
from volvelle.systems.language.decoder import Decoder
from volvelle.train.language import LanguageObjective, held_out_loss
from volvelle.train.loop import fit
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions

N = {"quick": 100, "full": 500}
STEPS = {"quick": 8, "full": 40}
WINDOW, BATCH = 64, 16
"""Bytes of a window, and windows of a step, of the decoders of several sizes."""


@dataclass
class PromptBench(Bench):
    """The bench with prompts of one length, begun at words or at random, and full fine-tuning."""

    length: int = 20

    def _method(self, kind: str) -> Method:
        methods: dict[str, Method] = {
            "full": Full(),
            "prompt": PromptTuning(self.length),
            "random prompt": PromptTuning(self.length, init="random"),
        }
        return methods[kind]

    @property
    def n(self) -> int:
        """Examples that every training sees."""
        return self.counts[0]

    @property
    def base_loss(self) -> float:
        """Held-out loss a token before any training."""
        return self._loss(self.model, self.task.seen)

    @property
    def share(self) -> float:
        """Numbers of a prompt over the model's, counted on an adapted copy."""
        model = copy.deepcopy(self.model)
        total = sum(p.numel() for p in model.parameters())
        return apply(model, self._method("prompt")).trainable_count / total

    def shots(self, count: int) -> str:
        """The last examples of the training data, as a text before the prompt."""
        return "".join(f"{one.prompt}{one.completions[0]}\n" for one in self.task.train[-count:])

    def loss(self, kind: str, rate: float, *, seed: int = 0) -> float:
        """Held-out loss a token after a training."""
        return self._losses(kind, rate, seed)[1]

    def best_rate(self, kind: str, rates: tuple[float, ...]) -> tuple[float, float]:
        """The learning rate that is best on examples set aside, and its held-out loss."""
        found = {rate: self._losses(kind, rate, 0) for rate in rates}
        best = min(rates, key=lambda rate: found[rate][0])
        return best, found[best][1]

    def _losses(self, kind: str, rate: float, seed: int) -> tuple[float, float]:
        """On examples set aside of the training data, and on held-out ones."""
        bench = dataclasses.replace(self, seed=seed)
        model = bench._trained(kind, self.task.train[: self.n], rate)
        aside = self.task.train[self.n : self.n + self.held]
        return self._loss(model, aside), self._loss(model, self.task.seen)


def prompt_bench(budget: Budget, length: int) -> PromptBench:
    """Load the model and the task; raises VolvelleError when one of them cannot be had."""
    bench = open_bench(budget)
    values = {each.name: getattr(bench, each.name) for each in dataclasses.fields(Bench)}
    return PromptBench(**values | {"counts": (N[budget],), "steps": STEPS[budget]}, length=length)


def gain_of_size(width: int, length: int, *, steps: int = 300, tuning: int = 150) -> float:
    """What share of full fine-tuning's fall of the loss a prompt has, on a decoder of that width.

    It learns Python's language reference, byte by byte, and is then turned to the source of Python's modules.
    """
    torch.manual_seed(0)
    config = LanguageConfig(
        "llama",
        vocabulary=256,
        width=width,
        depth=2,
        heads=width // 16,
        context=WINDOW + length,
        norm=RMSNorm(),
        mlp=GatedMLP(5 * width // 2),
        position=Rope(),
    )
    base = _fitted(Decoder(config), corpus()[0], steps, 1e-2 * (32 / width) ** 0.5)
    train, held = _sources()
    before = _read(base, held)
    prompt, full = copy.deepcopy(base), copy.deepcopy(base)
    apply(prompt, PromptTuning(length), generator=torch.Generator().manual_seed(0))
    gains = [
        before - _read(_fitted(model, train, tuning, rate), held) for model, rate in ((prompt, 3e-2), (full, 2e-3))
    ]
    return gains[0] / gains[1]


def _fitted(model: Any, text: torch.Tensor, steps: int, rate: float) -> Any:
    options = FitOptions(steps=steps, batch=BATCH, learning_rate=rate, checkpoint_every=None)
    loader = Loader(Windows(text, WINDOW), BATCH, seed=0, collate=collate_windows)
    fit(LanguageObjective(model, options), loader, options=options, observer=Quiet())
    return model


def _read(model: Any, text: torch.Tensor) -> float:
    windows = Windows(text, WINDOW)
    part = [windows[i] for i in range(min(len(windows) - 1, 256))]
    return held_out_loss(model, Loader(part, BATCH, seed=0, collate=collate_windows, shuffle=False))["loss"]


def _sources() -> tuple[torch.Tensor, torch.Tensor]:
    """The source of some modules of Python's library to learn from, and of another to be read."""
    import argparse
    import inspect
    import logging
    import tarfile
    import textwrap

    texts = ["".join(map(inspect.getsource, part)) for part in ((argparse, logging, textwrap), (tarfile,))]
    train, held = (torch.tensor(list(text.encode()), dtype=torch.int32) for text in texts)
    return train, held
