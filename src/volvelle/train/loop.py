"""The loop: one for every objective, from a language model's single phase to the players of a GAN.

`fit` draws micro-batches, lets each phase play, logs, evaluates, and checkpoints. Checkpoints lie between steps and
hold everything the next step depends on (weights, buffers, optimisers, counters, the loader's cursor, all random
generators), so a run that was interrupted at any moment continues with the same losses and weights, bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from volvelle.data.loader import Batch
from volvelle.errors import VolvelleError
from volvelle.files import write_atomic
from volvelle.runs import plain
from volvelle.systems.modes import evaluating
from volvelle.train.contracts import Batches, Run
from volvelle.train.interrupt import Interrupt
from volvelle.train.isolation import Isolation
from volvelle.train.nonfinite import NonFinite
from volvelle.train.observer import Observer, Progress, Quiet
from volvelle.train.options import FitOptions
from volvelle.train.phase import Objective
from volvelle.train.player import Player, device_of, to_device
from volvelle.train.precision import Precision
from volvelle.train.random_state import random_state, seed_all, set_random_state, untouched_random_state
from volvelle.train.ranks import Ranks


@dataclass(frozen=True)
class FitResult:
    """How a run ended: `step` of `steps`, the newest metrics, the best evaluation, and the signal that stopped it."""

    step: int
    steps: int
    metrics: dict[str, float]
    held_out: dict[str, float]
    best: dict[str, float] | None = None
    interrupted: str | None = None
    checkpoint: Path | None = None
    seconds: float = 0.0
    resumed_from: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Updates that each phase left out, for overflow under loss scaling or as NaN."""


@dataclass
class _Cursor:
    """Counters that the next step depends on, saved in every checkpoint."""

    step: int = 0
    evaluated: int = -1
    best: dict[str, float] | None = None
    held_out: dict[str, float] = field(default_factory=dict)


def fit(
    objective: Objective,
    loader: Batches,
    *,
    options: FitOptions,
    run: Run | None = None,
    observer: Observer | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    until: int | None = None,
) -> FitResult:
    """Train the objective for `options.steps` steps (or `options.epochs` passes over the loader).

    A phase that repeats its update in a step draws further batches for it, which these passes do not count.

    `until` is a step to pause at: the run is saved there, and goes on with `resume=True` as if it had not paused.

    With a `run`, metrics go to its metrics.jsonl and checkpoints to its folder `checkpoints`; `resume=True` continues
    from the newest sound one (or starts when there is none), without it a folder that has some is refused. SIGINT and
    SIGTERM finish the step, save, and return a result with `interrupted` set. A NaN or infinite loss or gradient raises
    `NonFinite`, with the step, the phase, the samples and where it began, or is left out (`options.on_nan`). With
    `options.average` the averaged weights are evaluated, and are in the modules when a run has finished; an
    interrupted run leaves its own.
    """
    return _Fit(objective, loader, options, run, observer or Observer(), ranks or Ranks()).run_all(resume, until)


class _Fit:
    def __init__(
        self,
        objective: Objective,
        loader: Batches,
        options: FitOptions,
        run: Run | None,
        observer: Observer,
        ranks: Ranks,
    ):
        self.objective, self.loader, self.options = objective, ranks.split(loader), options
        self.run, self.observer, self.ranks = run, observer if ranks.leads else Quiet(), ranks
        # Before anything is drawn: phases may initialise weights, and dropout begins with the first step.
        seed_all(options.seed)
        a_step = options.accumulate * ranks.world
        self.steps = options.steps or max(1, math.ceil(options.epochs * len(loader) / a_step))
        modules = objective.modules()
        ranks.prepare(modules, objective.forward_methods)
        self.device = device_of(modules)
        phases = objective.phases(self.steps)
        if len({phase.name for phase in phases}) < max(1, len(phases)):
            raise ValueError(f"fit: the objective's phases need distinct names, got {[p.name for p in phases]}")
        self.isolation = Isolation(phases, modules)
        precision = Precision(options.precision, self.device)
        player = {"on_nan": options.on_nan, "average": options.average, "say": self._say_skipped}
        self.players = [Player(phase, self.isolation, precision, ranks, **player) for phase in phases]
        self.checkpoints = ranks.checkpoints(run.path / "checkpoints", options) if run else None
        ranks.seed(options.seed)
        self.cursor = _Cursor()
        self.stream = self._stream()
        self.frozen = self.isolation.frozen() if run else {}
        self.saved: int | None = None
        self.metrics: dict[str, float] = {}
        self.pace: deque[tuple[float, float]] = deque(maxlen=20)
        self.unit = "batches"

    def run_all(self, resume: bool, until: int | None = None) -> FitResult:
        with self.ranks.guard(self._kept):
            return self._run_all(resume, self.steps if until is None else min(until, self.steps))

    def _run_all(self, resume: bool, until: int) -> FitResult:
        began = time.monotonic()
        resumed = self._resume() if resume else self._begin()
        training = [(part, part.training) for module in self.isolation.modules.values() for part in module.modules()]
        try:
            with Interrupt() as interrupt:
                heard = self._loop(interrupt, until)
        finally:
            # Ends the loader's workers; what they have read ahead is read again after a resume.
            self.stream.close()
            for part, mode in training:
                part.training = mode
        cursor = self.cursor
        for player in self.players:
            for line in player.report():
                self.observer.say(line)
            if player.average is not None and cursor.step == self.steps:
                player.average.copy_to(player.phase.parameters)
        self.ranks.finish(self.isolation.modules)
        path = self.checkpoints.path(self.saved) if self.checkpoints and self.saved is not None else None
        stopped = heard if cursor.step < self.steps else None
        return FitResult(
            step=cursor.step,
            steps=self.steps,
            metrics=self.metrics,
            held_out=cursor.held_out,
            best=cursor.best,
            interrupted=stopped,
            checkpoint=path,
            seconds=time.monotonic() - began,
            resumed_from=resumed,
            skipped={p.phase.name: p.skipped.overflow + p.skipped.nan for p in self.players},
        )

    def _loop(self, interrupt: Interrupt, until: int) -> str | None:
        """Step until there, or until a signal is heard, by any rank; gives its name."""
        options, cursor = self.options, self.cursor
        self.objective.train_mode()
        if cursor.evaluated < cursor.step and self._evaluation_due() and self._evaluate():
            # Interrupted before this evaluation: its checkpoint may now be dropped unless it is known as the best.
            self.saved = None
            self._save()
        heard = self.ranks.heard(interrupt.name)
        while cursor.step < until and not heard:
            self._step()
            heard = self.ranks.heard(interrupt.name)
            # Who interrupts does not want to wait for an evaluation; the resumed run makes up for it. At the last
            # step there is no resumed run.
            evaluated = self._evaluation_due() and (not heard or cursor.step == self.steps)
            improved = evaluated and self._evaluate()
            due = options.checkpoint_every is not None and cursor.step % options.checkpoint_every == 0
            if due or improved or cursor.step == self.steps:
                self._save()
            if evaluated:
                heard = self.ranks.heard(interrupt.name)
        if cursor.step < self.steps:
            if heard:
                self.observer.say(f"{heard}: stopped after step {cursor.step} of {self.steps}")
            self._save()
        return heard

    def _stream(self) -> Generator[Batch, None, None]:
        """Batches for ever, epoch after epoch."""
        empty = 0  # passes in a row; that in which a resumed cursor lies may be over
        while empty < 2:
            empty += 1
            for batch in self.loader:
                empty = 0
                yield batch
        raise VolvelleError("fit: a pass over the data gave no batch", tip="is it empty, or read only once?")

    def _draw(self) -> list[Batch]:
        batches = [next(self.stream) for _ in range(self.options.accumulate)]
        return [batch._replace(value=to_device(batch.value, self.device)) for batch in batches]

    def _step(self) -> None:
        began = time.monotonic()
        step, metrics, work = self.cursor.step, dict[str, float](), 0.0
        batches = self._draw()
        work += self._work(batches)
        for player in self.players:
            if not player.phase.plays(step):
                continue
            for repeat in range(player.phase.repeats):
                if repeat:
                    batches = self._draw()
                    work += self._work(batches)
                try:
                    found = player.update(batches, self.loader.describe)
                except NonFinite as error:
                    raise self._non_finite(error) from None
            prefix = f"{player.phase.name}_" if len(self.players) > 1 else ""
            metrics |= {prefix + name: value for name, value in found.items()}
        self.ranks.even(self.isolation.modules)
        self.objective.after_step(step)
        self.cursor.step += 1
        self.metrics = metrics
        self._report(time.monotonic() - began, work)

    def _work(self, batches: list[Batch]) -> float:
        counts = [self.objective.units(batch.value) for batch in batches]
        self.unit = counts[0][1]
        return self.ranks.sums([sum(count for count, _ in counts)])[0]

    def _report(self, seconds: float, work: float) -> None:
        step = self.cursor.step
        if step % self.options.log_every == 0 or step == self.steps:
            self._log({"event": "train", "step": step, **self.metrics, "seconds": round(seconds, 4)})
        self.pace.append((seconds, work))
        spent, done = sum(s for s, _ in self.pace), sum(w for _, w in self.pace)
        left = (self.steps - step) * spent / len(self.pace)
        self.observer.progress(Progress(step, self.steps, self.metrics, done / max(spent, 1e-9), self.unit, left))

    def _log(self, record: dict[str, Any]) -> None:
        if self.run and self.ranks.leads:
            self.run.log(record)

    def _evaluation_due(self) -> bool:
        step, every = self.cursor.step, self.options.evaluate_every
        return step in (0, self.steps) or (every is not None and step % every == 0)

    def _evaluate(self) -> bool:
        """Measure on held-out data; True when this is the best so far and worth a checkpoint of its own."""
        cursor = self.cursor
        cursor.evaluated = cursor.step
        found: dict[str, float] = {}
        with ExitStack() as averages:
            for player in self.players:
                if player.average is not None:
                    averages.enter_context(player.average.inside(player.phase.parameters))
            parts = self.isolation.modules
            with self.ranks.whole(parts), evaluating(*parts.values()), untouched_random_state(), torch.no_grad():
                if self.ranks.leads:
                    found = {name: float(value) for name, value in self.objective.evaluate().items()}
        found = self.ranks.share(found)
        if not found:
            return False
        cursor.held_out = found
        self._log({"event": "evaluate", "step": cursor.step, **{f"held_out_{k}": v for k, v in found.items()}})
        name, direction = self.objective.best
        if name not in found:
            return False
        before = math.nan if cursor.best is None else cursor.best[name]
        better = math.isnan(before) or (found[name] < before if direction == "min" else found[name] > before)
        if better:
            cursor.best = {"step": cursor.step, **found}
        return better and cursor.step > 0

    def _say_skipped(self, text: str) -> None:
        self.observer.say(f"step {self.cursor.step + 1}, {self._cause(text)}")

    def _cause(self, text: str) -> str:
        """What all ranks say of an update: the words of the one whose samples were the cause."""
        texts = self.ranks.collect(text)
        found = next((text for text in texts if "samples" in text), texts[0])
        # What every rank says is no rank's own.
        return found if len(set(texts)) == 1 else f"rank {texts.index(found)}, {found}"

    def _kept(self) -> str:
        saved = self.checkpoints.steps() if self.checkpoints else []
        return f"; the checkpoint of step {saved[-1]} is intact" if saved else ""

    def _non_finite(self, error: NonFinite) -> NonFinite:
        return NonFinite(
            f"step {self.cursor.step + 1}, {self._cause(str(error))}{self._kept()}",
            tip="lower learning_rate, or look at these samples",
        )

    def _save(self) -> None:
        if self.checkpoints is None or self.saved == self.cursor.step:
            return
        best = self.cursor.best
        self.checkpoints.save(self.cursor.step, self._state(), best=int(best["step"]) if best else None)
        self.saved = self.cursor.step

    def _state(self) -> dict[str, Any]:
        return {
            "cursor": vars(self.cursor),
            "loader": self.loader.state_dict(),
            "random": self.ranks.collect(random_state()),
            "weights": self.isolation.weights(),
            "players": {player.phase.name: player.state_dict() for player in self.players},
            "objective": self.objective.state_dict(),
            "frozen": self.frozen,
        }

    def _begin(self) -> None:
        if self.checkpoints is not None and (steps := self.checkpoints.steps()):
            raise VolvelleError(
                f"fit: {self.checkpoints.folder} holds checkpoints already, the newest of step {steps[-1]}",
                tip="give resume=True to go on from it, or another run folder",
            )

    def _resume(self) -> int | None:
        if self.checkpoints is None:
            raise ValueError("fit: resume=True needs a run folder")
        assert self.run is not None
        found = self.checkpoints.newest(self.observer.say)
        if found is None:
            if self.ranks.leads:
                forget_after(self.run, step=-1, evaluated=-1)
            return None
        step, state = found
        self._restore(state)
        self.saved = step
        if self.ranks.leads:
            forget_after(self.run, step=step, evaluated=self.cursor.evaluated)
        self._log({"event": "resume", "step": step})
        self.observer.say(f"resumed from the checkpoint of step {step}")
        return step

    def _restore(self, state: Mapping[str, Any]) -> None:
        if len(state["random"]) != self.ranks.world:
            raise VolvelleError(
                f"resume: {len(state['random'])} ranks wrote the checkpoint, and this run has {self.ranks.world}",
                tip=f"resume with ranks={len(state['random'])}",
            )
        # As text: what is not a number is equal to itself here.
        changed = [name for name, values in state["frozen"].items() if str(self.frozen.get(name)) != str(values)]
        if changed or len(self.frozen) != len(state["frozen"]):
            named = changed[0] if changed else "their number"
            raise VolvelleError(
                f"resume: the weights that are not trained differ from those the run began with ({named})",
                tip="resume with the same model",
            )
        ours = self.isolation.weights()
        if ours.keys() != state["weights"].keys():
            different = sorted(ours.keys() ^ state["weights"].keys())
            raise VolvelleError(f"resume: the checkpoint trains other weights than this run ({different[0]})")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(state["weights"][name])
        for player in self.players:
            player.load_state_dict(state["players"][player.phase.name])
        self.loader.load_state_dict(state["loader"])
        self.objective.load_state_dict(state["objective"])
        self.cursor = _Cursor(**state["cursor"])
        set_random_state(state["random"][self.ranks.rank])


def forget_after(run: Run, *, step: int, evaluated: int) -> None:
    """Drop metrics of steps after `step`, and evaluations after step `evaluated`: they will be written again."""
    last = {"evaluate": evaluated}
    kept = [plain(r) for r in run.metrics() if r.get("step", 0) <= last.get(str(r.get("event")), step)]
    lines = (json.dumps(record, allow_nan=False) + "\n" for record in kept)
    write_atomic(run.path / "metrics.jsonl", "".join(lines))
