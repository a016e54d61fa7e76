"""The recipe `draft` for a prior: what drafts image tokens, trained on the codes of pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from volvelle.errors import UsageError
from volvelle.runs import RunFolder
from volvelle.systems.generation.prior import Prior, read_prior
from volvelle.train.draft import KINDS_OF_DRAFTERS, Trained
from volvelle.train.loop import fit
from volvelle.train.observer import Observer
from volvelle.train.options import from_dict
from volvelle.train.outcome import Outcome
from volvelle.train.precision import Precision
from volvelle.train.prior_data import CODES, captions, find_codec, held_loader, read_parts, reading, training_loader
from volvelle.train.prior_objective import spread_shows
from volvelle.train.random_state import seed_all
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.draft import TrainDraft
from volvelle.train.recipes.prior import TrainPrior
from volvelle.train.text_run import NUMBERS, at_first, choose_device, finish, first_line

KINDS = ("medusa", "mtp")


def draft_codes(recipe: TrainDraft, run: RunFolder, observer: Observer, resume: bool) -> Outcome:
    """Train heads or modules that draft for a prior; `accepted_per_step` is that of pictures drawn at temperature 1.

    Codes of the prior's own pictures are read where its run left them; those of others are made here, once.
    """
    _check(recipe)
    of = Path(recipe.model)
    trained_on = _recipe_of(RunFolder.open(of), recipe)
    parts = read_parts(trained_on, run, observer, Ranks())
    device, where = choose_device(recipe.device)
    seed_all(recipe.seed)
    prior = read_prior(of, dtype=Precision(recipe.precision, device).dtype, device=device)
    prior.model.requires_grad_(False)
    codec = prior.codec
    assert codec is not None
    folder = (of if recipe.data == RunFolder.open(of).config().get("data") else run.path) / CODES
    how = reading(trained_on, parts, find_codec(prior.codec_path, observer), codec, of / CODES, Ranks())
    if how.layout != prior.layout:
        raise UsageError(f"{recipe.data}: other classes or captions than the prior's", tip="take its own data")
    texts, held = (
        how.texts(part, folder / f"{name}.safetensors", observer, Ranks(), training=name == "train")
        for name, part in (("train", parts.train), ("held", parts.held))
    )
    loader, measured = training_loader(trained_on, texts, how.layout), held_loader(held, recipe.batch)
    trained: Trained = KINDS_OF_DRAFTERS[recipe.kind](recipe, prior.model, _drafted(prior))
    count = sum(p.numel() for p in trained.module.parameters())
    total = count + sum(p.numel() for p in prior.model.parameters())
    numbers = NUMBERS[recipe.precision] if recipe.precision == "fp32" else f"{recipe.precision} base"
    subtitle = first_line(where, f"{numbers}, {trained.label}", count, total, trained.memory(loader))
    observer.say(subtitle)
    objective = trained.objective(measured)
    result = fit(objective, loader, options=recipe, run=run, observer=observer, resume=resume)
    after: dict[str, float] = {}
    if not result.interrupted:
        prior.model.eval()
        after = trained.finish(objective)
        observer.say(f"saved {trained.write(run)}")
        shows = spread_shows(prior, recipe.samples, captions(parts.held))
        after |= _accepted(prior, trained, shows, recipe, observer)
    commands = (f"volvelle generate {of} count=16 draft={recipe.kind}:{run.path}",)
    return finish(run, result, before=at_first(run), after=after, samples=[], subtitle=subtitle, next_commands=commands)


def _check(recipe: TrainDraft) -> None:
    """Raise UsageError for what is about text alone."""
    if recipe.kind not in KINDS:
        raise UsageError(f"kind={recipe.kind}: for pictures {' or '.join(KINDS)} draft")
    if recipe.distill:
        raise UsageError("distill: is for text; heads of a prior learn from pictures", tip="leave distill out")
    if recipe.pack or (recipe.kind == "medusa" and recipe.medusa.backbone != "frozen"):
        raise UsageError("pack and medusa.backbone: are for text", tip="leave them out")
    if not (Path(recipe.model) / "manifest.json").is_file():
        raise UsageError(f"{recipe.model}: not a run of train prior", tip="name the run's folder")


def _recipe_of(prior: RunFolder, recipe: TrainDraft) -> TrainPrior:
    """How the prior was trained, with the draft's data, batch and seed."""
    known = {name: value for name, value in prior.config().items() if name in TrainPrior.__dataclass_fields__}
    mine = {"data": recipe.data, "held_out": recipe.held_out, "batch": recipe.batch, "dropped": 0.0}
    if recipe.data == known.get("data"):
        mine["held_out"] = known.get("held_out")
    return from_dict(TrainPrior, known | mine)


def _drafted(prior: Prior) -> torch.Tensor:
    """What is drafted: codes, and nothing of what is only read."""
    return torch.arange(prior.layout.codes, device=prior.model.device)


def _accepted(prior: Prior, trained: Trained, shows: list, recipe: TrainDraft, observer: Observer) -> dict[str, float]:
    """Pictures drawn with drafts: the codes gained by a step."""
    if not shows:
        return {}
    from volvelle.decode.contract import ALWAYS
    from volvelle.decode.images import draw_images
    from volvelle.decode.options import Sampling

    drawn = draw_images(
        prior,
        shows,
        sampling=Sampling(temperature=1.0, seed=recipe.seed),
        batch=1,
        drafter=trained.drafter(),
        policy=ALWAYS,
        progress=lambda done, total: observer.work("pictures with drafts", done, total),
    )
    return {"accepted_per_step": drawn.accepted_per_step}
