"""The recipe `train promptable` from end to end: data, model, training by simulated clicks, figures by clicks."""

from __future__ import annotations

from pathlib import Path

from volvelle.data.loader import Loader
from volvelle.data.masks_augment import Augmentation
from volvelle.data.promptable import ObjectFolder, read_objects
from volvelle.data.promptable_views import ObjectViews, collate_objects
from volvelle.errors import UsageError, VolvelleError
from volvelle.runs import RunFolder
from volvelle.systems.segmentation.sam.config import Light, find_config
from volvelle.systems.segmentation.sam.load import load_sam, sam, write_sam
from volvelle.systems.segmentation.sam.model import Sam
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer, say_first
from volvelle.train.outcome import Outcome, settled
from volvelle.train.promptable_measure import Measured, measure
from volvelle.train.promptable_objective import PromptObjective
from volvelle.train.promptable_report import write_report
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.promptable import TrainPromptable
from volvelle.train.scenes import data_path
from volvelle.train.sets import Sets, drawn_in_batches, held_part, own_test, part_into_sets
from volvelle.train.text_run import NUMBERS, choose_device, eval_command, resume_command
from volvelle.train.training import Ready, Stage, training


@training
def train_promptable(recipe: TrainPromptable, stage: Stage) -> Ready:
    """Train Segment Anything and leave its best weights, metrics and a report with pictures in the run folder."""
    run, observer = stage.run, stage.observer
    sets = read_sets(recipe, data_path(recipe.data, run, observer, stage.ranks, seed=recipe.seed), observer)
    device, where = choose_device(recipe.device)
    seed_all(recipe.seed)
    model = build_model(recipe).to(device)
    subtitle = _first_line(recipe, model, where)
    observer.say(subtitle)
    objective = PromptObjective(
        model, recipe, selection=sets.selection, classes=len(sets.train.classes) if sets.train.parted else None
    )
    loader = training_loader(recipe, sets.train)
    return Ready(objective, loader, lambda result: _close(recipe, stage, objective, sets, result, subtitle))


def read_sets(recipe: TrainPromptable, path: Path, observer: Observer) -> Sets[ObjectFolder]:
    """Find and check all pictures. Raises VolvelleError for bad files, and where pictures or objects are too few."""
    splits = read_parts(recipe, path, observer)
    train = splits.get("train") or next(iter(splits.values()))
    test = own_test(splits, path)
    if recipe.held_out is not None:
        test = held_part(read_parts(recipe, Path(recipe.held_out), observer)), recipe.held_out
    sets = part_into_sets(train, test, share=recipe.selection_share, seed=recipe.seed)
    for part, what in ((sets.train, "to train on"), (sets.selection, "to choose by"), (sets.test, "to measure on")):
        if len(part) and not sum(part.counts):
            raise VolvelleError(
                f"{part.folder}: no object in the {len(part):,} pictures {what}",
                tip="another seed= parts the pictures in another way; held_out=FOLDER has others to measure on",
            )
    return sets


def read_parts(recipe: TrainPromptable, path: Path, observer: Observer) -> dict[str, ObjectFolder]:
    """The splits of a folder or file, with what there is to say of them."""
    splits = read_objects(
        path, least=recipe.least, numbers=recipe.numbers, on_bad=recipe.on_bad, progress=observer.work
    )
    for split, found in splits.items():
        observer.say(str(found) + (f" ({split})" if split else ""))
        say_first(observer, found.skipped)
    return splits


def build_model(recipe: TrainPromptable) -> Sam:
    """The model of the recipe, in training mode."""
    config = find_config(recipe.model, recipe.size)
    if recipe.weights == "none":
        return sam(config).train()
    if recipe.weights == "imagenet":
        if not isinstance(config.encoder, Light):
            raise UsageError(
                f"weights=imagenet: {recipe.model} has none here",
                tip="weights=FILE of Segment Anything's, or weights=none",
            )
        return sam(config, weights="imagenet").train()
    model = load_sam(recipe.weights)
    if (model.config.encoder, model.config.size) != (config.encoder, config.size):
        raise UsageError(
            f"weights={recipe.weights}: is {model.config.name} at {model.config.size} pixels, "
            f"and the recipe says {recipe.model} at {recipe.size}",
            tip=f"model={model.config.name} size={model.config.size}",
        )
    return model.train()


def training_loader(recipe: TrainPromptable, train: ObjectFolder) -> Loader:
    """Batches of random crops."""
    scale = (recipe.scale[0], recipe.scale[1])
    augmentation = Augmentation(recipe.crop_size, scale, recipe.mirror, recipe.colour)
    views = ObjectViews(
        train,
        augmentation,
        side=recipe.size,
        prompts=recipe.prompts,
        least=recipe.least,
        central=recipe.central,
    )
    return drawn_in_batches(recipe, views, collate_objects)


def _first_line(recipe: TrainPromptable, model: Sam, where: str) -> str:
    """What was decided: device, number format, model and where it begins, what is trained."""
    count = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in model.image_encoder.parameters())
    start = "random weights" if recipe.weights == "none" else f"{recipe.weights} weights"
    high, wide = recipe.crop_size
    return (
        f"{where}; {NUMBERS[recipe.precision]}; {recipe.model} at {recipe.size} px ({start}), crops {high} x {wide}; "
        f"trains all {count:,} parameters, {count - inside:,} of them behind the image encoder"
    )


def _predict_command(run: RunFolder, test: ObjectFolder, found: Measured) -> str:
    """A click on the first object that was measured; everything, where all objects turned out to be void."""
    if not found.objects:
        return f"volvelle predict {run.path} {test.files[0]} everything=true"
    first = found.objects[0]
    return f"volvelle predict {run.path} {test.files[first.picture]} points={first.clicks[0].x},{first.clicks[0].y}"


def _close(
    recipe: TrainPromptable,
    stage: Stage,
    objective: PromptObjective,
    sets: Sets[ObjectFolder],
    result: FitResult,
    subtitle: str,
) -> Outcome:
    """Save the best weights and measure them on pictures that nothing was chosen by, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    found: Measured | None = None
    commands: tuple[str, ...] = (resume_command(run),)
    if not result.interrupted:
        objective.use_best()
        model = objective.model.eval()
        write_sam(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}; measuring on {sets.where}")
        found = measure(
            model,
            sets.test,
            clicks=recipe.clicks,
            more=True,
            precision=recipe.precision,
            progress=lambda done, total: observer.work("pictures", done, total),
        )
        commands = (_predict_command(run, sets.test, found), eval_command(run, recipe))
    report = write_report(
        run, result, objective.model, sets, found=found, samples=recipe.samples, subtitle=subtitle, commands=commands
    )
    facts = {"measured_on": sets.where}
    after = found.metrics if found else {}
    return settled(run, result, before={}, after=after, report=report, commands=commands, facts=facts)
