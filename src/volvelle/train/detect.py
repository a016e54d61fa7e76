"""The recipe `train detect` from end to end: data, anchors, detector, training, figures on other pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from volvelle.data.boxes import BoxFolder, read_boxes
from volvelle.data.boxes_anchors import best_overlap, suggest_anchors
from volvelle.data.boxes_augment import BoxAugmentation, Fit, Fitted, Views, collate_views
from volvelle.data.loader import Loader
from volvelle.errors import VolvelleError
from volvelle.systems.detection.config import DetectorConfig
from volvelle.systems.detection.load import blank_detector, detector, is_detector, write_detector
from volvelle.systems.detection.model import Detector
from volvelle.systems.detection.names import named
from volvelle.systems.detection.proposer import Proposed
from volvelle.systems.detection.targets import Regions
from volvelle.train.detect_measure import UNSURE, Measured, measure
from volvelle.train.detect_objective import DetectObjective
from volvelle.train.detect_report import Page, write_report
from volvelle.train.estimate import MemoryEstimate, estimate_step
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer, say_first
from volvelle.train.outcome import Outcome, settled
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.detect import TrainDetect
from volvelle.train.scenes import data_path
from volvelle.train.sets import Sets, drawn_in_batches, held_part, own_test, part_into_sets
from volvelle.train.text_run import NUMBERS, choose_device, eval_command, resume_command
from volvelle.train.training import Ready, Stage, training


@training
def train_detect(recipe: TrainDetect, stage: Stage) -> Ready:
    """Train a detector and leave its weights, metrics and a report with pictures in the run folder."""
    run, observer = stage.run, stage.observer
    sets = read_sets(recipe, data_path(recipe.data, run, observer, stage.ranks, seed=recipe.seed), observer)
    device, where = choose_device(recipe.device)
    seed_all(recipe.seed)
    model = build_model(recipe, sets.train, observer).to(device)
    subtitle = _first_line(recipe, model, where, step_memory(recipe, model.config, sets.train, device))
    observer.say(subtitle)
    selection = Fitted(sets.selection, fit_of(recipe)) if len(sets.selection) else None
    objective = DetectObjective(model, recipe, selection=selection)
    loader = training_loader(recipe, sets.train)
    return Ready(objective, loader, lambda result: _close(recipe, stage, objective, sets, result, subtitle))


def read_sets(recipe: TrainDetect, path: Path, observer: Observer) -> Sets[BoxFolder]:
    """Find and check all pictures. Raises VolvelleError for bad files, and where there are too few."""
    splits = read_parts(path, recipe, observer)
    train = splits.get("train") or next(iter(splits.values()))
    counts = ", ".join(f"{name} {count:,}" for name, count in zip(train.classes, train.counts, strict=True))
    observer.say(f"boxes to learn from: {counts}")
    if not sum(train.counts):
        raise VolvelleError(f"{path}: the pictures to train on have no box, so there is nothing to learn")
    test = own_test(splits, path)
    if recipe.held_out is not None:
        held = read_parts(Path(recipe.held_out), replace(recipe, classes=train.classes), observer)
        test = held_part(held), recipe.held_out
    return part_into_sets(train, test, share=recipe.selection_share, seed=recipe.seed)


def read_parts(path: Path, recipe: TrainDetect, observer: Observer) -> dict[str, BoxFolder]:
    """The splits of a folder or file, with what there is to say of them."""
    splits = read_boxes(
        path,
        classes=recipe.classes,
        on_bad=recipe.on_bad,
        progress=lambda done, total: observer.work(f"checking {path}", done, total),
    )
    for split, found in splits.items():
        observer.say(str(found) + (f" ({split})" if split else ""))
        say_first(observer, found.skipped)
        say_first(observer, found.remarks, "")
    return splits


def build_model(recipe: TrainDetect, train: BoxFolder, observer: Observer) -> Detector:
    """The detector of the recipe, for the data's classes, with anchors from its boxes."""
    config = named(recipe.model, train.classes)
    config = replace(config, size=recipe.size, stretch=recipe.stretch, deformable=recipe.deformable)
    if recipe.stride == 8:
        config = replace(config, composition=replace(config.composition, maps=3))
    if recipe.anchors:
        view = fit_of(recipe)
        shapes = suggest_anchors(train, view, recipe.anchors, seed=recipe.seed)
        words = " ".join(f"{width:.0f}x{height:.0f}" for width, height in shapes.tolist())
        overlap = best_overlap(train, view, shapes)
        observer.say(f"anchors from the boxes: {words}; the best one of each box has a mean IoU of {overlap:.2f}")
        config = config.with_anchors([(width, height) for width, height in shapes.tolist()])
    return detector(config, weights=_start(recipe.weights))


def _start(weights: str) -> str | Path | None:
    """What a detector begins with: nothing, the backbone's weights, or a detector: its folder or its run."""
    inside = Path(weights) / "weights"
    return None if weights == "none" else inside if is_detector(inside) else weights


def fit_of(recipe: TrainDetect) -> Fit:
    """How the recipe brings pictures to the detector's size."""
    return Fit(recipe.size, recipe.stretch)


def training_loader(recipe: TrainDetect, train: BoxFolder) -> Loader:
    """Batches of random views."""
    crop = (recipe.crop[0], recipe.crop[1])
    augmentation = BoxAugmentation(crop, recipe.mirror, recipe.upside_down, recipe.colour)
    return drawn_in_batches(recipe, Views(train, fit_of(recipe), augmentation), collate_views)


def step_memory(recipe: TrainDetect, config: DetectorConfig, train: BoxFolder, device: torch.device) -> MemoryEstimate:
    """What a step takes on one of the recipe's ranks: a full batch, as large as it is drawn, of as many regions and
    objects as there can be in each picture.
    """
    recipe = replace(recipe, multi_scale=(max(recipe.multi_scale),))
    count, most = min(recipe.batch, len(train)), max(1, *(len(one.labels) for one in train.boxes))
    batch = {
        "images": torch.zeros(count, 3, recipe.size, recipe.size, dtype=torch.uint8),
        "sizes": torch.full((count, 2), recipe.size),
        "boxes": torch.tensor([0.0, 0.0, 8.0, 8.0]).repeat(count, most, 1),
        "labels": torch.zeros(count, most, dtype=torch.int64),
        "ignored": torch.zeros(count, most, dtype=torch.bool),
    }

    def network() -> Detector:
        model = blank_detector(config)
        model.proposer.propose = _every_region  # pyright: ignore[reportAttributeAccessIssue]
        return model

    def loss(model: Detector, batch: Mapping[str, Tensor]) -> Tensor:
        lists = {name: list(batch[name]) for name in ("boxes", "labels", "ignored")}
        return DetectObjective(model, recipe).loss({**batch, **lists}).value

    return estimate_step(network, batch, loss=loss, options=recipe, device=device.type)


def _every_region(found: Proposed, sizes: Tensor, count: int) -> Regions:
    """As many regions as can be proposed: how many suppression leaves is known with the pictures alone."""
    b, n = len(sizes), min(count, found.objectness.shape[1])
    scores = found.objectness.new_zeros(b, n)
    return Regions(scores.new_zeros(b, n, 4), scores, scores.new_ones((b, n), dtype=torch.bool))


def _first_line(recipe: TrainDetect, model: Detector, where: str, memory: MemoryEstimate) -> str:
    """What was decided: device, number format, detector and where it begins, what is trained, memory."""
    count = sum(p.numel() for p in model.parameters())
    start = "random weights" if recipe.weights == "none" else f"{recipe.weights} weights"
    shape = f"{recipe.size} x {recipe.size} px" if recipe.stretch else f"longer side {recipe.size} px"
    return (
        f"{where}; {NUMBERS[recipe.precision]}; {recipe.model} at {shape} ({start}); "
        f"trains all {count:,} parameters; memory {memory}"
    )


def _close(
    recipe: TrainDetect,
    stage: Stage,
    objective: DetectObjective,
    sets: Sets[BoxFolder],
    result: FitResult,
    subtitle: str,
) -> Outcome:
    """Save the weights and measure them on pictures that nothing was chosen by, unless the run was interrupted."""
    run, observer = stage.run, stage.observer
    found: Measured | None = None
    trusted = UNSURE
    commands: tuple[str, ...] = (resume_command(run),)
    if not result.interrupted:
        objective.use_best()
        model, view = objective.model.eval(), fit_of(recipe)
        write_detector(model, run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}; measuring on {sets.where}")
        if len(sets.selection):
            trusted = measure(model, Fitted(sets.selection, view), precision=recipe.precision).trusted
        found = measure(
            model,
            Fitted(sets.test, view),
            precision=recipe.precision,
            progress=lambda done, total: observer.work("pictures", done, total),
        )
        commands = (f"volvelle predict {run.path} {sets.test.files[0]}", eval_command(run, recipe))
    page = Page(objective.model.classes, sets.test, sets.where, found, trusted, recipe.samples)
    report = write_report(run, result, page, subtitle=subtitle, commands=commands)
    facts = {"measured_on": sets.where, "trusted": trusted}
    after = found.metrics if found else {}
    return settled(run, result, before={}, after=after, report=report, commands=commands, facts=facts)
