"""The recipe `train vqgan` from end to end: pictures, codec, its first codes, training, figures, weights, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from volvelle.data.loader import Loader
from volvelle.data.pictures import Channels, Framing, PictureSet, Views, collate_pictures, read_pictures, to_signed
from volvelle.data.text import OnBad
from volvelle.errors import UsageError
from volvelle.parts.quantization.kmeans import kmeans
from volvelle.runs import RunFolder
from volvelle.systems.generation.discriminator import PatchDiscriminator
from volvelle.systems.generation.load import load_vqgan, vqgan, write_vqgan
from volvelle.systems.generation.perceptual import Perceptual
from volvelle.systems.generation.vqgan_model import VQGAN
from volvelle.systems.modes import evaluating
from volvelle.train.classify import data_folder
from volvelle.train.estimate import MemoryEstimate, estimate_step
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, settled
from volvelle.train.picture_sets import PictureParts, read_picture_parts
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.vqgan import SIDE, TrainVQGAN
from volvelle.train.sets import drawn_in_batches
from volvelle.train.text_run import NUMBERS, at_first, choose_device, eval_command, resume_command
from volvelle.train.training import Ready, Stage, training
from volvelle.train.vqgan_measure import Measured, measure
from volvelle.train.vqgan_objective import VQGANObjective
from volvelle.train.vqgan_report import Page, keep_sheet, write_report

PER_CODE = 32
"""Vectors for each code from which k-means begins the codebook, where the data has as many."""
MOST = 1 << 16
"""The most vectors for that."""


@training
def train_vqgan(recipe: TrainVQGAN, stage: Stage) -> Ready:
    """Train an image codec and leave its weights, metrics and a report with reconstructions in the run folder."""
    run, observer = stage.run, stage.observer
    parts = read_picture_parts(recipe, run, observer, stage.ranks)
    device, where = choose_device(recipe.device)
    seed_all(recipe.seed)
    model = build_model(recipe, parts.train).to(device)
    judges = build_judges(recipe, model, device)
    subtitle = _first_line(recipe, model, where, step_memory(recipe, model, device))
    observer.say(subtitle)
    observer.say(f"measures on {len(parts.held):,} pictures: {parts.where}")
    loader = training_loader(recipe, parts.train, model)
    if recipe.start is None:
        begin_codebook(model, loader, recipe.seed, observer)
    objective = VQGANObjective(
        model,
        recipe,
        discriminator=judges[0],
        perceptual=judges[1],
        look=_look(recipe, run, model, parts, judges[1]),
    )
    return Ready(objective, loader, lambda result: _close(recipe, stage, objective, parts, result, subtitle))


def build_model(recipe: TrainVQGAN, train: PictureSet) -> VQGAN:
    """The codec of the recipe, for the data's channels and size. Raises UsageError where a given one does not fit."""
    channels = recipe.channels or train.channels
    if recipe.start is not None:
        model = load_vqgan(recipe.start)
        if model.channels != (recipe.channels or model.channels):
            raise UsageError(
                f"{recipe.start}: takes {model.channels} channels, channels={recipe.channels} were asked for"
            )
        size = fitting_size(recipe.size or model.size, model.factor, asked=recipe.size is not None)
        model.config = replace(model.config, size=size)
        return model.train()
    levels = recipe.model.levels(recipe.size or min(train.side, SIDE))
    size = fitting_size(recipe.size or min(train.side, SIDE), 2 ** (len(levels) - 1), asked=recipe.size is not None)
    return vqgan(replace(recipe.model, multipliers=levels).build(channels, size)).train()


def fitting_size(size: int, factor: int, *, asked: bool) -> int:
    """The nearest multiple of `factor`, at least two codes; UsageError where another size was asked for.

    >>> fitting_size(50, 4, asked=False), fitting_size(3, 4, asked=False)
    (52, 8)
    """
    if size % factor and asked:
        near = max(factor, round(size / factor) * factor)
        raise UsageError(f"size={size}: must be a multiple of the {factor} pixels a code", tip=f"size={near}")
    return size if size % factor == 0 else max(2, -(-size // factor)) * factor


def build_judges(
    recipe: TrainVQGAN, model: VQGAN, device: torch.device
) -> tuple[PatchDiscriminator | None, Perceptual | None]:
    """The discriminator and the perceptual distance, where they have a weight."""
    adversary, loss = recipe.adversary, recipe.loss
    discriminator = perceptual = None
    if adversary.weight:
        discriminator = PatchDiscriminator(model.channels, width=adversary.width, layers=adversary.layers).to(device)
    if loss.perceptual:
        perceptual = Perceptual(least=loss.least).to(device)
    return discriminator, perceptual


def training_loader(recipe: TrainVQGAN, train: PictureSet, model: VQGAN) -> Loader:
    """Seeded batches of views."""
    channels: Channels = 1 if model.channels == 1 else 3
    framing = Framing(model.size, channels, (recipe.zoom[0], recipe.zoom[1]), recipe.mirror)
    return drawn_in_batches(recipe, Views(train, framing), collate_pictures)


@torch.no_grad()
def begin_codebook(model: VQGAN, loader: Loader, seed: int, observer: Observer) -> None:
    """Put the codes where a fresh encoder's vectors are, by k-means. Raises UsageError for more codes than vectors."""
    codes, found, count = model.vocabulary, list[Tensor](), 0
    enough = min(MOST, PER_CODE * codes) if codes < MOST else codes
    with evaluating(model):
        for ids in loader.plan(0):
            pixels = to_signed(loader.load(ids)["images"]).to(model.quant_conv.weight.device)
            found.append(model.latents(pixels).movedim(1, -1).flatten(0, -2))
            count += len(found[-1])
            if count >= enough:
                break
    if count < codes:
        raise UsageError(
            f"model.codes={codes}: the pictures to train on give {count} vectors in all, fewer than there are codes",
            tip=f"model.codes={2 ** max(0, (count // 4).bit_length() - 1)}, or more pictures",
        )
    vectors = torch.cat(found).float()
    observer.say(f"codebook: {codes:,} codes begin as means of {len(vectors):,} vectors")
    model.quantize.start_from(kmeans(vectors, codes, generator=torch.Generator().manual_seed(seed)))


def evaluate_run(path: Path, data: str, *, batch: int, on_bad: OnBad, observer: Observer) -> Measured:
    """Measure a codec, of a run or of any file, on a folder of pictures: its val or test part, else all of it."""
    model = load_vqgan(path)
    train, held = read_pictures(data_folder(data), on_bad=on_bad)
    pictures = held or train
    observer.say(f"{data}: {pictures}, as squares of {model.size} pixels")
    return measure(
        model, pictures, batch=batch, perceptual=Perceptual(), progress=lambda d, n: observer.work("pictures", d, n)
    )


def step_memory(recipe: TrainVQGAN, model: VQGAN, device: torch.device) -> MemoryEstimate:
    """What the codec's step takes, with its losses of pixels and the perceptual distance, on one rank."""
    distance = Perceptual(None, least=recipe.loss.least) if recipe.loss.perceptual else None
    plain = replace(recipe, adversary=replace(recipe.adversary, weight=0.0))

    def loss(net: VQGAN, batch: Mapping[str, Tensor]) -> Tensor:
        return VQGANObjective(net, plain, perceptual=distance).loss(batch).value

    images = torch.zeros(recipe.batch, model.channels, model.size, model.size, dtype=torch.uint8)
    return estimate_step(
        lambda: VQGAN(model.config).train(), {"images": images}, loss=loss, options=recipe, device=device.type
    )


def _look(
    recipe: TrainVQGAN, run: RunFolder, model: VQGAN, parts: PictureParts, distance: Perceptual | None
) -> Callable[[int], Mapping[str, float]]:
    """What evaluations do: figures of some held-out pictures, and a sheet of others with their reconstructions."""

    def look(step: int) -> Mapping[str, float]:
        keep_sheet(run, step, model, parts.held, recipe.samples)
        return measure(model, parts.held, batch=recipe.batch, perceptual=distance, limit=recipe.held_out_size).metrics

    return look


def _first_line(recipe: TrainVQGAN, model: VQGAN, where: str, memory: MemoryEstimate) -> str:
    """What was decided: device, number format, the codec and its grid, what judges it, memory."""
    config, count = model.config, sum(p.numel() for p in model.parameters())
    grid = model.size // model.factor
    colour = "grey" if model.channels == 1 else "colour"
    judges = [f"{recipe.loss.pixels} of pixels"]
    judges += ["perceptual distance"] if recipe.loss.perceptual else []
    judges += [f"{recipe.adversary.loss} adversary"] if recipe.adversary.weight else []
    return (
        f"{where}; {NUMBERS[recipe.precision]}; {model.size} x {model.size} pixels in {colour} as {grid} x {grid} codes"
        f" of {config.codes:,}; trains {count:,} parameters by {', '.join(judges)}; memory {memory}"
    )


def _close(
    recipe: TrainVQGAN, stage: Stage, objective: VQGANObjective, parts: PictureParts, result: FitResult, subtitle: str
) -> Outcome:
    """Save the weights and measure them on every held-out picture, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    model, commands = objective.model.eval(), (resume_command(run),)
    found: Measured | None = None
    if not result.interrupted:
        write_vqgan(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}; measuring on {parts.where}")
        distance = objective.perceptual
        found = measure(
            model, parts.held, batch=64, perceptual=distance, progress=lambda d, n: observer.work("pictures", d, n)
        )
        commands = (f"volvelle train prior data={recipe.data} codec={run.path}", eval_command(run, recipe))
    before, after = at_first(run), found.metrics if found else {}
    page = Page(model, parts, found, before, recipe.samples)
    report = write_report(run, result, page, subtitle=subtitle, commands=commands)
    facts = {"measured_on": parts.where}
    return settled(run, result, before=before, after=after, report=report, commands=commands, facts=facts)
