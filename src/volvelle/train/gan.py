"""The recipe `train gan` from end to end: pictures, two players, sheets of samples, figures, weights, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from volvelle.data.pictures import Framing, PictureSet, Views, collate_pictures, read_pictures, to_bytes, to_signed
from volvelle.data.sheet import sheet
from volvelle.data.text import OnBad
from volvelle.errors import VolvelleError
from volvelle.files import atomic_path
from volvelle.parts.transport.certified import Lipschitz, certified_w1
from volvelle.parts.transport.optimal_transport import wasserstein_distance
from volvelle.runs import RunFolder
from volvelle.systems.generation.extractor import Extractor, open_extractor
from volvelle.systems.generation.gan import GAN, read_gan, write_gan
from volvelle.train.classify import data_folder
from volvelle.train.estimate import MemoryEstimate, estimate_step
from volvelle.train.gan_constraints import Clipped, Constraint, FlatOnData, Slope
from volvelle.train.gan_objective import Game, GANObjective
from volvelle.train.gan_report import SAMPLES, write_report
from volvelle.train.loop import FitResult
from volvelle.train.observer import Observer
from volvelle.train.outcome import Outcome, settled
from volvelle.train.phase import adamw
from volvelle.train.picture_sets import few, read_picture_parts
from volvelle.train.random_state import seed_all
from volvelle.train.recipes.gan import TrainGAN
from volvelle.train.samples_measure import compared, features_of
from volvelle.train.schedule import schedule
from volvelle.train.sets import drawn_in_batches
from volvelle.train.text_run import NUMBERS, at_first, choose_device, eval_command, resume_command
from volvelle.train.training import Ready, Stage, training

LARGEST = 64
"""Side in pixels that larger pictures are generated at, unless the recipe says otherwise."""
PAIRS = 256
"""Pictures on each side of the exact distance that evaluations measure."""
SIDE = 56
"""The least side of a picture on a sheet, in pixels."""


@training
def train_gan(recipe: TrainGAN, stage: Stage) -> Ready:
    """Train a generator and leave its weights, sheets of samples, figures and a report in the run folder."""
    run, observer = stage.run, stage.observer
    parts = read_picture_parts(recipe, run, observer, stage.ranks)
    framing = framing_of(recipe, parts.train)
    device, where = choose_device(recipe.device)
    extractor = open_extractor(recipe.extractor, size=framing.size)  # before hours of training, not after
    seed_all(recipe.seed)
    model = GAN(recipe.config(framing.size, framing.channels)).to(device)
    look = Look(model, few(parts.held, PAIRS), framing, recipe.samples, run.path / SAMPLES)
    objective = objective_of(recipe, model, look)
    subtitle = _first_line(recipe, model, where, step_memory(recipe, model, len(parts.train), device))
    observer.say(subtitle)
    loader = drawn_in_batches(recipe, Views(parts.train, framing), collate_pictures)

    def measure() -> dict[str, float]:
        write_gan(model.eval(), run.path / "weights")
        observer.say(f"saved {run.path / 'weights'}; measuring samples beside {parts.where}")
        return measured(model, few(parts.held, recipe.held_out_size), parts.train, framing, extractor)

    return Ready(objective, loader, lambda result: _close(recipe, run, result, measure, subtitle, parts.where))


def framing_of(recipe: TrainGAN, pictures: PictureSet) -> Framing:
    """How pictures become squares of the size that is generated."""
    size = recipe.size or min(LARGEST, max(8, pictures.side))
    return Framing(size, recipe.channels or pictures.channels, zoom=recipe.zoom, mirror=recipe.mirror)


def objective_of(recipe: TrainGAN, model: GAN, look: Callable[[int], Mapping[str, float]] | None) -> GANObjective:
    """The two players by the rules of the recipe."""
    device, betas = next(model.parameters()).device, (recipe.betas[0], recipe.betas[1])
    return GANObjective(
        model.generator,
        model.critic,
        Game(recipe.loss, constraint_of(recipe), recipe.turns),
        optimizers=(adamw(recipe, betas=betas), adamw(recipe, share=lambda name: recipe.critic_rate, betas=betas)),
        latents=model.latents,
        real=lambda batch: to_signed(batch["images"]).to(device),
        look=look,
        schedule=lambda steps: schedule(recipe.schedule, steps, recipe.warmup),
        clip=recipe.clip,
    )


def constraint_of(recipe: TrainGAN) -> Constraint:
    """The constraint that the recipe's words describe."""
    kind, weight = recipe.penalty_kind, recipe.penalty.weight
    if kind in ("gradient", "one-sided"):
        return Slope(weight or 10.0, one_sided=kind == "one-sided")
    if kind == "r1":
        return FlatOnData(weight or 1.0)
    return Clipped(recipe.penalty.bound) if kind == "clip" else Constraint()


def step_memory(recipe: TrainGAN, model: GAN, pictures: int, device: torch.device) -> MemoryEstimate:
    """What a step takes on one rank: both players' weights and optimisers, and the larger turn of the two."""
    config = model.config
    shape = (min(recipe.batch, pictures), config.channels, config.size, config.size)
    images = {"images": torch.zeros(shape, dtype=torch.uint8)}

    def turn(plays: Literal["generator", "critic"]) -> MemoryEstimate:
        def build() -> GAN:
            fresh = GAN(config).train()
            fresh.requires_grad_(False).get_submodule(plays).requires_grad_(True)
            return fresh

        def loss(net: GAN, batch: Mapping[str, Tensor]) -> Tensor:
            both = objective_of(recipe, net, None)
            return (both.fool(batch) if plays == "generator" else both.judge(batch)).value

        return estimate_step(build, images, loss=loss, options=recipe, device=device.type)

    one, two = turn("generator"), turn("critic")
    return MemoryEstimate(
        weights=one.weights,
        gradients=max(one.gradients, two.gradients),
        optimizer=one.optimizer + two.optimizer,
        activations=max(one.activations, two.activations),
        communication=max(one.communication, two.communication),
    )


@dataclass(frozen=True)
class Look:
    """What evaluations see: a sheet of samples of the same latent numbers every time, and exact distances in pixels."""

    model: GAN
    held: PictureSet
    framing: Framing
    samples: int
    folder: Path

    def __call__(self, step: int) -> dict[str, float]:
        """Write step-N.png. `w1_pixels` is the exact W_1 of as many samples as held-out pictures, `certified_w1` the
        lower bound that a critic of known slope proves.
        """
        draw = torch.Generator().manual_seed(0)
        pictures = self.model.sample(max(self.samples, len(self.held)), generator=draw).cpu()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / f"step-{step:06d}.png") as temporary:
            sheet(to_bytes(pictures[: self.samples]), least=SIDE).save(temporary, format="PNG")
        real, fake = pixels_of(self.held, self.framing), pictures[: len(self.held)]
        if not torch.isfinite(fake).all():
            return {}
        figures = {"w1_pixels": float(wasserstein_distance(real, fake))}
        if isinstance(self.model.critic, Lipschitz):
            device = next(self.model.parameters()).device
            figures["certified_w1"] = certified_w1(self.model.critic, real.to(device), fake.to(device))
        return figures


def measured(
    model: GAN, held: PictureSet, other: PictureSet | None, framing: Framing, extractor: Extractor
) -> dict[str, float]:
    """Fréchet distance beside its floor, precision and recall, of as many samples as there are held-out pictures."""
    fake = features_of(model.sample(len(held), generator=torch.Generator().manual_seed(1)), extractor)
    more = None if other is None else features_of(pixels_of(few(other, len(held)), framing), extractor)
    return compared(features_of(pixels_of(held, framing), extractor), fake, more, extractor.name)


def pixels_of(pictures: PictureSet, framing: Framing) -> Tensor:
    """The middles of all pictures, fp32 (n, c, size, size) in [-1, 1]."""
    return to_signed(torch.stack([framing.middle(pictures[i]) for i in range(len(pictures))]))


def open_run(path: Path) -> GAN:
    """The networks of a finished run. Raises VolvelleError where it has no weights yet."""
    if not (path / "weights" / "config.json").is_file():
        raise VolvelleError(f"{path}: the run has no weights yet", tip=f"volvelle resume {path}")
    return read_gan(path / "weights")


def evaluate_run(
    path: Path, data: str, *, extractor: str | None, most: int, on_bad: OnBad, observer: Observer
) -> dict[str, float]:
    """Measure a finished run on a folder of pictures: its val or test part where it has one, else all of it."""
    run, model = RunFolder.open(path), open_run(path)
    train, held = read_pictures(data_folder(data), on_bad=on_bad)
    pictures, other = (train, None) if held is None else (held, train)
    observer.say(f"{data}: {pictures}")
    config = model.config
    framing = Framing(config.size, config.channels)  # pyright: ignore[reportArgumentType]
    name = extractor or str(run.config().get("extractor"))
    return measured(model, few(pictures, most), other, framing, open_extractor(name, size=config.size))


def _first_line(recipe: TrainGAN, model: GAN, where: str, memory: MemoryEstimate) -> str:
    """What was decided: device, number format, networks, the game and its constraint, memory."""
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.generator, model.critic)]
    config = model.config
    held = recipe.penalty_kind if recipe.penalty_kind != "none" else f"{recipe.norm} norm"
    if recipe.critic.kind == "orthogonal":
        held = "orthogonal layers" + ("" if recipe.penalty_kind == "none" else f", {held}")
    turns = f", the critic {recipe.turns} times a step" if recipe.turns > 1 else ""
    colour = "grey" if config.channels == 1 else "colour"
    return (
        f"{where}; {NUMBERS[recipe.precision]}; {config.size} x {config.size} {colour}; trains a generator "
        f"({recipe.generator.kind}, {counts[0]:,}) against a critic ({recipe.critic.kind}, {counts[1]:,}): "
        f"{recipe.loss}, held by {held}{turns}; memory {memory}"
    )


def _close(
    recipe: TrainGAN,
    run: RunFolder,
    result: FitResult,
    measure: Callable[[], dict[str, float]],
    subtitle: str,
    where: str,
) -> Outcome:
    """Save and measure, unless the run was interrupted, and write the report."""
    commands: tuple[str, ...] = (resume_command(run),)
    before, after = at_first(run), {}
    if not result.interrupted:
        after = measure() | result.held_out
        commands = (f"volvelle generate {run.path} count=16", eval_command(run, recipe))
    report = write_report(run, result, after, before, subtitle=subtitle, commands=commands, where=where)
    facts = {"measured_on": where}
    return settled(run, result, before=before, after=after, report=report, commands=commands, facts=facts)
