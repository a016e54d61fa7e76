"""Small objectives that the training tests share: a regression with dropout, and two players with batch norm."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from volvelle.data.loader import Loader
from volvelle.train.phase import Loss, Objective, Phase
from volvelle.train.schedule import cosine


class Folder:
    """The least a run folder can be."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def log(self, record):
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self):
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def points(count=22, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    return [(row, row.sum().sin()[None]) for row in x]


def stack(items):
    x, y = zip(*items, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def loader(batch=4, seed=0, **options):
    return Loader(points(), batch, seed=seed, collate=stack, **options)


class Regression(Objective):
    """One phase, with dropout so that the random generator matters."""

    def __init__(self, width=3, seed=1):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.evaluations = 0

    def modules(self):
        return {"net": self.net}

    def phases(self, steps):
        make = lambda p: torch.optim.AdamW(p.values(), lr=0.01)  # noqa: E731
        return [Phase("fit", dict(self.net.named_parameters()), self.loss, make, cosine(steps, warmup=2), clip=1.0)]

    def loss(self, batch):
        return Loss(F.mse_loss(self.net(batch["x"]), batch["y"]), weight=len(batch["x"]))

    def evaluate(self):
        self.evaluations += 1
        torch.rand(3)  # an evaluation that draws random numbers must not steer training
        held = stack(points(seed=9))
        return {"loss": float(F.mse_loss(self.net(held["x"]), held["y"]))}


class TwoPlayers(Objective):
    """A generator and a critic with batch norm, in the shape of WGAN: the critic plays twice, from step 1 on."""

    def __init__(self, seed=1):
        torch.manual_seed(seed)
        self.generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.critic = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(6, 1)
        )
        self.average = {name: p.detach().clone() for name, p in self.generator.named_parameters()}

    def modules(self):
        return {"generator": self.generator, "critic": self.critic}

    def phases(self, steps):
        adam = lambda p: torch.optim.Adam(p.values(), lr=0.01, betas=(0.5, 0.9))  # noqa: E731
        rms = lambda p: torch.optim.RMSprop(p.values(), lr=0.005, momentum=0.1)  # noqa: E731
        return [
            Phase(
                "critic", dict(self.critic.named_parameters()), self.judge, rms, start=1, repeats=2, after=self.clamp
            ),
            Phase("generator", dict(self.generator.named_parameters()), self.fool, adam, every=2, clip=0.5),
        ]

    def real(self, batch):
        return torch.cat([batch["x"], batch["y"]], dim=1)

    def fake(self, batch):
        return self.generator(torch.randn(len(batch["x"]), 2))

    def judge(self, batch):
        value = self.critic(self.fake(batch)).mean() - self.critic(self.real(batch)).mean()
        return Loss(value, {"distance": -value}, len(batch["x"]))

    def fool(self, batch):
        return Loss(-self.critic(self.fake(batch)).mean(), weight=len(batch["x"]))

    def clamp(self):
        for p in self.critic.parameters():
            p.clamp_(-0.3, 0.3)

    def after_step(self, step):
        for name, p in self.generator.named_parameters():
            self.average[name].lerp_(p.detach(), 0.1)

    def state_dict(self):
        return {"average": self.average}

    def load_state_dict(self, state):
        self.average = state["average"]
