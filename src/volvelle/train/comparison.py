"""`method=compare`: several methods on the same data under one budget, each with the best of the same learning rates.

One run folder holds the comparison. Below it, in trials/, every training is a run folder of its own, which generate,
eval and export take too. The learning rate is chosen on a part of the training side, at equal steps: every training
pauses at a quarter of them, and of each method the best one goes on to the end, is kept, and is measured on the
held-out data. What is finished is never done again: a comparison that was interrupted goes on with the training that
was, bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from volvelle.adapt import load_run
from volvelle.adapt.choices import MethodName
from volvelle.data.loader import Loader
from volvelle.data.text import Corpus
from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.train.adaptation import adapt_base, context_of, open_base, save_adapted, stored_as
from volvelle.train.comparison_outcome import Compared, Row, with_gains
from volvelle.train.comparison_probe import Probe, probe
from volvelle.train.comparison_report import write_report
from volvelle.train.evaluate import answerable, layout_of, prompted, spread, text_scores, write
from volvelle.train.interrupt import Interrupt
from volvelle.train.language import LanguageObjective, held_out_loss
from volvelle.train.loop import fit
from volvelle.train.observer import Observer
from volvelle.train.options import to_dict
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.adapt import AdaptLanguage
from volvelle.train.recipes.compare import STEPS, CompareMethods
from volvelle.train.text_run import (
    choose_device,
    closing,
    export_command,
    held_out_loader,
    read_split,
    resume_command,
    split,
    training_loader,
)


class Stopped(Exception):
    """Ctrl-C or SIGTERM was heard; holds the signal's name."""


def compare_methods(
    recipe: CompareMethods,
    run: RunFolder,
    *,
    observer: Observer | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Compared:
    """Train every method with every learning rate, measure the best of each, and leave a table and a report.

    `resume=True` continues an interrupted comparison. SIGINT and SIGTERM save and return what there is.
    """
    if ranks is not None and ranks.world > 1:
        raise UsageError("method=compare: trains on one rank", tip="start it without torchrun")
    with closing(run), Interrupt() as interrupt:
        return _Comparison(recipe, run, observer or Observer(), interrupt).run_all()


class _Comparison:
    def __init__(self, recipe: CompareMethods, run: RunFolder, observer: Observer, interrupt: Interrupt):
        self.recipe, self.run, self.observer, self.interrupt = recipe, run, observer, interrupt
        train, self.held = read_split(recipe, observer)
        whole = len(train.examples)
        share = min(0.5, recipe.compare.tuning / whole) if whole else recipe.held_out_share
        self.train, self.tuning = split(train, share, recipe.seed)
        self.device, self.where = choose_device(recipe.device)
        self.began = time.monotonic()
        self.rows: list[Row] = [Row(**row) for row in run.manifest.get("rows", [])]
        self.outputs: dict[str, list[str]] = dict(run.manifest.get("outputs", {}))
        self.steps = recipe.steps or 0
        self.subtitle = str(run.manifest.get("subtitle", ""))

    def run_all(self) -> Compared:
        stopped = None
        try:
            self._plan()
            if not self.rows:
                self._measure("base", open_base(self.recipe.model, self._dtype("lora"), self.device), Row("base", 0.0))
            for method in self.recipe.compare.methods:
                if all(row.method != method for row in self.rows):
                    self._method(method)
        except Stopped as stop:
            stopped = str(stop)
        return self._close(stopped)

    def _plan(self) -> None:
        """Choose the number of steps, take two steps of every method, and say how long it all takes."""
        trials = [self._recipe(method, self.recipe.compare.rates[0]) for method in self.recipe.compare.methods]
        known = self.run.manifest.get("probes")
        if known:
            self.probes = {method: Probe(*values) for method, values in known.items()}
            self.steps = int(self.run.manifest["trial_steps"])
            self.observer.say(self.subtitle)
            return
        self.observer.say(f"{self.where}; measuring a step of {', '.join(trial.method for trial in trials)}")
        self.probes = {}
        for trial in trials:
            self._check()
            self.probes[trial.method] = found = probe(trial, self.device, self._loader)
            self.steps = self.steps or min(STEPS, found.batches)
        further = (len(self.recipe.compare.rates) - 1) * self.look  # of the learning rates that are not chosen
        seconds = sum(found.seconds for found in self.probes.values()) * (self.steps + further)
        low, high = (f(found.seconds for found in self.probes.values()) for f in (min, max))
        self.subtitle = (
            f"{self.where}; {self.recipe.precision}; {len(trials)} methods x {len(self.recipe.compare.rates)} learning "
            f"rates x {self.steps} steps of {self.recipe.batch}, all but the best rate stop after {self.look}, "
            f"{low:.1f} to {high:.1f} s a step: about {_minutes(seconds)} of training, and the evaluations"
        )
        self.observer.say(self.subtitle)
        self.run.update_manifest(
            probes={method: list(found) for method, found in self.probes.items()},
            trial_steps=self.steps,
            subtitle=self.subtitle,
        )

    def _recipe(self, method: MethodName, rate: float) -> AdaptLanguage:
        return self.recipe.trial(method, rate, max(1, self.steps))

    def _dtype(self, method: MethodName) -> torch.dtype:
        return stored_as(self._recipe(method, self.recipe.compare.rates[0]), self.device)

    def _loader(self, model: Any, trial: AdaptLanguage) -> Loader:
        context = context_of(trial, model, self.train)
        return training_loader(self.train, model.tokenizer, trial, context, layout=layout_of(model.config))

    def _fixed(self, corpus: Corpus, model: Any, limit: int) -> Loader:
        """A corpus in a fixed order, for measuring a loss."""
        context = context_of(self.recipe, model, self.train)
        layout = layout_of(model.config)
        return held_out_loader(corpus, model.tokenizer, self.recipe, context, layout=layout, limit=limit)

    def _method(self, method: MethodName) -> None:
        """All trainings of a method, and what its best one comes to."""
        losses = {rate: self._look_at(method, rate) for rate in self.recipe.compare.rates}
        best = min(losses, key=lambda rate: losses[rate])
        for rate in self.recipe.compare.rates:
            if rate != best:
                _forget(self._folder(method, rate), "checkpoints")
        self._finish(method, best)
        folder = RunFolder.open(self._folder(method, best))
        model = load_run(folder.path, dtype=self._dtype(method), device=self.device)
        facts = folder.manifest["trial"]
        row = Row(
            method,
            loss=0.0,
            trained=facts["trained"],
            stored=facts["stored"],
            peak=self.probes[method].peak,
            seconds=facts["seconds"],
            rate=best,
            tuning={f"{rate:g}": loss for rate, loss in losses.items()},
            run=str(folder.path),
        )
        self._measure(method, model, row)

    def _folder(self, method: str, rate: float) -> Path:
        return self.run.path / "trials" / f"{method}-{rate:g}"

    @property
    def look(self) -> int:
        """The step at which the learning rates are compared."""
        return max(1, round(self.recipe.compare.look * self.steps))

    def _look_at(self, method: MethodName, rate: float) -> float:
        """Train up to the step at which rates are compared; the loss on the tuning examples there."""
        trial, path = self._recipe(method, rate), self._folder(method, rate)
        known = (path / "manifest.json").is_file()
        sub = RunFolder.open(path) if known else RunFolder.create(
            path.name, root=path.parent, kind="adapt", config=to_dict(trial)
        )  # fmt: skip
        if "tuning" not in sub.manifest:
            self.observer.say(f"{method}, learning rate {rate:g}")
            model, _ = self._trained(trial, sub, self.look, resume=known)
            fixed = self._fixed(self.tuning, model, self.recipe.compare.tuning)
            loss = held_out_loss(model, fixed, trial.precision)["loss"]
            sub.update_manifest(status="interrupted", step=self.look, steps=self.steps, tuning=loss)
            self.observer.say(f"  loss on the tuning examples {loss:.4f} after {self.look} steps")
        return float(sub.manifest["tuning"])

    def _finish(self, method: MethodName, rate: float) -> None:
        """Train to the end, and keep what was trained."""
        trial, sub = self._recipe(method, rate), RunFolder.open(self._folder(method, rate))
        if "trial" in sub.manifest:
            return
        self.observer.say(f"{method}, learning rate {rate:g}: chosen")
        model, adapted = self._trained(trial, sub, self.steps, resume=True)
        saved = save_adapted(model, trial, sub)
        stored = adapted.total_count if trial.adaptation.trains_base else _stored(saved)
        seconds = sorted(r["seconds"] for r in sub.metrics() if r.get("event") == "train")
        own = adapted.total_count - (0 if trial.adaptation.trains_base else adapted.trainable_count)
        facts = {
            "seconds": seconds[len(seconds) // 2],
            "trained": adapted.trainable_count / own,
            "stored": stored / own,
        }
        _forget(sub.path, "checkpoints")
        sub.update_manifest(status="finished", step=self.steps, steps=self.steps, trial=facts)

    def _trained(self, trial: AdaptLanguage, sub: RunFolder, until: int, *, resume: bool) -> tuple[Any, Any]:
        """The model, and what was done to it, trained up to a step."""
        self._check()
        model = open_base(trial.model, stored_as(trial, self.device), self.device)
        adapted = adapt_base(model, trial)
        objective, loader = LanguageObjective(model, trial), self._loader(model, trial)
        result = fit(objective, loader, options=trial, run=sub, observer=self.observer, resume=resume, until=until)
        if result.interrupted:
            sub.update_manifest(status="interrupted", step=result.step, steps=result.steps)
            raise Stopped(result.interrupted)
        model.eval()
        return model, adapted

    def _measure(self, method: str, model: Any, row: Row) -> None:
        """Held-out loss and answers of a model, as a finished row."""
        self._check()
        recipe = self.recipe
        model.eval()
        loss = held_out_loss(model, self._fixed(self.held, model, recipe.held_out_size), recipe.precision)["loss"]
        prompts = self._prompts(model)
        bleu = None
        if prompts:

            def progress(done: int, total: int) -> None:
                self._check()
                self.observer.work(f"answers of {method}", done, total)

            outputs = write(model, prompts, max_tokens=recipe.max_tokens, progress=progress)
            bleu = text_scores(outputs, [p.references for p in prompts])["bleu"]
            self.outputs[method] = outputs
        self.rows.append(dataclasses.replace(row, loss=loss, bleu=bleu))
        self.run.update_manifest(rows=[dataclasses.asdict(each) for each in self.rows], outputs=self.outputs)
        said = "" if bleu is None else f", BLEU {bleu:.1f}"
        self.observer.say(f"{method}: held-out loss {loss:.4f}{said}")

    def _prompts(self, model: Any) -> list[Any]:
        found = answerable(model, prompted(self.held.examples), self.recipe.max_tokens, self.recipe.on_bad)
        return spread(found, self.recipe.samples)

    def _check(self) -> None:
        if self.interrupt.name:
            raise Stopped(self.interrupt.name)

    def _close(self, stopped: str | None) -> Compared:
        recipe, rows = self.recipe, with_gains(self.rows)
        # Every training up to the look, and the chosen ones to their end.
        total = len(recipe.compare.methods) * (len(recipe.compare.rates) + 1)
        manifests = [RunFolder.open(path.parent).manifest for path in self.run.path.glob("trials/*/manifest.json")]
        done = sum(("tuning" in each) + ("trial" in each) for each in manifests)
        best = min((row for row in rows if row.run), key=lambda row: row.loss, default=None)
        commands = (resume_command(self.run),)
        if not stopped and best is not None and best.run:
            commands = (
                f"volvelle eval {best.run} data={recipe.held_out or recipe.data}",
                f"volvelle generate {best.run} Once",
                export_command(Path(best.run)),
            )
        seconds = time.monotonic() - self.began + float(self.run.manifest.get("seconds", 0.0))
        trials = {row.method: RunFolder.open(row.run).metrics() for row in rows if row.run}
        examples = spread(prompted(self.held.examples), recipe.samples)
        report = write_report(
            self.run,
            rows,
            trials,
            subtitle=self.subtitle,
            note=f"Interrupted by {stopped} after {done} of {total} trainings." if stopped else "",
            samples=[(p, {method: texts[i] for method, texts in self.outputs.items() if len(texts) == len(examples)})
                     for i, p in enumerate(examples[:4])],
            commands=commands,
        )  # fmt: skip
        self.run.update_manifest(
            status="interrupted" if stopped else "finished", step=done, steps=total, seconds=round(seconds, 1)
        )
        return Compared(
            run=self.run.path,
            step=done,
            steps=total,
            unit="training",
            interrupted=stopped,
            resume=commands[0] if stopped else None,
            report=report,
            seconds=seconds,
            next=commands,
            rows=rows,
        )


def _stored(folder: Path) -> int:
    """Numbers in an adapter's file."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def _forget(run: Path, *folders: str) -> None:
    for name in folders:
        shutil.rmtree(run / name, ignore_errors=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
