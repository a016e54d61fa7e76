"""Dynamic loss scaling step for step against torch.amp.GradScaler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from volvelle.functional import unscale_gradients, update_loss_scale
from volvelle.nn import LossScaler
from volvelle.parts.precision.loss_scale import LossScale

FACTORS = [{}, {"growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 3}]


def theirs(initial=2.0**16, **options):
    return torch.amp.GradScaler("cpu", init_scale=initial, **options)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([1, 2, 5]), st.sampled_from([2.0, 1.5, 3.0]))
def test_any_sequence_of_overflows_gives_gradscalers_scale(found, interval, growth):
    options = {"growth_interval": interval, "growth_factor": growth, "backoff_factor": 1 / 3}
    state = LossScale(torch.tensor(2.0**100), torch.tensor(0, dtype=torch.int32))
    scale, tracker = torch.tensor(2.0**100), torch.tensor(0, dtype=torch.int32)
    for bad in found:
        state = update_loss_scale(state, bad, **options)
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(bad)), growth, 1 / 3, interval)
        assert torch.equal(state.scale, scale)
        assert torch.equal(state.clean, tracker)


def test_growth_stops_before_infinity():
    state = LossScale(torch.tensor(2.0**127), torch.tensor(0, dtype=torch.int32))
    state = update_loss_scale(state, False, growth_interval=1)
    assert state.scale == 2.0**127
    assert state.clean == 0


def run(ours: bool, poison, options, optimisers=1, steps=14):
    """Train with either scaler, with gradients that are poisoned at chosen steps; scales, weights, steps taken."""
    torch.manual_seed(0)
    nets = [torch.nn.Linear(5, 3) for _ in range(optimisers)]
    steppers = [torch.optim.Adam(net.parameters(), lr=0.05) for net in nets]
    scaler = LossScaler(initial=1024.0, **options) if ours else theirs(1024.0, **options)
    scales, taken = [], [0] * optimisers
    for number, (stepper, _) in enumerate(zip(steppers, nets, strict=True)):
        stepper.register_step_post_hook(lambda *_, i=number: taken.__setitem__(i, taken[i] + 1))
    for step in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for net in nets:
            net.zero_grad()
        found = torch.tensor(False)
        loss = sum(net(x).square().mean() for net in nets)
        (scaler(loss) if ours else scaler.scale(loss)).backward()
        for i, (net, stepper) in enumerate(zip(nets, steppers, strict=True)):
            if (step, i) in poison:
                net.weight.grad[1, 2] = poison[step, i]
            if ours:
                bad = scaler.unscale([p.grad for p in net.parameters()])
                if not bad:
                    stepper.step()
                found = found | bad
            else:
                scaler.step(stepper)
        scaler.update(found) if ours else scaler.update()
        scales.append(float(scaler.scale) if ours else scaler.get_scale())
    return scales, [p.detach().clone() for net in nets for p in net.parameters()], taken, scaler


@pytest.mark.parametrize("options", FACTORS, ids=["default", "odd factors"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_training_with_overflows_is_gradscalers_bit_for_bit(options, value):
    poison = {(1, 0): value, (2, 0): value, (8, 0): value}
    (scales, weights, taken, _), (their_scales, their_weights, their_taken, _) = (
        run(ours, poison, options) for ours in (True, False)
    )
    assert scales == their_scales
    assert taken == their_taken == [11]
    assert all(torch.equal(a, b) for a, b in zip(weights, their_weights, strict=True))
    assert len(set(scales)) > 3


def test_one_of_two_optimisers_overflowing_holds_up_itself_and_shrinks_the_shared_scale():
    poison = {(3, 0): math.inf, (5, 1): math.nan, (6, 1): math.inf}
    options = {"growth_interval": 4}
    ours, their = run(True, poison, options, optimisers=2), run(False, poison, options, optimisers=2)
    assert ours[0] == their[0]
    assert ours[2] == their[2] == [13, 12]
    assert all(torch.equal(a, b) for a, b in zip(ours[1], their[1], strict=True))


def test_state_continues_where_it_was_and_equals_gradscalers():
    *_, scaler = run(True, {(1, 0): math.inf}, {"growth_interval": 5})
    *_, their = run(False, {(1, 0): math.inf}, {"growth_interval": 5})
    state = their.state_dict()
    assert (float(scaler.scale), int(scaler.clean)) == (state["scale"], state["_growth_tracker"])
    fresh = LossScaler(growth_interval=5)
    fresh.load_state_dict(scaler.state_dict())
    for bad in (False, True, False, False):
        fresh.update(bad)
        scaler.update(torch.tensor(bad))
    assert torch.equal(fresh.scale, scaler.scale)
    assert torch.equal(fresh.clean, scaler.clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unscaling_divides_and_finds(dtype):
    a, b = torch.tensor([3.0, 6.0], dtype=dtype), torch.tensor([[-1.5]], dtype=dtype)
    assert not unscale_gradients([a, b], torch.tensor(3.0))
    torch.testing.assert_close(a, torch.tensor([1.0, 2.0], dtype=dtype), rtol=1e-7, atol=0)
    torch.testing.assert_close(b, torch.tensor([[-0.5]], dtype=dtype), rtol=1e-7, atol=0)
    assert not unscale_gradients([], torch.tensor(3.0))
    for bad in (math.nan, math.inf, -math.inf):
        assert unscale_gradients([a, torch.tensor([0.0, bad], dtype=dtype)], torch.tensor(2.0))


def test_sixteen_bit_and_sparse_gradients_are_refused():
    for g in (torch.zeros(2, dtype=torch.float16), torch.zeros(2).to_sparse()):
        with pytest.raises(ValueError, match="dense, in fp32 or fp64"):
            unscale_gradients([g], torch.tensor(2.0))
    with pytest.raises(ValueError, match="growth_factor > 1"):
        LossScaler(growth_factor=0.5)


def test_a_half_precision_loss_is_scaled_in_fp32():
    scaled = LossScaler(initial=2.0**16)(torch.tensor(4.0, dtype=torch.float16))
    assert scaled == 2.0**18
    assert scaled.dtype == torch.float32


def test_gradients_that_vanish_in_half_precision_survive_scaled():
    """The reason for all this: 2^-25 is below fp16's smallest number, and comes back exactly."""

    def gradient(scaler):
        w = torch.ones(3, requires_grad=True)
        loss = (w.half() * torch.tensor(2.0**-12, dtype=torch.float16)).float().sum() * 2.0**-13
        (scaler(loss) if scaler else loss).backward()
        if scaler:
            assert not scaler.unscale([w.grad])
        return w.grad

    assert torch.equal(gradient(None), torch.zeros(3))
    assert torch.equal(gradient(LossScaler(initial=2.0**10)), torch.full((3,), 2.0**-25))


def test_the_update_compiles_and_never_asks_for_a_value():
    compiled = torch.compile(update_loss_scale, fullgraph=True, backend="eager")
    state = LossScale(torch.tensor(8.0), torch.tensor(0, dtype=torch.int32))
    for bad in (True, False):
        a, b = compiled(state, torch.tensor(bad)), update_loss_scale(state, torch.tensor(bad))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
def test_on_cuda_it_is_gradscaler_and_nothing_waits():
    ours, their = LossScaler(growth_interval=3).cuda(), torch.amp.GradScaler("cuda", growth_interval=3)
    w = torch.zeros(4, device="cuda", requires_grad=True)
    sgd = torch.optim.SGD([w], lr=0.0)
    for step in range(20):
        poison = torch.full((4,), math.inf if step % 6 == 5 else 2.0, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        gradient = ours(poison)
        ours.update(ours.unscale([gradient]))
        torch.cuda.set_sync_debug_mode("default")
        their.scale(torch.zeros((), device="cuda"))
        w.grad = poison * their.get_scale()
        their.step(sgd)
        their.update()
        assert float(ours.scale) == their.get_scale()
