"""The recipe `train classify` from end to end: pictures, network, training, figures, weights, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from volvelle.data.augment import View
from volvelle.data.images_labelled import Labelled, Prepared, Views, collate_labelled, read_labelled
from volvelle.data.images_prepare import Preprocessing
from volvelle.data.loader import Loader
from volvelle.data.text import OnBad
from volvelle.errors import VolvelleError
from volvelle.hub import ASSETS, fetch
from volvelle.runs import RunFolder
from volvelle.systems.backbone.config import AnyConfig
from volvelle.systems.backbone.load import backbone, build, read_backbone, write_backbone
from volvelle.systems.backbone.model import Backbone
from volvelle.train.classify_objective import ClassifyObjective, Measured, measure
from volvelle.train.classify_report import Page, write_report
from volvelle.train.estimate import MemoryEstimate, estimate_step
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer, say_first
from volvelle.train.outcome import Outcome, settled
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.classify import TrainClassify
from volvelle.train.sets import drawn_in_batches
from volvelle.train.text_run import NUMBERS, at_first, choose_device, eval_command, resume_command
from volvelle.train.training import Ready, Stage, training

SMALL = 64
"""Side in pixels at which pictures are seen that are no larger than that: a last map of 2 x 2."""


@dataclass(frozen=True)
class Sets:
    """Pictures to train on and pictures to measure on; `where` says what the latter are."""

    train: Labelled
    held: Labelled
    where: str


@training
def train_classify(recipe: TrainClassify, stage: Stage) -> Ready:
    """Train a classifier and leave its weights, metrics and a report with its worst misses in the run folder."""
    observer = stage.observer
    sets = read_sets(recipe, observer)
    device, where = choose_device(recipe.device)
    seed_all(recipe.seed)
    model = build_model(recipe, sets.train).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    held = held_loader(sets.held, model.preprocessing, recipe.batch)
    objective = ClassifyObjective(model, recipe, held=held)
    subtitle = _first_line(recipe, model, where, step_memory(recipe, model.config, len(sets.train), device))
    observer.say(subtitle)
    if recipe.batch == 1:
        observer.say("batch=1: batch normalisation keeps its running statistics, one picture has none of its own")
    loader = training_loader(recipe, sets.train, model.preprocessing)
    return Ready(objective, loader, lambda result: _close(recipe, stage, model, sets, result, subtitle))


def data_folder(data: str) -> Path:
    """The folder of that name, or of a data set that `volvelle get` knows."""
    return fetch(data) if data in ASSETS and not Path(data).exists() else Path(data)


def read_sets(recipe: TrainClassify, observer: Observer) -> Sets:
    """Find and check all pictures. Raises VolvelleError for bad files, one class only, and nothing to measure on."""
    train, held = read_labelled(data_folder(recipe.data), on_bad=recipe.on_bad)
    where = f"the part of {recipe.data} that is for that"
    if recipe.held_out is not None:
        read = read_labelled(data_folder(recipe.held_out), on_bad=recipe.on_bad, classes=train.classes)
        held, where = read[1] or read[0], recipe.held_out
    observer.say(f"{recipe.data}: {train}")
    say_first(observer, train.skipped)
    if held is None:
        train, held = train.split(recipe.held_out_share, recipe.seed)
        where = "pictures set aside before training"
    if not len(held):
        raise VolvelleError(f"{recipe.data}: a picture a class leaves none to measure on", tip="give held_out=FOLDER")
    shown = ", ".join(f"{name} {count:,}" for name, count in list(zip(train.classes, train.counts, strict=True))[:10])
    observer.say(f"trains on {shown}{' …' if len(train.classes) > 10 else ''}; measures on {len(held):,}: {where}")
    return Sets(train, held, where)


def build_model(recipe: TrainClassify, train: Labelled) -> Backbone:
    """The network of the recipe, for the data's classes and the pictures' size."""
    weights = None if recipe.weights == "none" else recipe.weights
    model = backbone(recipe.backbone, weights=weights, classes=train.classes)
    size = recipe.size or (SMALL if max(train[0][0].size) <= SMALL else model.preprocessing.size)
    # Small pictures have no border to spare.
    crop = 1.0 if size <= SMALL else model.preprocessing.crop
    model.config = replace(model.config, preprocessing=replace(model.preprocessing, size=size, crop=crop))
    return model


def training_loader(recipe: TrainClassify, train: Labelled, how: Preprocessing) -> Loader:
    """Batches of random views."""
    view = View((recipe.area[0], recipe.area[1]), recipe.mirror, recipe.colour)
    return drawn_in_batches(recipe, Views(train, how, view), collate_labelled)


def held_loader(held: Labelled, how: Preprocessing, batch: int) -> Loader:
    """The pictures in an order that is always the same and mixes the classes: its beginning is a fair sample."""
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = replace(held, order=[held.order[at] for at in order])
    return Loader(Prepared(mixed, how), batch, seed=0, collate=collate_labelled, shuffle=False)


def evaluate_run(path: Path, data: str, *, batch: int, on_bad: OnBad, observer: Observer) -> tuple[Backbone, Measured]:
    """Measure a finished run on a folder of pictures: its val or test part where it has one, else all of it."""
    run = RunFolder.open(path)
    model = open_run(path)
    train, held = read_labelled(data_folder(data), on_bad=on_bad, classes=model.classes)
    pictures = held or train
    observer.say(f"{data}: {pictures}")
    precision = run.config().get("precision", "fp32")
    loader = held_loader(pictures, model.preprocessing, batch)
    return model, measure(model, loader, precision=precision, progress=lambda d, n: observer.work("pictures", d, n))


def open_run(path: Path) -> Backbone:
    """The classifier of a finished run. Raises VolvelleError where it has no weights yet."""
    folder = path / "weights"
    if not (folder / "config.json").is_file():
        raise VolvelleError(f"{path}: the run has no weights yet", tip=f"volvelle resume {path}")
    return read_backbone(folder)


def step_memory(recipe: TrainClassify, config: AnyConfig, pictures: int, device: torch.device) -> MemoryEstimate:
    """What a step on a full batch of so many pictures takes on one of the recipe's ranks."""

    def network() -> Backbone:
        return ClassifyObjective(build(config), recipe).model  # with what freeze= leaves to train

    def loss(model: Backbone, batch: Mapping[str, Tensor]) -> Tensor:
        objective = ClassifyObjective(model, recipe)
        objective.train_mode()
        return objective.loss(batch).value

    size, count = config.preprocessing.size, min(recipe.batch, pictures)
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    return estimate_step(
        network,
        {"images": images, "labels": torch.zeros(count, dtype=torch.long)},
        loss=loss,
        options=recipe,
        device=device.type,
    )


def _first_line(recipe: TrainClassify, model: Backbone, where: str, memory: MemoryEstimate) -> str:
    """What was decided: device, number format, network and where it begins, what is trained, memory."""
    total = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start = "from scratch" if recipe.weights == "none" else f"{recipe.weights} weights"
    part = f"all {total:,} parameters" if learns == total else f"{learns:,} of {total:,} parameters"
    size = model.preprocessing.size
    head = f"{where}; {NUMBERS[recipe.precision]}; {model.config.name} at {size} px, {start}"
    return f"{head}; trains {part}; memory {memory}"


def _close(
    recipe: TrainClassify, stage: Stage, model: Backbone, sets: Sets, result: FitResult, subtitle: str
) -> Outcome:
    """Save the weights and measure them on every held-out picture, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    commands: tuple[str, ...] = (resume_command(run),)
    found: Measured | None = None
    loader = held_loader(sets.held, model.preprocessing, recipe.batch)
    if not result.interrupted:
        model.eval()
        write_backbone(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}; measuring on {sets.where}")
        found = measure(
            model, loader, precision=recipe.precision, progress=lambda d, n: observer.work("pictures", d, n)
        )
        picture = sets.held.source(0)
        shown = picture if Path(picture).is_file() else "PICTURE.jpg"
        commands = (f"volvelle predict {run.path} {shown}", eval_command(run, recipe))
    before, after = at_first(run), found.metrics if found else {}
    dataset = loader.dataset
    assert isinstance(dataset, Prepared)
    page = Page(model.classes, dataset.pictures, found, before, recipe.samples)
    report = write_report(run, result, page, subtitle=subtitle, commands=commands)
    facts = {"measured_on": sets.where}
    return settled(run, result, before=before, after=after, report=report, commands=commands, facts=facts)
