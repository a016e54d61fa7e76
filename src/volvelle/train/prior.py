"""The recipe `train prior` from end to end: pictures, their codes, a decoder over them, sheets of samples, weights."""

from __future__ import annotations

from dataclasses import replace

from volvelle.data.codes import CodedPictures
from volvelle.data.loader import Loader
from volvelle.runs import RunFolder
from volvelle.systems.generation.layout import Layout
from volvelle.systems.generation.load import open_codec
from volvelle.systems.generation.prior import Prior, write_prior
from volvelle.systems.language.decoder import Decoder
from volvelle.train.estimate import estimate_memory, largest_batch
from volvelle.train.loop import FitResult
from volvelle.train.outcome import Outcome, settled
from volvelle.train.picture_sets import PictureParts
from volvelle.train.prior_data import (
    CODES,
    captions,
    find_codec,
    held_loader,
    read_parts,
    reading,
    training_loader,
)
from volvelle.train.prior_objective import PriorObjective, spread_shows
from volvelle.train.prior_report import Page, write_report
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.prior import TrainPrior
from volvelle.train.scratch import build_config
from volvelle.train.text_run import NUMBERS, at_first, choose_device, eval_command, first_line, resume_command
from volvelle.train.training import Ready, Stage, training


@training
def train_prior(recipe: TrainPrior, stage: Stage) -> Ready:
    """Train a prior and leave its codes, weights (a folder that transformers opens), sheets and a report in the run."""
    run, observer, ranks = stage.run, stage.observer, stage.ranks
    parts = read_parts(recipe, run, observer, ranks)
    device, where = choose_device(recipe.device)
    path = find_codec(recipe.codec, observer)
    how = reading(recipe, parts, path, open_codec(path, device=device), run.path / CODES, ranks)
    texts, held = (
        how.texts(part, run.path / CODES / f"{name}.safetensors", observer, ranks, training=name == "train")
        for name, part in (("train", parts.train), ("held", parts.held))
    )
    seed_all(recipe.seed)
    prior = Prior(build_model(recipe, how.layout).to(device), how.layout, how.words, how.codec, str(how.path))
    shows = spread_shows(prior, recipe.samples, captions(parts.held))
    objective = PriorObjective(prior, recipe, held_out=held_loader(held, recipe.batch), shows=shows, folder=run.path)
    loader = training_loader(recipe, texts, how.layout)
    subtitle = _first_line(recipe, prior, where, loader)
    observer.say(subtitle)
    return Ready(objective, loader, lambda result: _close(recipe, stage, prior, parts, held, result, subtitle))


def build_model(recipe: TrainPrior, layout: Layout) -> Decoder:
    """A fresh decoder of the recipe's shape for texts of this layout."""
    model = Decoder(build_config(replace(recipe.model, context=layout.context), _Ids(layout), recipe.position))
    model.gradient_checkpointing = recipe.checkpointing
    return model


class _Ids:
    """What a configuration asks of a tokenizer."""

    def __init__(self, layout: Layout):
        self.vocabulary, self.bos_id, self.eos_ids, self.pad_id = layout.vocabulary, layout.begin, (), layout.nothing


def _first_line(recipe: TrainPrior, prior: Prior, where: str, loader: Loader) -> str:
    """What was decided."""
    model, layout = prior.model, prior.layout
    count = sum(p.numel() for p in model.parameters())
    memory = estimate_memory(
        model.config, largest_batch(loader), autocast=recipe.precision != "fp32", average=recipe.average is not None,
        checkpointing=recipe.checkpointing, device=model.device.type, ranks=recipe.ranks, shard=recipe.shard,
        accumulate=recipe.accumulate,
    )  # fmt: skip
    ear = "captions" if layout.words else f"{len(layout.classes)} classes" if layout.classes else "nothing"
    what = f"{layout.rows} x {layout.columns} codes of {layout.codes}, told {ear}"
    return first_line(where, f"{NUMBERS[recipe.precision]}; {what}", count, count, memory)


def _close(
    recipe: TrainPrior,
    stage: Stage,
    prior: Prior,
    parts: PictureParts,
    held: CodedPictures,
    result: FitResult,
    subtitle: str,
) -> Outcome:
    """Save the weights and write the report, unless the run was interrupted."""
    run = stage.run
    commands: tuple[str, ...] = (resume_command(run),)
    after = {} if result.interrupted else result.held_out
    if not result.interrupted:
        prior.model.eval()
        write_prior(prior, run.path / "weights")
        stage.observer.say(f"saved {run.path / 'weights'}; measured on {parts.where}")
        commands = _commands(run, recipe, prior)
    before = at_first(run)
    page = Page(prior, parts.held, held, before, after)
    report = write_report(run, result, page, subtitle=subtitle, commands=commands)
    facts = {"measured_on": parts.where, "codec": prior.codec_path}
    return settled(run, result, before=before, after=after, report=report, commands=commands, facts=facts)


def _commands(run: RunFolder, recipe: TrainPrior, prior: Prior) -> tuple[str, ...]:
    layout = prior.layout
    said = f' class="{layout.classes[0]}"' if layout.classes else ' prompt="…"' if layout.words else ""
    return (
        f"volvelle generate {run.path} count=16{said}",
        eval_command(run, recipe),
        f"volvelle draft {run.path} data={recipe.data} kind=mtp",
        f"volvelle export {run.path} to=hf",
    )
