"""The average of the weights, and the loader's workers inside a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.train.test_loop import interrupting, same, state
from tests.train.test_precision import train
from tests.train.toys import Folder, Regression, TwoPlayers, loader, points, stack
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from volvelle.data.loader import Loader
from volvelle.errors import UsageError
from volvelle.train.average import WeightAverage
from volvelle.train.loop import fit
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_torchs_with_the_same_decay(warmup):
    torch.manual_seed(0)
    net, decay = nn.Linear(3, 2), 0.7
    if warmup:
        peer = AveragedModel(net, avg_fn=lambda a, w, n: torch.lerp(a, w, 1 - min(decay, (1 + n) / (10 + n))))
    else:
        peer = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    ours = WeightAverage(dict(net.named_parameters()), decay, warmup=warmup)
    for _ in range(30):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ours.update()
        peer.update_parameters(net)
        for name, p in peer.module.named_parameters():
            torch.testing.assert_close(ours.mean[name], p.detach(), rtol=1e-6, atol=1e-6)
    kept = net.weight.detach().clone()
    with ours.inside(dict(net.named_parameters())):
        assert torch.equal(net.weight, ours.mean["weight"])
    assert torch.equal(net.weight, kept)


def test_the_average_is_what_is_evaluated_and_what_is_left():
    class Watched(Regression):
        def __init__(self):
            super().__init__()
            self.raw, self.seen = [], []

        def after_step(self, step):
            self.raw.append({k: v.clone() for k, v in self.net.state_dict().items()})

        def evaluate(self):
            self.seen.append({k: v.clone() for k, v in self.net.state_dict().items()})
            return super().evaluate()

    objective, plain = Watched(), Watched()
    train(objective, steps=9, average=0.8, evaluate_every=3)
    train(plain, steps=9, evaluate_every=3)
    for ours, wanted in zip(objective.raw, plain.raw, strict=True):
        same(ours, wanted)  # averaging does not steer training
    mean, means = objective.raw[0], []
    for n, raw in enumerate(objective.raw):
        d = min(0.8, (1 + n) / (10 + n)) if n else 0.0
        mean = {k: torch.lerp(mean[k], raw[k], 1 - d) for k in raw}
        means.append(mean)
    for seen, step in zip(objective.seen[1:], (3, 6, 9), strict=True):
        for name in seen:
            torch.testing.assert_close(seen[name], means[step - 1][name], rtol=1e-6, atol=1e-7)
    same(dict(objective.net.state_dict()), objective.seen[-1])


def test_each_player_is_averaged_over_its_own_updates_and_interrupts_leave_the_weights(tmp_path):
    options = FitOptions(steps=8, average=0.9, checkpoint_every=None)
    stopped, run = TwoPlayers(), Folder(tmp_path)
    fit(interrupting(stopped, 6), loader(), options=options, run=run, observer=Quiet())
    again = TwoPlayers()
    fit(interrupting(again, 6), loader(), options=dataclasses.replace(options, average=None), observer=Quiet())
    same(state(stopped), state(again))


def test_bad_options_are_refused():
    for bad in ({"average": 1.0}, {"average": 0.0}, {"workers": -1}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            FitOptions(**bad)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_change_nothing_and_are_gone_afterwards(kind):
    def losses(**workers):
        objective, seen = Regression(), []
        batches = Loader(Rows(), 4, seed=0, collate=stack, **workers)
        original = objective.loss
        objective.loss = lambda batch: seen.append(batch["x"].clone()) or original(batch)
        train(objective, batches, steps=8)
        return seen, batches

    plain, _ = losses()
    ours, batches = losses(workers=kind, num_workers=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert batches._pool is None, "fit ends the workers it has started"


class Rows:
    """Points as a class, so that worker processes can be sent it."""

    def __init__(self):
        self.rows = points()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]
