"""The recipe `draft` from end to end: text or the model's own answers, training, what the drafter gains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from volvelle.adapt import apply, save
from volvelle.data.loader import Loader
from volvelle.errors import VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.generation.prior import is_prior
from volvelle.systems.language.decoder import Decoder
from volvelle.systems.language.draft_head import DraftHead, frequent_tokens
from volvelle.systems.language.huggingface import write_folder
from volvelle.systems.language.medusa import MedusaHeads
from volvelle.systems.language.medusa_files import write_medusa
from volvelle.systems.language.mtp import KINDS
from volvelle.systems.language.mtp_files import write_mtp
from volvelle.train.adaptation import open_base
from volvelle.train.ahead import AheadObjective, AheadOfBlocks, AheadOfHidden, Joint
from volvelle.train.draft_data import (
    DraftData,
    Stopped,
    fewer,
    learnt_tokens,
    own_answers,
    user_data,
    with_prompts,
)
from volvelle.train.draft_memory import beside_memory
from volvelle.train.estimate import MemoryEstimate
from volvelle.train.language import LanguageObjective
from volvelle.train.loop import FitResult, fit
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, Sample
from volvelle.train.phase import Objective
from volvelle.train.precision import Precision
from volvelle.train.random_state import seed_all
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.draft import TrainDraft
from volvelle.train.scratch import build_config
from volvelle.train.text_run import (
    NUMBERS,
    at_first,
    choose_device,
    closing,
    finish,
    first_line,
    fresh_context,
    keep_samples,
    read_split,
    step_memory,
)

if TYPE_CHECKING:
    from volvelle.decode.contract import Drafter

WINDOW = 512
"""Tokens in a window of plain text, where the recipe does not say."""


def train_draft(
    recipe: TrainDraft,
    run: RunFolder,
    *,
    observer: Observer | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Outcome:
    """Train a drafter for the recipe's model; leave its weights, metrics and a report in the run folder.

    What is left there opens with `volvelle.decode.open_drafter`. `resume=True` continues an interrupted run.
    """
    with closing(run):
        if is_prior(recipe.model):
            from volvelle.train.draft_codes import draft_codes

            return draft_codes(recipe, run, observer or Observer(), resume)
        return _Run(recipe, run, observer or Observer()).go(resume)


class Trained(Protocol):
    """One kind of drafter while it is trained."""

    label: str

    @property
    def module(self) -> nn.Module:
        """What is trained beside the model."""
        ...

    def objective(self, held: Loader) -> Objective:
        """Its training."""
        ...

    def memory(self, loader: Loader) -> MemoryEstimate:
        """What a step takes."""
        ...

    def finish(self, objective: Objective) -> dict[str, float]:
        """What was measured when it was trained."""
        ...

    def write(self, run: RunFolder) -> Path:
        """Write its weights."""
        ...

    def drafter(self) -> Any:
        """Itself as a drafter of the model, in the model's dtype."""
        ...


class _Medusa:
    """Medusa's heads; with an adapter on the model, Medusa-2."""

    def __init__(self, recipe: TrainDraft, model: Decoder, tokens: torch.Tensor | None):
        options = recipe.medusa
        self.recipe, self.model, self.lora = recipe, model, options.backbone == "lora"
        own = options.projection == "own"
        self.module = MedusaHeads.of(model, options.heads, layers=options.layers, own=own, tokens=tokens)
        self.label = f"{options.heads} heads"
        self.joint = None
        if self.lora:
            generator = torch.Generator(device=model.device).manual_seed(recipe.seed)
            model.gradient_checkpointing = recipe.checkpointing
            adapted = apply(model, recipe.lora, generator=generator)
            self.label += f" and LoRA of {adapted.trainable_count:,} parameters"
            self.joint = Joint(options.weight, options.rate, options.warmup)

    def objective(self, held: Loader) -> AheadObjective:
        weights = [self.recipe.medusa.decay**k for k in range(1, self.module.count + 1)]
        ahead = AheadOfHidden(self.module, frozen=not self.lora)
        head = DraftHead(self.model, self.module.tokens)
        return AheadObjective(
            self.model, ahead, self.recipe, weights=weights, head=head, held_out=held, joint=self.joint
        )

    def memory(self, loader: Loader) -> MemoryEstimate:
        backbone = None
        if self.lora:
            model = self.model
            backbone = step_memory(
                self.recipe, model.config, loader, model.device, method=self.recipe.lora, stored=model.dtype
            )
        return beside_memory(self.model, self.module, loader, self.module.count, backbone=backbone)

    def finish(self, objective: Objective) -> dict[str, float]:
        assert isinstance(objective, AheadObjective)
        self.module.eval()
        self.module.acceptance = objective.measured().acceptance
        return objective.measured().metrics

    def write(self, run: RunFolder) -> Path:
        write_medusa(self.module, run.path / "medusa", base=self.recipe.model)
        if self.lora:
            save(self.model, run.path / "adapter", base=self.recipe.model)
        return run.path / "medusa"

    def drafter(self) -> Any:
        from volvelle.decode import Medusa

        return Medusa(self.module.to(self.model.dtype), k=4 * self.recipe.k)


class _MTP:
    """Modules of multi-token prediction on the model as it is."""

    def __init__(self, recipe: TrainDraft, model: Decoder, tokens: torch.Tensor | None):
        options = recipe.mtp
        self.recipe, self.model = recipe, model
        self.module = KINDS[options.kind](model.config, options.count, tokens=tokens).to(model.device)
        self.label = f"{options.count} {options.kind} module{'s' if options.count > 1 else ''}"

    def objective(self, held: Loader) -> AheadObjective:
        weights = [self.recipe.mtp.decay**k for k in range(1, self.module.depths + 1)]
        head = DraftHead(self.model, self.module.tokens)
        return AheadObjective(
            self.model, AheadOfBlocks(self.module), self.recipe, weights=weights, head=head, held_out=held
        )

    def memory(self, loader: Loader) -> MemoryEstimate:
        return beside_memory(self.model, self.module, loader, self.module.depths, blocks=self.module.depths)

    def finish(self, objective: Objective) -> dict[str, float]:
        assert isinstance(objective, AheadObjective)
        self.module.eval()
        return objective.measured().metrics

    def write(self, run: RunFolder) -> Path:
        write_mtp(self.module, self.model, run.path / "mtp")
        return run.path / "mtp"

    def drafter(self) -> Any:
        from volvelle.decode import MTP

        k = self.recipe.k
        if self.recipe.mtp.kind == "parallel":
            k = min(k, self.module.depths)
        return MTP(self.module.to(self.model.dtype), k=k)


class _Small:
    """A smaller model with the same tokenizer."""

    def __init__(self, recipe: TrainDraft, model: Decoder, tokens: torch.Tensor | None):
        self.recipe, self.model = recipe, model
        # It reads the same texts: its context is the model's.
        shape = dataclasses.replace(recipe.small, context=model.config.context)
        config = build_config(shape, _Vocabulary(model))
        self.module = Decoder(config).to(model.device)
        self.module.tokenizer = model.tokenizer
        self.module.gradient_checkpointing = recipe.checkpointing
        self.label = "a smaller model"

    def objective(self, held: Loader) -> LanguageObjective:
        return LanguageObjective(self.module, self.recipe, held_out=held)

    def memory(self, loader: Loader) -> MemoryEstimate:
        alone = step_memory(self.recipe, self.module.config, loader, self.model.device)
        base = sum(p.nbytes for p in self.model.parameters())
        return MemoryEstimate(alone.weights + base, alone.gradients, alone.optimizer, alone.activations)

    def finish(self, objective: Objective) -> dict[str, float]:
        self.module.eval()
        return {name: float(value) for name, value in objective.evaluate().items()}

    def write(self, run: RunFolder) -> Path:
        write_folder(self.module, run.path / "weights")
        return run.path / "weights"

    def drafter(self) -> Any:
        from volvelle.decode import DraftModel

        return DraftModel(self.module.to(self.model.dtype), k=self.recipe.k)


class _Vocabulary:
    """What a configuration asks of a tokenizer, with as many rows as the model's embedding has."""

    def __init__(self, model: Decoder):
        assert model.tokenizer is not None
        self.vocabulary = model.config.vocabulary
        self.bos_id, self.eos_ids, self.pad_id = (getattr(model.tokenizer, n) for n in ("bos_id", "eos_ids", "pad_id"))


KINDS_OF_DRAFTERS: dict[str, Any] = {"medusa": _Medusa, "mtp": _MTP, "small": _Small}
"""The drafters that are trained, by the recipe's word: each is made of (recipe, model, the tokens it drafts)."""


class _Run:
    def __init__(self, recipe: TrainDraft, run: RunFolder, observer: Observer):
        self.recipe, self.run, self.observer = recipe, run, observer
        recipe = with_prompts(recipe, run, observer)
        # Data first: a bad line should stop the run before a model is loaded.
        train, self.held = read_split(recipe, observer)
        self.train = fewer(train, recipe.examples)
        self.device, self.where = choose_device(recipe.device)
        seed_all(recipe.seed)
        # The model's own weights are never trained: they may be stored as they are multiplied.
        model = open_base(recipe.model, Precision(recipe.precision, self.device).dtype, self.device)
        if not isinstance(model, Decoder):
            raise VolvelleError(f"{recipe.model}: an encoder-decoder; drafters are trained for decoders")
        self.model = model.requires_grad_(False)
        most = fresh_context(recipe, model.room)
        # A window is always full, and attention over thousands of tokens is rarely what is wanted by default.
        self.context = min(most, WINDOW) if self.train.documents and recipe.length is None else most

    def go(self, resume: bool) -> Outcome:
        recipe, run, observer = self.recipe, self.run, self.observer
        try:
            data = self._data()
        except Stopped as stop:
            nothing = FitResult(step=0, steps=recipe.steps or 1, metrics={}, held_out={}, interrupted=stop.name)
            where = f"{stop.done:,} of {stop.total:,} answers made"
            observer.say(where)
            return finish(run, nothing, before={}, after={}, samples=[], subtitle=where, next_commands=())
        if recipe.kind == "ngram":
            return self._counted(data)
        tokens = self._tokens(data.train)
        trained: Trained = KINDS_OF_DRAFTERS[recipe.kind](recipe, self.model, tokens)
        subtitle = self._first_line(trained, data)
        objective = trained.objective(data.held)
        result = fit(objective, data.train, options=recipe, run=run, observer=observer, resume=resume)
        samples: list[Sample] = []
        after: dict[str, float] = {}
        if not result.interrupted:
            self.model.eval()
            after = trained.finish(objective)
            observer.say(f"saved {trained.write(run)}")
            accepted, samples = self._accepted(trained.drafter(), data.prompts)
            after |= accepted
            keep_samples(run, samples)
        return finish(
            run, result, before=at_first(run), after=after, samples=samples, subtitle=subtitle,
            next_commands=self._commands(),
        )  # fmt: skip

    def _counted(self, data: DraftData) -> Outcome:
        """Nothing is trained: the texts are counted, and what they draft is measured."""
        from volvelle.decode.drafters.ngram import NGram
        from volvelle.decode.drafters.ngram_files import write_ngram

        recipe, run = self.recipe, self.run
        texts = [tokens.tolist() for tokens in learnt_tokens(data.train.dataset)]
        drafter = NGram(texts, k=4 * recipe.k)
        subtitle = f"{self.where}; n-grams of {sum(map(len, texts)):,} tokens, nothing is trained"
        self.observer.say(subtitle)
        write_ngram(drafter, run.path / "ngram", vocabulary=self.model.config.vocabulary, base=recipe.model)
        self.observer.say(f"saved {run.path / 'ngram'}")
        after, samples = self._accepted(drafter, data.prompts)
        keep_samples(run, samples)
        result = FitResult(step=0, steps=0, metrics={}, held_out={}, interrupted=None)
        return finish(
            run, result, before={}, after=after, samples=samples, subtitle=subtitle, next_commands=self._commands()
        )

    def _data(self) -> DraftData:
        recipe = self.recipe
        if not recipe.distill:
            return user_data(recipe, self.model, self.train, self.held, self.context)
        return own_answers(recipe, self.model, self.train, self.held, self.context, self.run, self.observer)

    def _tokens(self, loader: Loader) -> torch.Tensor | None:
        """The draft vocabulary: the tokens that are learnt most often, and those that end a text."""
        count, size = self.recipe.vocabulary, self.model.config.vocabulary
        if count is None or count >= size:
            return None
        assert self.model.tokenizer is not None
        tokens = frequent_tokens(learnt_tokens(loader.dataset), size, count, always=self.model.tokenizer.eos_ids)
        return tokens.to(self.device)

    def _first_line(self, trained: Trained, data: DraftData) -> str:
        recipe, model = self.recipe, self.model
        count = sum(p.numel() for p in trained.module.parameters())
        beside = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = count + sum(p.numel() for p in model.parameters())
        numbers = NUMBERS[recipe.precision] if recipe.precision == "fp32" else f"{recipe.precision} base"
        tokens = getattr(trained.module, "tokens", None)
        drafted = f", {len(tokens):,} tokens drafted" if isinstance(tokens, torch.Tensor) else ""
        line = first_line(
            self.where, f"{numbers}, {trained.label}{drafted}", count + beside, total, trained.memory(data.train)
        )
        self.observer.say(line)
        self.observer.say(f"{getattr(data.train.dataset, 'tokens', len(data.train.dataset)):,} tokens to train on")
        return line

    def _accepted(self, drafter: Drafter, prompts: list[list[int]]) -> tuple[dict[str, float], list[Sample]]:
        """Answers to held-out prompts with drafts: the tokens gained by a step, and the texts."""
        from volvelle.data.text import spread
        from volvelle.decode import generate
        from volvelle.decode.contract import ALWAYS

        room = self.model.room - self.recipe.max_tokens
        chosen = spread([p for p in prompts if len(p) <= room], self.recipe.samples)
        if not chosen:
            return {}, []
        assert self.model.tokenizer is not None
        samples, gained, steps = [], 0, 0
        for done, prompt in enumerate(chosen, 1):
            answer = generate(self.model, prompt, max_tokens=self.recipe.max_tokens, drafter=drafter, policy=ALWAYS)
            gained, steps = gained + len(answer.tokens), steps + answer.steps
            text = self.model.tokenizer.decode(prompt, skip_special=False)
            samples.append(Sample(text.strip("\n"), (), after=answer.text))
            self.observer.work("answers with drafts", done, len(chosen))
        return {"accepted_per_step": gained / steps}, samples

    def _commands(self) -> tuple[str, ...]:
        recipe, path = self.recipe, self.run.path
        adapted = recipe.kind == "medusa" and recipe.medusa.backbone == "lora"
        target = path if adapted else recipe.model
        kind = {"small": "model"}.get(recipe.kind, recipe.kind)
        return (f'volvelle generate {target} "…" draft={kind}:{path} stats=true',)
