"""NaN and infinity: named with step, samples and origin, or left out and counted."""

from __future__ import annotations

import math

import pytest
import torch
from tests.train.test_loop import history, interrupting, same, state
from tests.train.test_precision import Ear, train
from tests.train.toys import Folder, Regression, points, stack
from torch import nn

from volvelle.data.loader import Loader
from volvelle.inspect.gradients import trace_gradients
from volvelle.train.loop import fit
from volvelle.train.nonfinite import IN_A_ROW, NonFinite
from volvelle.train.observer import Quiet
from volvelle.train.options import FitOptions
from volvelle.train.phase import Loss


class Poisoned(Regression):
    """A nested net, one module of which gives NaN for samples far out."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(3, 8), Root()), nn.Linear(8, 1))
        self.net[0] = nn.Identity()


class Root(nn.Module):
    """sqrt(30 - sum |x|): NaN for samples far out."""

    def forward(self, x):
        return (30 - x.abs().sum(1, keepdim=True)).sqrt() * x.tanh()


def poisoned_points(at=(13,), value=math.nan):
    found = points()
    for i in at:
        found[i] = (torch.full((3,), value), found[i][1])
    return found


def poisoned_loader(at=(13,), value=math.nan, batch=2):
    return Loader(poisoned_points(at, value), batch, seed=0, collate=stack, shuffle=False)


def test_nan_in_the_data_names_step_sample_and_module():
    with pytest.raises(NonFinite) as caught:
        train(Regression(), poisoned_loader(), steps=11)
    text = str(caught.value)
    assert text.startswith("step 7, phase 'fit': the loss is nan; samples 12, 13; ")
    assert "of 0 (" in text, "the first linear layer"
    assert "finite before" not in text


def test_only_the_micro_batch_at_fault_is_named():
    with pytest.raises(NonFinite, match=r"^step 3, phase 'fit': the loss is nan; samples 12, 13; NaN"):
        train(Regression(), poisoned_loader(), accumulate=3)


def test_nan_in_a_named_module_of_a_nested_net():
    objective = Poisoned()
    with pytest.raises(NonFinite, match=r"step 5, .*samples 8, 9; NaN began in sqrt of 1\.1 \(test_nonfinite\.py:\d+"):
        train(objective, poisoned_loader(at=(9,), value=1e4), steps=11)


def test_nan_in_a_weight_is_found_where_it_is_used():
    objective = Regression()

    def poison(step):
        if step == 1:
            with torch.no_grad():
                objective.net[3].weight[0, 2] = math.nan

    objective.after_step = poison
    with pytest.raises(NonFinite, match=r"step 3, .*the loss is nan; .*NaN began in linear of 3 \("):
        train(objective)


class Division(Regression):
    """0 / 0 wherever dropout has dropped something: only the right random numbers show it again."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.02), Ratio(), nn.Linear(4, 1))


class Ratio(nn.Module):
    def forward(self, x):
        return x / x


def test_the_random_state_is_put_back_to_find_it_again():
    with pytest.raises(NonFinite, match=r"NaN began in (div|__truediv__|truediv|true_divide).* of 2 \(") as caught:
        train(Division(), steps=200)
    assert "finite when" not in str(caught.value)


def test_a_gradient_without_bound_is_traced_to_the_backward_pass():
    class Steep(Regression):
        def loss(self, batch):
            value = self.net(batch["x"]).mean()
            return Loss((value - value.detach()).abs().sqrt() + value.square(), weight=len(batch["x"]))

    with pytest.raises(NonFinite, match=r"step 1, phase 'fit': the gradient's norm is nan; samples .*sqrt.*backward"):
        train(Steep())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_skip_drops_the_update_counts_and_goes_on(precision, tmp_path):
    class Normed(Regression):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    objective, ear, run = Normed(), Ear(), Folder(tmp_path)
    result = train(
        objective, poisoned_loader(at=(5, 13)), steps=11, on_nan="skip", ear=ear, run=run, precision=precision
    )
    assert result.step == 11
    overflows = result.metrics.get("skipped_overflow", 0)  # while the scale is being found
    assert result.skipped == {"fit": 2 + overflows}
    assert overflows < 4
    records = [r for r in run.metrics() if r["event"] == "train"]
    assert [r["skipped_nan"] for r in records] == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert ["loss" in r for r in records] == [i not in (2, 6) for i in range(11)]
    assert all(torch.isfinite(t).all() for t in objective.net.state_dict().values())
    assert objective.net[1].num_batches_tracked == 9
    assert math.isfinite(result.held_out["loss"])
    traced = [text for text in ear.said if "this update is left out" in text]
    assert traced[0].startswith("step 3, phase 'fit': the loss is nan; samples 4, 5; NaN")
    assert traced[1].startswith("step 7, phase 'fit': the loss is nan; samples 12, 13; this")
    assert ear.said[-1] == "phase 'fit': 2 of 11 updates were left out as NaN or infinite (on_nan)"


def test_a_skipped_update_leaves_no_trace_in_buffers_that_modules_replace():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
            return self.linear(x - self.mean)

    class Replacing(Regression):
        def __init__(self):
            super().__init__()
            self.net = Centred()

    objective = Replacing()
    result = train(objective, poisoned_loader(at=(5,)), steps=8, on_nan="skip")
    assert result.skipped == {"fit": 1}
    assert torch.isfinite(objective.net.mean)
    before = objective.net.mean
    trace_gradients(objective.net, lambda: objective.net(torch.ones(2, 3)).sum())
    assert objective.net.mean is before


def test_skipping_is_resumed_bit_for_bit(tmp_path):
    options = FitOptions(steps=11, on_nan="skip", checkpoint_every=2, average=0.99)
    whole, run = Regression(), Folder(tmp_path / "whole")
    fit(whole, poisoned_loader(at=(5, 13)), options=options, run=run, observer=Quiet())
    part = Folder(tmp_path / "part")
    fit(interrupting(Regression(), 4), poisoned_loader(at=(5, 13)), options=options, run=part, observer=Quiet())
    resumed = Regression(seed=77)
    final = fit(resumed, poisoned_loader(at=(5, 13)), options=options, run=part, observer=Quiet(), resume=True)
    assert final.skipped == {"fit": 2}
    same(state(whole), state(resumed))
    assert history(part) == history(run)


def test_nothing_but_nan_stops_after_twenty():
    bad = poisoned_loader(at=range(22))
    with pytest.raises(NonFinite, match=rf"step {IN_A_ROW}, .*; {IN_A_ROW} updates in a row were left out"):
        train(Regression(), bad, steps=50, on_nan="skip")


def test_many_that_are_not_in_a_row_do_not_stop():
    result = train(Regression(), poisoned_loader(at=range(0, 22, 4)), steps=50, on_nan="skip")
    assert result.skipped["fit"] > IN_A_ROW
