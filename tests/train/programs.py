"""What the ranks of the tests do: toys to train, and the ways in which a rank can be lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from tests.train.toys import Folder, Regression, TwoPlayers, loader
from torch import nn

from volvelle.data.pictures import to_bytes
from volvelle.systems.generation.discriminator import PatchDiscriminator
from volvelle.systems.generation.vqgan_model import VQGAN
from volvelle.train import checkpoint
from volvelle.train.gan_constraints import Slope
from volvelle.train.gan_objective import Game, GANObjective
from volvelle.train.loop import fit
from volvelle.train.observer import Quiet
from volvelle.train.phase import Loss, Phase
from volvelle.train.ranks import Ranks
from volvelle.train.recipes.vqgan import AdversaryOptions, CodecShape, LossOptions, TrainVQGAN
from volvelle.train.vqgan_objective import VQGANObjective


class Plain(Regression):
    """Without dropout, so that samples give the same gradient on whichever rank; records every update's gradient."""

    def __init__(self, seed=1, lr=0.05):
        super().__init__(seed=seed)
        self.net[2] = nn.Identity()
        self.lr, self.gradients = lr, []

    def phases(self, steps):
        (phase,) = super().phases(steps)
        return [Phase(**{**vars(phase), "clip": None, "optimizer": self.recording})]

    def recording(self, parameters):
        optimizer = torch.optim.SGD(parameters.values(), lr=self.lr)

        def keep(*_):
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            self.gradients.append([getattr(g, "full_tensor", lambda g=g: g)().detach().clone() for g in grads])

        optimizer.register_step_pre_hook(keep)
        return optimizer


class SteadyPlayers(TwoPlayers):
    """Two players whose noise comes from the batch, without dropout: the same on whichever rank. Watches isolation."""

    def __init__(self, seed=1):
        super().__init__(seed)
        self.critic[3] = nn.Identity()
        self.broken, self.average = [], {}

    def after_step(self, step):
        """The average is the loop's (options.average), which may be sharded."""

    def fake(self, batch):
        return self.generator(batch["x"][:, :2])

    def phases(self, steps):
        found = super().phases(steps)
        others = {"critic": self.generator, "generator": self.critic}

        def watched(phase):
            other = others[phase.name]

            def make(parameters):
                optimizer = phase.optimizer(parameters)
                optimizer.register_step_pre_hook(lambda *_: self.check(phase.name, other))
                return optimizer

            return Phase(**{**vars(phase), "optimizer": make})

        return [watched(phase) for phase in found]

    def check(self, name, other):
        if any(p.grad is not None or p.requires_grad for p in other.parameters()):
            self.broken.append(name)


class Gamblers(GANObjective):
    """The engine's own game: a Wasserstein critic with a gradient penalty, twice a step; dropout, noise, batch norm."""

    def __init__(self, seed=1):
        torch.manual_seed(seed)
        generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        critic = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(6, 1))
        adam = lambda p: torch.optim.Adam(p.values(), lr=0.01, betas=(0.5, 0.9))  # noqa: E731
        rms = lambda p: torch.optim.RMSprop(p.values(), lr=0.005, momentum=0.1)  # noqa: E731
        super().__init__(
            generator,
            critic,
            Game("wasserstein", Slope(), critic_steps=2),
            optimizers=(adam, rms),
            latents=lambda count: torch.randn(count, 2),
            real=lambda batch: torch.cat([batch["x"], batch["y"]], dim=1),
        )


class Painters(VQGANObjective):
    """A small codec with a codebook of running means against a patch discriminator that joins at step 2."""

    def __init__(self, seed=1):
        torch.manual_seed(seed)
        shape = CodecShape(width=4, multipliers=(1, 2), groups=2, latent=4, code_width=3, codes=8)
        adversary = AdversaryOptions(begin=4, warmup=2, ramp=3, width=4, layers=1)
        options = TrainVQGAN(data="pictures", adversary=adversary, loss=LossOptions(perceptual=0), clip=None)
        super().__init__(VQGAN(shape.build(1, 8)), options, discriminator=PatchDiscriminator(1, width=4, layers=1))

    def loss(self, batch):
        return super().loss(self.painted(batch))

    def judge(self, batch):
        return super().judge(self.painted(batch))

    def painted(self, batch):
        """Each row of numbers as waves of 8 x 8 pixels, the same ones in both phases."""
        if "images" not in batch:
            line = torch.linspace(-3, 3, 64)
            x, y, z = batch["x"][:, :, None].unbind(1)
            waves = torch.sin(x * line + y) + z * torch.cos(2 * line)
            batch["images"] = to_bytes(waves.view(-1, 1, 8, 8) / 2)
        return batch

    def units(self, batch):
        return float(len(batch["x"])), "images"


class Idle(Plain):
    """One layer that the loss never uses, and one that only some samples use."""

    def evaluate(self):
        return {}

    def __init__(self, seed=1):
        super().__init__(seed)
        self.net.add_module("idle", nn.Linear(2, 2))
        self.net.add_module("sometimes", nn.Linear(3, 1))

    def loss(self, batch):
        found = self.net[3](self.net[1](self.net[0](batch["x"])))
        if batch["x"][0, 0] > 0:
            found = found + self.net.sometimes(batch["x"])
        return Loss((found - batch["y"]).square().mean(), weight=len(batch["x"]))


class Spoiled(Plain):
    """Sample 5 gives NaN, on whichever rank it lands."""

    def loss(self, batch):
        found = super().loss(batch)
        bad = (batch["x"] == loader().dataset[5][0]).all(dim=1).any()
        return type(found)(found.value * float("nan") if bad else found.value, weight=found.weight)


EVERY = (Regression, TwoPlayers, Gamblers, Painters, Plain, SteadyPlayers, Idle, Spoiled)
KINDS = {kind.__name__: kind for kind in EVERY}


class Ear(Quiet):
    """Remembers what was said."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def train(ranks: Ranks, out: Path, kind: str, options, *, folder: Path | None = None, resume=False, faults=(), seed=1):
    """Train a toy on the same data, whatever the number of ranks; leave its tensors in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    objective, ear = KINDS[kind](seed=seed), Ear()
    for fault in faults:
        fault.arm(ranks, objective)
    run = Folder(folder) if folder is not None else None
    result = fit(objective, loader(options.batch), options=options, run=run, observer=ear, resume=resume, ranks=ranks)
    weights = {f"{name}.{key}": v for name, m in objective.modules().items() for key, v in m.state_dict().items()}
    torch.save(
        {"weights": weights | getattr(objective, "average", {}), "gradients": getattr(objective, "gradients", [])},
        out / f"rank-{ranks.rank}.pt",
    )
    return {
        "step": result.step,
        "interrupted": result.interrupted,
        "resumed_from": result.resumed_from,
        "metrics": result.metrics,
        "said": ear.said,
        "broken": getattr(objective, "broken", []),
        "state": str(objective.modules()),
    }


class Fault:
    """Rank `rank` sends itself `number` at the `count`-th arrival at `place`."""

    def __init__(self, rank: int, place: str, count: int, number: int = signal.SIGKILL):
        self.rank, self.place, self.count, self.number = rank, place, count, number

    def __repr__(self):
        return f"{signal.Signals(self.number).name} of rank {self.rank} at {self.place} {self.count}"

    def hit(self):
        self.count -= 1
        if self.count == 0:
            os.kill(os.getpid(), self.number)

    def arm(self, ranks, objective):
        if ranks.rank != self.rank:
            return
        if self.place == "loss":
            self._in_phases(objective, "loss")
        elif self.place == "update":
            self._in_phases(objective, "optimizer")
        elif self.place == "transfer":
            self._before(__import__("volvelle.parts.collectives.wire", fromlist=["Wire"]).Wire, "wait")
        else:  # inside the writing of a checkpoint: before hashing, before flushing, before the rename
            owner = Path if self.place == "rename" else checkpoint
            self._before(owner, self.place)

    def _before(self, owner, name):
        original = getattr(owner, name)

        def hit(*arguments, **options):
            self.hit()
            return original(*arguments, **options)

        setattr(owner, name, hit)

    def _in_phases(self, objective, what):
        original = objective.phases

        def phases(steps):
            return [Phase(**{**vars(phase), what: self._wrapped(phase, what)}) for phase in original(steps)]

        objective.phases = phases

    def _wrapped(self, phase, what):
        if what == "loss":

            def loss(batch):
                self.hit()
                return phase.loss(batch)

            return loss

        def make(parameters):
            optimizer = phase.optimizer(parameters)
            optimizer.register_step_pre_hook(lambda *_: self.hit())
            return optimizer

        return make


def tiny_decoder(seed=0):
    """Two blocks, tied embeddings."""
    from volvelle.systems.language.config import GatedMLP, LanguageConfig, RMSNorm, Rope
    from volvelle.systems.language.decoder import Decoder

    torch.manual_seed(seed)
    shape = {"vocabulary": 61, "width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "context": 32}
    return Decoder(LanguageConfig("llama", **shape, norm=RMSNorm(), mlp=GatedMLP(33), position=Rope()))


def train_language(ranks: Ranks, out: Path, options, *, resume=False, seed=0):
    """Train the tiny decoder on windows of numbers; leave its weights, and what it then computes, in `out`."""
    from volvelle.data.loader import Loader
    from volvelle.data.packing import Windows, collate_windows
    from volvelle.train.language import LanguageObjective

    tokens = torch.randint(61, (401,), generator=torch.Generator().manual_seed(1))
    windows = Windows(tokens, 16)
    model, ear = tiny_decoder(seed), Ear()
    held = Loader(windows, 4, seed=0, collate=collate_windows, shuffle=False)
    objective = LanguageObjective(model, options, held_out=held)
    data = Loader(windows, options.batch, seed=5, collate=collate_windows)
    result = fit(objective, data, options=options, run=Folder(out / "run"), observer=ear, resume=resume, ranks=ranks)
    with torch.no_grad():
        logits = model(torch.arange(20)[None]).logits
    torch.save(
        {"weights": model.state_dict(), "logits": logits, "kind": type(model).__name__}, out / f"rank-{ranks.rank}.pt"
    )
    return {"resumed_from": result.resumed_from, "metrics": result.metrics, "best": result.best, "said": ear.said}
