"""Master weights against an fp32 optimiser on the same gradients, and against torch.amp's unscaling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from volvelle.functional import master_weight_update
from volvelle.nn import LossScaler, MasterWeights

DTYPES = [torch.float16, torch.bfloat16]


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_update_is_an_fp32_step_on_the_same_gradients_rounded_once(dtype):
    model = net(dtype)
    held = MasterWeights(model.parameters())
    ours = torch.optim.Adam(held.masters, lr=0.01)
    oracle = [p.detach().float().requires_grad_() for p in model.parameters()]
    theirs = torch.optim.Adam(oracle, lr=0.01)
    for step in range(8):
        model.zero_grad()
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).float().square().mean().backward()
        for p, w in zip(oracle, model.parameters(), strict=True):
            p.grad = w.grad.float()
        theirs.step()
        master_weight_update(held.weights, held.masters, ours.step)
        for p, master, w in zip(oracle, held.masters, model.parameters(), strict=True):
            assert torch.equal(p, master)
            assert torch.equal(w, p.detach().to(dtype))


def test_with_scaling_it_is_gradscaler_over_the_masters():
    model, twin = net(torch.float16), net(torch.float16)
    held = MasterWeights(model.parameters())
    ours, scaler = torch.optim.SGD(held.masters, lr=0.1, momentum=0.9), LossScaler(initial=2.0**22, growth_interval=3)
    masters = [p.detach().float().requires_grad_() for p in twin.parameters()]
    theirs = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    amp = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    scales = []
    for step in range(10):
        x = (torch.randn(7, 6, generator=torch.Generator().manual_seed(step)) * 20).half()
        for one in (model, twin):
            one.zero_grad()
        scaler(model(x).float().square().mean()).backward()
        held.collect()
        found = scaler.unscale([m.grad for m in held.masters])
        if not found:
            ours.step()
            held.publish()
        scaler.update(found)
        amp.scale(twin(x).float().square().mean()).backward()
        for p, w in zip(masters, twin.parameters(), strict=True):
            p.grad = w.grad.float()
        amp.step(theirs)
        amp.update()
        with torch.no_grad():
            for p, w in zip(masters, twin.parameters(), strict=True):
                w.copy_(p)
        scales.append(float(scaler.scale))
        assert scales[-1] == amp.get_scale()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert min(scales) < 2.0**22, "some steps overflowed"
    assert len(set(scales)) < 10, "and some did not"
    assert max(scales[-4:]) > min(scales), "and then the scale grew"


def test_steps_too_small_for_sixteen_bits_add_up_in_the_master():
    """Section 3.1: an update below 1/2048 of the weight is lost in fp16, however often it comes."""
    w = torch.ones(4, dtype=torch.float16, requires_grad=True)
    naive = torch.ones(4, dtype=torch.float16)
    master = w.detach().float().requires_grad_()
    sgd = torch.optim.SGD([master], lr=1e-4)
    for _ in range(100):
        w.grad = torch.ones_like(w)
        master_weight_update([w], [master], sgd.step)
        naive -= (1e-4 * torch.ones_like(naive)).half()
    assert torch.equal(naive, torch.ones(4, dtype=torch.float16))
    torch.testing.assert_close(w.detach().float(), torch.full((4,), 0.99), rtol=1e-3, atol=0)


def test_scale_divides_in_fp32():
    w = torch.zeros(1, dtype=torch.float16, requires_grad=True)
    master = w.detach().float().requires_grad_()
    w.grad = torch.full_like(w, 2.0**-14)
    master_weight_update([w], [master], lambda: None, scale=torch.tensor(2.0**20))
    assert float(master.grad) == 2.0**-34


def test_wide_weights_are_their_own_masters_and_stay_out_of_the_state():
    model = nn.Sequential(nn.Linear(2, 2).half(), nn.LayerNorm(2))
    held = MasterWeights(model.parameters())
    assert [m is w for m, w in zip(held.masters, held.weights, strict=True)] == [False, False, True, True]
    assert list(held.state_dict()) == ["copies.0", "copies.1"]
    model[1].weight.grad = torch.ones(2)
    held.collect()
    assert held.masters[0].grad is None, "no gradient stays no gradient"
    assert torch.equal(held.masters[2].grad, torch.ones(2))


def test_adopt_takes_outside_changes_and_keeps_hidden_bits():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    held = MasterWeights([w])
    with torch.no_grad():
        held.masters[0].add_(2.0**-12)
        held.publish()
        assert torch.equal(w, torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        w[1] = 0.5
    held.adopt()
    assert held.masters[0].tolist() == [1.0 + 2.0**-12, 0.5]


def test_state_survives_and_shapes_must_fit():
    model = net(torch.float16)
    held = MasterWeights(model.parameters())
    with torch.no_grad():
        held.masters[0].add_(1e-5)
    again = MasterWeights(copy.deepcopy(model).parameters())
    again.load_state_dict(held.state_dict())
    assert torch.equal(again.masters[0], held.masters[0])
    with pytest.raises(ValueError, match="shapes must agree"):
        master_weight_update([torch.zeros(2)], [torch.zeros(3)], lambda: None)
