from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.train.toys import Folder, Regression, TwoPlayers, loader

from volvelle.errors import VolvelleError
from volvelle.train.loop import fit
from volvelle.train.observer import Observer, Quiet
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss, Objective, Phase
from volvelle.train.player import NonFinite

OBJECTIVES = [Regression, TwoPlayers]
OPTIONS = FitOptions(steps=17, accumulate=3, checkpoint_every=4, evaluate_every=5, seed=3)


def state(objective):
    found = {f"{name}.{key}": v for name, m in objective.modules().items() for key, v in m.state_dict().items()}
    return found | getattr(objective, "average", {})


def history(run):
    """What happened, without what may differ: times, and the note that a run was resumed."""
    records = [r for r in run.metrics() if r["event"] != "resume"]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Kill(Observer):
    """Sends a signal to this process in the middle of a step (from the loss), like a user would."""

    def say(self, text):
        pass


def interrupting(objective, at, number=signal.SIGINT):
    """The same objective, whose loss sends a signal at its `at`-th call: inside phases and accumulations."""
    calls = 0
    original = objective.phases

    def phases(steps):
        def wrap(phase):
            def loss(batch):
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), number)
                return phase.loss(batch)

            return Phase(**{**vars(phase), "loss": loss})

        return [wrap(phase) for phase in original(steps)]

    objective.phases = phases
    return objective


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(kind, tmp_path):
    whole, run = kind(), Folder(tmp_path / "whole")
    result = fit(whole, loader(), options=OPTIONS, run=run, observer=Quiet())
    assert result.step == result.steps == 17
    assert result.interrupted is None
    for at in (1, 2, 9, 20, 31, 44):
        part = Folder(tmp_path / f"part{at}")
        number = signal.SIGTERM if at % 2 else signal.SIGINT
        stopped = fit(interrupting(kind(), at, number), loader(), options=OPTIONS, run=part, observer=Quiet())
        assert stopped.interrupted == signal.Signals(number).name
        assert 0 < stopped.step < 17
        assert stopped.checkpoint is not None
        torch.manual_seed(at)  # whatever happened between the two processes
        resumed = kind(seed=77)  # other initial weights: all must come from the checkpoint
        final = fit(resumed, loader(), options=OPTIONS, run=part, observer=Quiet(), resume=True)
        assert final.resumed_from == stopped.step
        same(state(whole), state(resumed))
        assert history(part) == history(run)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_pause_leaves_no_trace(kind, tmp_path):
    whole, run, part = kind(), Folder(tmp_path / "whole"), Folder(tmp_path / "part")
    fit(whole, loader(), options=OPTIONS, run=run, observer=Quiet())
    for until, reached, objective in (
        (5, 5, kind()),
        (5, 5, kind(seed=77)),
        (11, 11, kind(seed=78)),
        (99, 17, kind(seed=79)),
    ):
        known = part.path.joinpath("checkpoints").is_dir()
        found = fit(objective, loader(), options=OPTIONS, run=part, observer=Quiet(), resume=known, until=until)
        assert (found.step, found.steps, found.interrupted) == (reached, 17, None)
    same(state(whole), state(objective))
    assert history(part) == history(run)


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[4])
    from tests.train.toys import Folder, Regression, TwoPlayers, loader
    from volvelle.train.loop import fit
    from volvelle.train.observer import Quiet
    from tests.train.test_loop import OPTIONS, interrupting
    kind = {"Regression": Regression, "TwoPlayers": TwoPlayers}[sys.argv[1]]
    interrupting(objective := kind(), int(sys.argv[3]), signal.SIGKILL)
    fit(objective, loader(), options=OPTIONS, run=Folder(sys.argv[2]), observer=Quiet())
"""


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(kind, tmp_path):
    whole, run = kind(), Folder(tmp_path / "whole")
    fit(whole, loader(), options=OPTIONS, run=run, observer=Quiet())
    for at in (2, 38):
        part = Folder(tmp_path / f"part{at}")
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), kind.__name__, str(part.path), str(at)]
        killed = subprocess.run([*command, str(Path(__file__).parents[2])], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        resumed = kind(seed=77 if at == 38 else 1)
        final = fit(resumed, loader(), options=OPTIONS, run=part, observer=Quiet(), resume=True)
        assert final.resumed_from == (None if at == 2 else 4 if kind is TwoPlayers else 12)
        same(state(whole), state(resumed))
        assert history(part) == history(run)


def test_each_phase_leaves_the_other_untouched():
    objective = TwoPlayers()
    seen = []
    watched = objective.phases

    def snapshot(modules):
        tensors = {k: v.clone() for m in modules for k, v in m.state_dict().items()}
        return tensors, [p.grad for m in modules for p in m.parameters()]

    def phases(steps):
        found = watched(steps)
        out = []
        for phase in found:
            other = objective.generator if phase.name == "critic" else objective.critic

            def make(parameters, phase=phase, other=other):
                optimizer = phase.optimizer(parameters)
                optimizer.register_step_pre_hook(lambda *_: check(phase, other))
                return optimizer

            out.append(Phase(**{**vars(phase), "optimizer": make}))
        return out

    def check(phase, other):
        own = phase.parameters.values()
        assert all(p.grad is not None for p in own), "the player itself has gradients"
        assert all(p.grad is None for p in other.parameters()), "the other player has none"
        assert not any(p.requires_grad for p in other.parameters())
        seen.append(phase.name)

    objective.phases = phases
    before = {}
    plays = []
    original = {"judge": objective.judge, "fool": objective.fool}

    def tracked(name, other):
        def loss(batch):
            now, _ = snapshot([other])
            key = (name, len(plays))
            before[key] = now
            plays.append(name)
            return original[name](batch)

        return loss

    objective.judge, objective.fool = tracked("judge", objective.generator), tracked("fool", objective.critic)
    fit(objective, loader(), options=FitOptions(steps=6), observer=Quiet())
    assert plays.count("judge") == 10
    assert plays.count("fool") == 3
    assert set(seen) == {"critic", "generator"}
    # Between two consecutive plays of the same player nothing of the other has moved, batch-norm statistics included.
    for i in range(1, len(plays)):
        if plays[i] == plays[i - 1]:
            same(before[plays[i - 1], i - 1], before[plays[i], i])
    assert all(p.grad is None for m in objective.modules().values() for p in m.parameters())
    assert all(p.requires_grad for m in objective.modules().values() for p in m.parameters())


def test_other_players_buffers_return_after_a_turn():
    objective = TwoPlayers()
    fit(objective, loader(), options=FitOptions(steps=1), observer=Quiet())  # step 0: only the generator plays
    assert objective.critic[1].num_batches_tracked == 0
    assert objective.generator[1].num_batches_tracked == 1


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (7, 1, 9, 3)])
def test_accumulation_equals_one_large_batch(sizes):
    """Ragged micro-batches are averaged by weight, so the update is that of the large batch."""

    class Plain(Regression):
        def __init__(self):
            super().__init__()
            self.net[2] = torch.nn.Identity()
            self.net.double()

        def phases(self, steps):
            (phase,) = super().phases(steps)
            return [Phase(**{**vars(phase), "optimizer": lambda p: torch.optim.SGD(p.values(), lr=0.1)})]

        def loss(self, batch):
            return super().loss({k: v.double() for k, v in batch.items()})

        def evaluate(self):
            return {}

    class Ragged:
        def __init__(self, sizes):
            self.sizes, self.inner = sizes, loader(batch=sum(sizes), shuffle=False)

        def __len__(self):
            return len(self.sizes)

        def __iter__(self):
            batch = next(iter(loader(batch=sum(self.sizes), shuffle=False)))
            start = 0
            for size in self.sizes:
                part = slice(start, start + size)
                yield batch._replace(value={k: v[part] for k, v in batch.value.items()})
                start += size

        describe = staticmethod(str)

    def train(sizes):
        objective = Plain()
        options = FitOptions(steps=3, accumulate=len(sizes))
        return objective, fit(objective, Ragged(sizes), options=options, observer=Quiet())

    (a, one), (b, many) = train((20,)), train(sizes)
    assert many.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-12)
    for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_evaluation_skipped_by_an_interrupt_is_made_up_for_once(tmp_path):
    """Interrupted at step 5, where an evaluation is due; the resumed run is killed right after making it."""
    whole, run = Regression(), Folder(tmp_path / "whole")
    fit(whole, loader(), options=OPTIONS, run=run, observer=Quiet())
    part = Folder(tmp_path / "part")
    stopped = fit(interrupting(Regression(), 14), loader(), options=OPTIONS, run=part, observer=Quiet())
    assert stopped.step == 5
    assert [r["step"] for r in history(part) if r["event"] == "evaluate"] == [0]
    broken = Regression()
    broken.loss = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(broken, loader(), options=OPTIONS, run=part, observer=Quiet(), resume=True)
    resumed = Regression()
    fit(resumed, loader(), options=OPTIONS, run=part, observer=Quiet(), resume=True)
    assert history(part) == history(run)
    same(state(whole), state(resumed))


def test_interrupt_in_the_last_step_is_a_finished_run(tmp_path):
    run = Folder(tmp_path)
    result = fit(interrupting(Regression(), 50), loader(), options=OPTIONS, run=run, observer=Quiet())
    assert result.interrupted is None
    assert result.step == 17
    assert history(run)[-1] == {"event": "evaluate", "step": 17, "held_out_loss": result.held_out["loss"]}


def test_batches_in_which_nothing_is_learnt_weigh_nothing():
    class Sparse(Regression):
        def phases(self, steps):
            (phase,) = super().phases(steps)
            return [Phase(**{**vars(phase), "optimizer": lambda p: torch.optim.SGD(p.values(), lr=0.1)})]

        def loss(self, batch):
            return Loss(super().loss(batch).value, weight=0.0)

    objective = Sparse()
    before = {name: value.clone() for name, value in state(objective).items()}
    fit(objective, loader(), options=FitOptions(steps=2, accumulate=2), observer=Quiet())
    same(before, state(objective))


class Broken(Objective):
    """Loss that turns NaN at a step, or whose gradient does."""

    def __init__(self, at, where):
        self.net, self.at, self.where, self.calls = torch.nn.Linear(3, 1), at, where, 0

    def modules(self):
        return {"net": self.net}

    def phases(self, steps):
        return [
            Phase("fit", dict(self.net.named_parameters()), self.loss, lambda p: torch.optim.SGD(p.values(), lr=0.1))
        ]

    def loss(self, batch):
        self.calls += 1
        value = self.net(batch["x"]).square().mean()
        if self.calls > self.at:
            zero = (value * 0).clamp(min=0)
            value = value * float("nan") if self.where == "loss" else value + zero.sqrt().sum()
        return Loss(value)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_with_step_phase_and_samples_before_the_update(where, tmp_path):
    objective, run = Broken(6, where), Folder(tmp_path)
    batches = loader(batch=4)
    expected = batches.plan(1)[0]
    with pytest.raises(NonFinite) as error:
        fit(objective, batches, options=FitOptions(steps=20, checkpoint_every=5), run=run, observer=Quiet())
    text = str(error.value)
    assert "step 7" in text
    assert "'fit'" in text
    assert where in text
    assert ", ".join(map(str, expected)) in text
    assert "checkpoint of step 5 is intact" in text
    assert all(torch.isfinite(p).all() for p in objective.net.parameters())


def test_resume_refuses_another_base_model(tmp_path):
    class Adapter(Objective):
        def __init__(self, seed):
            torch.manual_seed(seed)
            self.base, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1, bias=False)
            torch.manual_seed(0)

        def modules(self):
            return {"net": torch.nn.Sequential(self.base, self.head)}

        def phases(self, steps):
            make = lambda p: torch.optim.Adam(p.values())  # noqa: E731
            return [Phase("fit", {"head": self.head.weight}, self.loss, make)]

        def loss(self, batch):
            return Loss((self.head(self.base(batch["x"])) - batch["y"]).square().mean())

    run = Folder(tmp_path)
    first = Adapter(0)
    base = first.base.weight.clone()
    fit(first, loader(), options=FitOptions(steps=2), run=run, observer=Quiet())
    assert torch.equal(base, first.base.weight)
    size = sum(f.stat().st_size for f in (tmp_path / "checkpoints" / "step-00000002").glob("tensors*"))
    assert size < 60_000
    fit(Adapter(0), loader(), options=FitOptions(steps=3), run=run, observer=Quiet(), resume=True)
    with pytest.raises(VolvelleError, match=r"not trained differ.*net\.0\.weight"):
        fit(Adapter(1), loader(), options=FitOptions(steps=4), run=run, observer=Quiet(), resume=True)


def test_a_frozen_weight_that_is_no_number_does_not_stop_a_resume(tmp_path):
    class Half(Regression):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)
            self.extra.weight.data[0, 0] = math.nan

        def modules(self):
            return {"net": self.net, "extra": self.extra}

    options, run = FitOptions(steps=4), Folder(tmp_path)
    fit(Half(), loader(), options=options, run=run, observer=Quiet(), until=2)
    assert fit(Half(), loader(), options=options, run=run, observer=Quiet(), resume=True).resumed_from == 2


def test_data_without_a_batch_end_the_run_with_a_word():
    class Nothing:
        def __len__(self):
            return 1

        def __iter__(self):
            return iter(())

        def describe(self, ids):
            return ""

    with pytest.raises(VolvelleError, match="gave no batch"):
        fit(Regression(), Nothing(), options=FitOptions(steps=2), observer=Quiet())


def test_second_ctrl_c_stops_at_once_and_handlers_return(tmp_path):
    objective = Regression()
    calls = 0
    inner = objective.loss

    def loss(batch):
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return inner(batch)

    objective.loss = loss
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        fit(objective, loader(), options=OPTIONS, run=Folder(tmp_path), observer=Quiet())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_phase_rules_are_checked():
    net = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no parameters to train"):
        Phase("a", {}, lambda b: Loss(torch.ones(())), lambda p: torch.optim.SGD(p.values()))
    with pytest.raises(ValueError, match="repeats=0"):
        Phase("a", dict(net.named_parameters()), lambda b: Loss(torch.ones(())), lambda p: None, repeats=0)


def test_bf16_trains_with_fp32_weights():
    objective = Regression()
    seen = set()
    objective.net[0].register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    fit(objective, loader(), options=FitOptions(steps=2, precision="bf16"), observer=Quiet())
    assert torch.bfloat16 in seen
    assert {p.dtype for p in objective.net.parameters()} == {torch.float32}
