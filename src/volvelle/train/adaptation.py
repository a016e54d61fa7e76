"""The recipe `adapt` from end to end: load, apply the method, measure, train, measure again, save."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from volvelle.adapt import Adapted, apply, disabled, load_run, save
from volvelle.adapt.files import base_shapes, stored_numbers
from volvelle.data.text import Corpus
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.language.huggingface import write_folder
from volvelle.train.evaluate import answerable, layout_of, prompted, spread, text_scores, write
from volvelle.train.language import LanguageObjective, held_out_loss
from volvelle.train.loop import fit
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, Sample
from volvelle.train.precision import Precision
from volvelle.train.random_state import seed_all
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.adapt import AdaptLanguage, MethodOptions
from volvelle.train.text_run import (
    NUMBERS,
    choose_device,
    closing,
    export_command,
    finish,
    first_line,
    held_out_loader,
    keep_samples,
    kept_samples,
    read_split,
    step_memory,
    training_loader,
)


def adapt_language(
    recipe: AdaptLanguage,
    run: RunFolder,
    *,
    observer: Observer | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Outcome:
    """Adapt a model to the recipe's data and leave an adapter (or weights), metrics and a report in the run folder.

    Held-out loss, perplexity and BLEU are measured before and after. `resume=True` continues an interrupted run.
    Of many `ranks` all call this, and only rank 0 measures and writes.
    """
    with closing(run):
        return _Adaptation(recipe, run, observer or Observer()).run_all(resume, ranks or Ranks())


class _Adaptation:
    def __init__(self, recipe: AdaptLanguage, run: RunFolder, observer: Observer):
        self.recipe, self.run, self.observer = recipe, run, observer
        # Data first: a bad line should stop the run before a model is loaded.
        self.train, self.held = read_split(recipe, observer)
        self.device, where = choose_device(recipe.device)
        seed_all(recipe.seed)
        self.method = recipe.adaptation
        dtype = stored_as(recipe, self.device)
        self.model: Any = open_base(recipe.model, dtype, self.device)
        adapted = adapt_base(self.model, recipe)
        self.context = context_of(recipe, self.model, self.train)
        tokenizer, layout = self.model.tokenizer, layout_of(self.model.config)
        self.loader = training_loader(self.train, tokenizer, recipe, self.context, layout=layout)
        self.held_loader = held_out_loader(self.held, tokenizer, recipe, self.context, layout=layout)
        prompts = answerable(self.model, prompted(self.held.examples), recipe.max_tokens, recipe.on_bad)
        self.prompts = spread(prompts, recipe.samples)
        total = adapted.total_count
        memory = step_memory(recipe, self.model.config, self.loader, self.device, method=self.method, stored=dtype)
        numbers = NUMBERS[recipe.precision] if dtype == torch.float32 else f"{recipe.precision} base"
        self.subtitle = first_line(where, f"{numbers}, {self.method.label}", adapted.trainable_count, total, memory)
        observer.say(self.subtitle)

    def run_all(self, resume: bool, ranks: Ranks) -> Outcome:
        recipe, run = self.recipe, self.run
        before, samples = self._before(resume) if ranks.leads else ({}, [])
        objective = LanguageObjective(self.model, recipe, held_out=self.held_loader)
        result = fit(
            objective, self.loader, options=recipe, run=run, observer=self.observer, resume=resume, ranks=ranks
        )
        if not ranks.leads:
            return Outcome(run.path, result.step, result.steps, interrupted=result.interrupted)
        self.model.eval()
        after: dict[str, float] = {}
        if not result.interrupted:
            saved = save_adapted(self.model, recipe, self.run)
            self.observer.say(f"saved {self._named(saved)}")
            after, outputs = self._measure("after")
            samples = [replace(s, after=text) for s, text in zip(samples, outputs, strict=True)]
            keep_samples(run, samples)
        commands = (
            f"volvelle generate {run.path} {_quoted(self.prompts[0].example.prompt if self.prompts else 'Once')}",
            f"volvelle eval {run.path} data={recipe.held_out or recipe.data}",
            export_command(run.path),
        )
        return finish(
            run,
            result,
            before=before,
            after=after,
            samples=samples,
            subtitle=self.subtitle,
            next_commands=commands,
        )

    def _named(self, saved: Path) -> str:
        """A folder, and for an adapter what a further task costs: its numbers beside the model's."""
        if self.method.trains_base:
            return str(saved)
        stored, base = stored_numbers(saved), sum(math.prod(shape) for shape in base_shapes(self.model).values())
        return f"{saved} ({stored:,} numbers, {100 * stored / base:.2g} % of the model)"

    def _before(self, resume: bool) -> tuple[dict[str, float], list[Sample]]:
        """Metrics and outputs of the model as it came; a resumed run has them already."""
        known, samples = self.run.manifest.get("before"), kept_samples(self.run)
        if resume and isinstance(known, dict) and samples is not None:
            return known, samples
        # A fresh prefix or prompt changes the answers already; before it is without them.
        with contextlib.nullcontext() if self.method.trains_base else disabled(self.model):
            metrics, outputs = self._measure("before")
        samples = [
            Sample(_shown(p.example), p.references, before=text) for p, text in zip(self.prompts, outputs, strict=True)
        ]
        keep_samples(self.run, samples)
        self.run.update_manifest(before=metrics)
        return metrics, samples

    def _measure(self, when: str) -> tuple[dict[str, float], list[str]]:
        self.model.eval()
        metrics = held_out_loss(self.model, self.held_loader, self.recipe.precision)
        if not self.prompts:
            return metrics, []

        def progress(done: int, total: int) -> None:
            self.observer.work(f"answers {when} training", done, total)

        outputs = write(self.model, self.prompts, max_tokens=self.recipe.max_tokens, progress=progress)
        return metrics | text_scores(outputs, [p.references for p in self.prompts]), outputs


def stored_as(recipe: AdaptLanguage, device: torch.device) -> torch.dtype:
    """A frozen base can be stored in 16 bits; weights that are trained need fp32 to take small steps."""
    small = recipe.precision != "fp32" and not recipe.adaptation.trains_base
    return Precision(recipe.precision, device).dtype if small else torch.float32


def open_base(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model that is to be adapted; VolvelleError where it has no tokenizer."""
    model = load_run(name, dtype=dtype, device=device, merged=True)
    if model.tokenizer is None:
        raise VolvelleError(f"{name}: has no tokenizer, so it cannot read text")
    return model


def adapt_base(model: Any, recipe: AdaptLanguage) -> Adapted:
    """Put the recipe's method on the model, with new values drawn from its seed."""
    generator = torch.Generator(device=model.device).manual_seed(recipe.seed)
    model.gradient_checkpointing = recipe.checkpointing
    return apply(model, recipe.adaptation, generator=generator)


def context_of(recipe: MethodOptions, model: Any, corpus: Corpus) -> int:
    """Tokens of the longest sample."""
    most, asked = model.room, recipe.length  # what comes before the text takes its part of the context
    if asked is not None and asked > most:
        raise UsageError(f"length={asked}: {recipe.model} has a context of {most} tokens")
    if corpus.documents:
        # A window is always full, and attention over thousands of tokens is rarely what is wanted by default.
        return asked or min(most, 512)
    return asked or most


def save_adapted(model: Any, recipe: AdaptLanguage, run: RunFolder) -> Path:
    """Write what was trained to the run's folder: an adapter, or all weights."""
    if not recipe.adaptation.trains_base:
        return save(model, run.path / "adapter", base=recipe.model)
    assert isinstance(model, nn.Module)
    write_folder(model, run.path / "weights")  # type: ignore[arg-type]
    return run.path / "weights"


def _shown(example: Any) -> str:
    """A prompt as the report shows it."""
    if example.messages is None:
        return example.prompt.strip("\n")
    return "\n".join(f"{m['role']}: {m['content']}" for m in example.messages[:-1])


def _quoted(text: str) -> str:
    import shlex

    line = " ".join(text.split())
    return shlex.quote(line if len(line) <= 60 else line[:57] + "…")
