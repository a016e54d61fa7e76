"""fp16 with loss scaling for each player, master weights, and what one player's turn leaves alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tests.train.test_loop import history, interrupting, same, state
from tests.train.toys import Folder, Regression, TwoPlayers, loader
from torch import nn
from torch.nn import functional as F

from volvelle.train.checkpoint import pack
from volvelle.train.isolation import Isolation
from volvelle.train.loop import fit
from volvelle.train.losses import linear_cross_entropy
from volvelle.train.nonfinite import NonFinite
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Objective, Phase
from volvelle.train.player import Player
from volvelle.train.precision import Precision
from volvelle.train.ranks import Ranks

HALF = FitOptions(steps=12, accumulate=2, checkpoint_every=3, precision="fp16", average=0.9, seed=3)


class Ear(Quiet):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def train(objective, batches=None, *, run=None, ear=None, ranks=None, resume=False, **options):
    settings = {"steps": 6, "checkpoint_every": None} | options
    batches = batches or loader()
    return fit(
        objective,
        batches,
        options=FitOptions(**settings),
        run=run,
        observer=ear or Quiet(),
        ranks=ranks,
        resume=resume,
    )


@pytest.mark.parametrize("kind", [Regression, TwoPlayers])
def test_half_precision_runs_resume_bit_for_bit(kind, tmp_path):
    whole, run = kind(), Folder(tmp_path / "whole")
    fit(whole, loader(), options=HALF, run=run, observer=Quiet())
    scale = "loss_scale" if kind is Regression else "critic_loss_scale"
    assert all(scale in r for r in history(run) if r["event"] == "train" and r["step"] > 1)
    for at in (3, 14):
        part = Folder(tmp_path / f"part{at}")
        stopped = fit(interrupting(kind(), at), loader(), options=HALF, run=part, observer=Quiet())
        assert stopped.interrupted
        resumed = kind(seed=77)
        fit(resumed, loader(), options=HALF, run=part, observer=Quiet(), resume=True)
        same(state(whole), state(resumed))
        assert history(part) == history(run)


def test_half_precision_learns_what_full_precision_learns():
    """Same data, same seed: the losses agree to fp16's precision, step by step."""
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        objective, seen = Quieter(), []

        def measure(step, objective=objective, seen=seen):
            with torch.no_grad():
                seen.append(objective.evaluate()["loss"])

        objective.after_step = measure
        train(objective, steps=30, precision=precision)
        losses[precision] = torch.tensor(seen)
    torch.testing.assert_close(losses["fp16"], losses["fp32"], rtol=2e-2, atol=1e-3)
    assert (losses["fp16"] - losses["fp32"]).abs().max() < (losses["bf16"] - losses["fp32"]).abs().max()
    assert not torch.equal(losses["fp16"], losses["fp32"])


class Quieter(Regression):
    """Without dropout, and with a loss small enough for the first scale: Adam does not mind the factor."""

    def __init__(self):
        super().__init__()
        self.net[2] = nn.Identity()

    def loss(self, batch):
        loss = super().loss(batch)
        return Loss(loss.value.float() * 0.05, weight=loss.weight)


class Pair(Objective):
    """Two players that do not touch each other; `loud` lists the turns at which the first one's loss is enormous."""

    def __init__(self, loud=()):
        torch.manual_seed(1)
        self.nets = {name: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)) for name in ("a", "b")}
        self.loud, self.turns, self.steps = loud, 0, {"a": 0, "b": 0}

    def modules(self):
        return self.nets

    def phases(self, steps):
        def make(name):
            def adam(parameters):
                optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
                optimizer.register_step_post_hook(lambda *_: self.steps.__setitem__(name, self.steps[name] + 1))
                return optimizer

            return adam

        return [
            Phase(name, dict(net.named_parameters()), getattr(self, f"loss_{name}"), make(name))
            for name, net in self.nets.items()
        ]

    def loss_a(self, batch):
        self.turns += 1
        factor = 300.0 if self.turns in self.loud else 0.05
        return Loss(F.mse_loss(self.nets["a"](batch["x"]).float(), batch["y"]) * factor, weight=len(batch["x"]))

    def loss_b(self, batch):
        return Loss(F.mse_loss(self.nets["b"](batch["x"]).float(), batch["y"]) * 0.05, weight=len(batch["x"]))


def test_one_of_two_players_overflowing_skips_only_its_own_step(tmp_path):
    quiet, loud, ear, run = Pair(), Pair(loud=(3, 4)), Ear(), Folder(tmp_path)
    train(quiet, precision="fp16")
    result = train(loud, precision="fp16", ear=ear, run=run)
    assert loud.steps == {"a": 4, "b": 6}
    assert result.skipped == {"a": 2, "b": 0}
    same(dict(quiet.nets["b"].state_dict()), dict(loud.nets["b"].state_dict()))
    assert not torch.equal(quiet.nets["a"][0].weight, loud.nets["a"][0].weight)
    records = [r for r in run.metrics() if r["event"] == "train"]
    assert [r["a_loss_scale"] for r in records] == [2.0**k for k in (16, 16, 15, 14, 14, 14)]
    assert {r["b_loss_scale"] for r in records} == {2.0**16}
    assert [r["a_skipped_overflow"] for r in records] == [0, 0, 1, 2, 2, 2]
    assert ["a_gradient_norm" in r for r in records] == [True, True, False, False, True, True]
    assert any("phase 'a': 2 of 6 updates were left out" in text and "16384" in text for text in ear.said)
    assert not any("phase 'b'" in text for text in ear.said)


def test_overflow_without_end_stops_and_says_where():
    with pytest.raises(NonFinite, match=r"(?s)step 20, phase 'a': the gradient's norm is (nan|inf).*20 updates"):
        train(Endless(), precision="fp16", steps=40, on_nan="skip")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_turn_changes_nothing_of_the_other_player(precision):
    """Parameters, gradients, buffers, optimiser, masters, loss scale, average and counts of whoever does not play."""
    objective = TwoPlayers()
    objective.critic[4].bfloat16()  # with master weights
    objective.critic.insert(4, Narrow())
    modules, phases = objective.modules(), objective.phases(9)
    isolation = Isolation(phases, modules)
    numbers = Precision(precision, torch.device("cpu"))
    players = {p.name: Player(p, isolation, numbers, Ranks(), average=0.9) for p in phases}

    def everything(name):
        tensors = {}
        pack({"player": players[name].state_dict(), "module": modules[name].state_dict()}, tensors)
        gradients = [p.grad for p in modules[name].parameters()]
        return tensors, gradients, players[name].updates, players[name].skipped.state_dict()

    for turn, batch in enumerate(itertools.chain(loader(), loader(seed=1))):
        playing, other = ("critic", "generator") if turn % 3 else ("generator", "critic")
        before, mine = everything(other), everything(playing)
        players[playing].update([batch], str)
        after, now = everything(other), everything(playing)
        same(before[0], after[0])
        assert before[1:] == after[1:]
        assert all(gradient is None for gradient in after[1])
        assert any(not torch.equal(mine[0][key], now[0][key]) for key in now[0] if key in mine[0])


class Narrow(nn.Module):
    def forward(self, x):
        return x.bfloat16()


class Endless(Pair):
    def loss_a(self, batch):
        loss = super().loss_a(batch)
        return Loss(loss.value * 1e15, weight=loss.weight)


class Elsewhere(Ranks):
    """One process that is told, at some questions, that another rank said yes."""

    def __init__(self, yes):
        self.yes, self.count = yes, 0

    def any(self, flag):
        self.count += 1
        return flag or self.count in self.yes


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_step_that_another_rank_leaves_out_is_left_out_here(precision):
    """Question 3 is whether the third update is sound; question 4 whether a loss was the cause, or an overflow."""
    objective, described = Quieter(), []
    (phase,) = objective.phases(9)
    ranks, isolation = Elsewhere({3} if precision == "fp16" else {3, 4}), Isolation([phase], objective.modules())
    player = Player(
        phase, isolation, Precision(precision, torch.device("cpu")), ranks, on_nan="skip", say=described.append
    )
    weights = []
    for batch in loader():
        player.update([batch], str)
        weights.append(objective.net[0].weight.detach().clone())
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [False, True, False, False, False]
    assert player.updates == 5
    if precision == "fp16":
        assert (player.skipped.overflow, player.skipped.nan, float(player.scaler.scale)) == (1, 0, 2.0**15)
    else:
        assert (player.skipped.overflow, player.skipped.nan) == (0, 1)
        assert described == ["phase 'fit': the loss on another rank is NaN or infinite; this update is left out"]


def test_weights_stored_in_half_precision_are_stepped_in_fp32():
    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).half()

    class Half(Regression):
        def __init__(self):
            self.net, self.evaluations = build(), 0

        def phases(self, steps):
            sgd = lambda p: torch.optim.SGD(p.values(), lr=0.02)  # noqa: E731
            return [Phase("fit", dict(self.net.named_parameters()), self.loss, sgd)]

        def loss(self, batch):
            value = F.mse_loss(self.net(batch["x"].half()).float(), batch["y"])
            return Loss(value * 0.05, weight=len(batch["x"]))

        def evaluate(self):
            return {}

    objective, oracle = Half(), build()
    train(objective, steps=40, precision="fp16")
    masters = [p.detach().float().requires_grad_() for p in oracle.parameters()]
    naive = build()
    batches, again = loader(), iter(())
    for _ in range(40):
        batch = next(again, None)
        if batch is None:
            again = iter(batches)
            batch = next(again)
        for net in (oracle, naive):
            net.zero_grad()
            (F.mse_loss(net(batch.value["x"].half()).float(), batch.value["y"]) * 0.05 * 2.0**16).backward()
        with torch.no_grad():
            for master, w, small in zip(masters, oracle.parameters(), naive.parameters(), strict=True):
                master -= 0.02 * (w.grad.float() / 2.0**16)
                w.copy_(master)
                small -= 0.02 * (small.grad.float() / 2.0**16).half()
    assert all(p.dtype == torch.float16 for p in objective.net.parameters())
    for p, wanted in zip(objective.net.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, rtol=0, atol=2.0**-11)
    apart = sum(
        float((p - q).detach().abs().sum()) for p, q in zip(oracle.parameters(), naive.parameters(), strict=True)
    )
    assert apart > 0, "without masters the weights end elsewhere"


def test_master_weights_resume_bit_for_bit(tmp_path):
    class Half(Regression):
        def __init__(self, seed=1):
            super().__init__(seed=seed)
            self.net.bfloat16()

        def loss(self, batch):
            return Loss(F.mse_loss(self.net(batch["x"].bfloat16()).float(), batch["y"]), weight=len(batch["x"]))

        def evaluate(self):
            return {}

    options = dataclasses.replace(HALF, precision="bf16")
    whole = Half()
    fit(whole, loader(), options=options, run=Folder(tmp_path / "whole"), observer=Quiet())
    part = Folder(tmp_path / "part")
    fit(interrupting(Half(), 9), loader(), options=options, run=part, observer=Quiet())
    resumed = Half(seed=77)
    fit(resumed, loader(), options=options, run=part, observer=Quiet(), resume=True)
    same(state(whole), state(resumed))


def test_the_head_s_gradients_survive_half_precision_only_scaled():
    """Over 4,000 positions 1/N is 2^-12: most entries of the logits' gradient are below fp16's smallest number."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4000, 16), (torch.randn(3000, 16) * 0.1).requires_grad_()
    targets = torch.randint(3000, (4000,))
    exact = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), weight)[0]

    def error(scale):
        with torch.autocast("cpu", torch.float16):
            loss = linear_cross_entropy(hidden, weight, targets, chunk=1000)
        found = torch.autograd.grad(loss * scale, weight)[0] / scale
        return float((found - exact).norm() / exact.norm())

    assert error(2.0**14) < 2e-3
    assert error(1.0) > 3 * error(2.0**14)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_on_cuda_it_resumes_bit_for_bit(kind, tmp_path):
    class OnCuda(Quieter):
        def __init__(self):
            super().__init__()
            self.net.cuda()

        def evaluate(self):
            return {}

    options = dataclasses.replace(HALF, precision=kind)
    whole, part = OnCuda(), Folder(tmp_path / "part")
    fit(whole, loader(), options=options, run=Folder(tmp_path / "whole"), observer=Quiet())
    fit(interrupting(OnCuda(), 9), loader(), options=options, run=part, observer=Quiet())
    resumed = OnCuda()
    fit(resumed, loader(), options=options, run=part, observer=Quiet(), resume=True)
    same(state(whole), state(resumed))
