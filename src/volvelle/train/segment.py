"""The recipe `train segment` from end to end: data, encoder, training, the best moment, figures on other pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volvelle.data.loader import Loader
from volvelle.data.masks import MaskFolder, find_pairs, read_masks
from volvelle.data.masks_augment import Augmentation, Augmented, Whole, collate_masks
from volvelle.errors import VolvelleError
from volvelle.files import write_atomic
from volvelle.inspect.memory_values import LARGEST
from volvelle.systems.segmentation.inference import Looks
from volvelle.systems.segmentation.load import segmenter, write_segmenter
from volvelle.systems.segmentation.model import Segmenter
from volvelle.train.estimate import MemoryEstimate, estimate_step
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer, say_first
from volvelle.train.outcome import Outcome, settled
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.segment import LookOptions, TrainSegment
from volvelle.train.scenes import data_path
from volvelle.train.segment_measure import Measured, measure
from volvelle.train.segment_objective import SegmentObjective
from volvelle.train.segment_report import write_report
from volvelle.train.sets import Sets, drawn_in_batches, part_into_sets
from volvelle.train.text_run import NUMBERS, choose_device, eval_command, resume_command
from volvelle.train.training import Ready, Stage, training


@training
def train_segment(recipe: TrainSegment, stage: Stage) -> Ready:
    """Train a segmenter and leave its best weights, metrics and a report with pictures in the run folder."""
    run, observer = stage.run, stage.observer
    sets = read_sets(recipe, data_path(recipe.data, run, observer, stage.ranks, seed=recipe.seed), observer)
    device, where = choose_device(recipe.device)
    seed_all(recipe.seed)
    model = build_model(recipe, sets.train).to(device)
    subtitle = _first_line(recipe, model, where, step_memory(recipe, model, sets.train, device))
    observer.say(subtitle)
    loader = training_loader(recipe, sets.train)
    objective = SegmentObjective(model, recipe, sets.train.frequency, selection=Whole(sets.selection))
    return Ready(objective, loader, lambda result: _close(recipe, stage, objective, sets, result, subtitle))


def read_sets(recipe: TrainSegment, folder: Path, observer: Observer) -> Sets[MaskFolder]:
    """Find and check all pictures. Raises VolvelleError for bad files, and where there are too few."""

    def read(root: str | Path, split: str | None, **more: Any) -> MaskFolder:
        found = read_masks(
            root,
            split=split,
            on_bad=recipe.on_bad,
            progress=lambda done, total: observer.work(f"checking {root}", done, total),
            **more,
        )
        observer.say(str(found) + (f" ({split})" if split else ""))
        say_first(observer, found.skipped)
        return found

    splits = find_pairs(folder)[1]
    train = read(folder, "train" if "train" in splits else None, classes=recipe.classes, void=recipe.void)
    observer.say(f"classes: {', '.join(train.labels.names)}" + _void(train))
    if len(train.labels) < 2:
        raise VolvelleError(
            f"{folder}: its masks hold one class, so there is nothing to tell apart",
            tip="give what is not of that class a number of its own, such as 0 for the background",
        )
    other = next((name for name in ("val", "test") if name in splits), None)
    test = None
    if recipe.held_out is not None:
        inner = find_pairs(Path(recipe.held_out))[1]
        held = next((name for name in ("val", "test") if name in inner), None)
        test = read(recipe.held_out, held, labels=train.labels), recipe.held_out
    elif other is not None and "train" in splits:
        test = read(folder, other, labels=train.labels), f"the {other} part of {folder.name}"
    return part_into_sets(train, test, share=recipe.selection_share, seed=recipe.seed)


def build_model(recipe: TrainSegment, train: MaskFolder) -> Segmenter:
    """The segmenter of the recipe, with the data's classes."""
    labels = train.labels
    return segmenter(
        recipe.model.build(),
        labels.names,
        backbone=recipe.backbone,
        weights=None if recipe.weights == "none" else recipe.weights,
        output_stride=recipe.output_stride,
        colours=labels.colours,
    )


def training_loader(recipe: TrainSegment, train: MaskFolder) -> Loader:
    """Batches of random crops."""
    scale = (recipe.scale[0], recipe.scale[1])
    augmentation = Augmentation(crop_size(recipe, train), scale, recipe.mirror, recipe.colour)
    return drawn_in_batches(recipe, Augmented(train, augmentation), collate_masks)


def crop_size(recipe: TrainSegment, train: MaskFolder) -> tuple[int, int]:
    """Height and width of training crops."""
    if tuple(recipe.crop) == (0, 0):
        image, _ = train[0]
        return image.height, image.width
    return recipe.crop[0], recipe.crop[1]


def step_memory(recipe: TrainSegment, model: Segmenter, train: MaskFolder, device: torch.device) -> MemoryEstimate:
    """What a step on a full batch of crops that show all classes takes on one of the recipe's ranks."""

    def network() -> Segmenter:
        return Segmenter(model.config)

    def loss(net: Segmenter, batch: Mapping[str, Tensor]) -> Tensor:
        return SegmentObjective(net, recipe, train.frequency).loss(batch, at=(0, 0, 0, 0)).value

    count, (high, wide) = min(recipe.batch, len(train)), crop_size(recipe, train)
    pixels = count * high * wide
    while high * wide > LARGEST:  # the plan follows the masks' values, of so many at most; the rest is alike
        high, wide = -(-high // 2), -(-wide // 2)
    planned = min(count, LARGEST // (high * wide))
    masks = torch.arange(planned * high * wide).view(planned, high, wide) // 4 % len(model.classes)
    found = estimate_step(
        network,
        {"images": torch.zeros(planned, 3, high, wide, dtype=torch.uint8), "masks": masks.to(torch.uint8)},
        loss=loss,
        options=recipe,
        device=device.type,
    )
    return replace(found, activations=found.activations * pixels // (planned * high * wide))


def looks_of(options: LookOptions) -> Looks:
    """The looks that the words describe."""
    window = None if tuple(options.window) == (0, 0) else (options.window[0], options.window[1])
    return Looks(tuple(options.scales), options.mirror, window)


def _void(folder: MaskFolder) -> str:
    return f"; left out as void: 255{''.join(f', {value}' for value in folder.labels.void)}"


def _first_line(recipe: TrainSegment, model: Segmenter, where: str, memory: MemoryEstimate) -> str:
    """What was decided: device, number format, encoder and decoder, what is trained, memory."""
    count = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for p in model.encoder.parameters())
    start = "random weights" if recipe.weights == "none" else f"{recipe.weights} weights"
    return (
        f"{where}; {NUMBERS[recipe.precision]}; {recipe.model.head} on {model.config.backbone} ({start}); "
        f"trains all {count:,} parameters, {count - inside:,} of them in the decoder; memory {memory}"
    )


def _close(
    recipe: TrainSegment,
    stage: Stage,
    objective: SegmentObjective,
    sets: Sets[MaskFolder],
    result: FitResult,
    subtitle: str,
) -> Outcome:
    """Save the best weights and measure them on pictures that nothing was chosen by, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    after: dict[str, float] = {}
    plain: Measured | None = None
    commands: tuple[str, ...] = (resume_command(run),)
    if not result.interrupted:
        objective.use_best()
        model = objective.model.eval()
        write_segmenter(model, run.path / "weights")
        write_atomic(run.path / "weights" / "labels.json", json.dumps(sets.train.labels.to_json()))
        observer.say(f"saved {run.path / 'weights'}; measuring on {sets.where}")
        plain, after = measured(model, Whole(sets.test), recipe, observer)
        commands = (f"volvelle predict {run.path} {sets.test.pairs[0][0]}", eval_command(run, recipe))
    report = write_report(
        run,
        result,
        objective.model,
        sets,
        found=plain,
        after=after,
        samples=recipe.samples,
        subtitle=subtitle,
        commands=commands,
    )
    facts = {"measured_on": sets.where}
    return settled(run, result, before={}, after=after, report=report, commands=commands, facts=facts)


def measured(
    model: Segmenter, pictures: Whole, recipe: TrainSegment, observer: Observer
) -> tuple[Measured, dict[str, float]]:
    """What one plain look finds, and the figures; with more looks also theirs, as `miou_of_looks` and so on."""

    def progress(done: int, total: int) -> None:
        observer.work("pictures", done, total)

    plain = measure(model, pictures, precision=recipe.precision, outlines=True, progress=progress)
    figures = dict(plain.metrics)
    if recipe.looks.many:
        looks = looks_of(recipe.looks)
        more = measure(model, pictures, looks=looks, precision=recipe.precision, progress=progress)
        figures |= {f"{name}_of_looks": more.metrics[name] for name in ("miou", "pixel_accuracy")}
        return more, figures
    return plain, figures
