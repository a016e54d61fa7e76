"""Gradient penalties and clipping: closed forms, double backward, zero slopes, precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volvelle.parts.adversarial import gradient_penalty as g
from volvelle.parts.adversarial.clip_weights import clip_weights
from volvelle.parts.adversarial.gradient_penalty import gradient_norms, gradient_penalty, r1_penalty


def critic(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def by_hand(net, x):
    """Norms of the gradients of tanh layers, written out."""
    first, _, last = net
    hidden = torch.tanh(x @ first.weight.T + first.bias)
    return ((1 - hidden**2) * last.weight @ first.weight).norm(dim=1)


@pytest.mark.parametrize("one_sided", [False, True])
def test_equals_the_formula_at_the_points_drawn(one_sided):
    net = critic()
    real, fake = torch.randn(2, 7, 3, dtype=torch.float64)
    draw = torch.Generator().manual_seed(4)
    u = torch.rand((7, 1), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for norm in (1.0, 0.3):
        excess = by_hand(net, u * real + (1 - u) * fake) - norm
        expected = (excess.clamp(min=0) if one_sided else excess).square().mean()
        draw.manual_seed(4)
        found = gradient_penalty(net, real, fake, one_sided=one_sided, norm=norm, generator=draw)
        torch.testing.assert_close(found, expected)


def test_weights_get_the_gradient_of_the_penalty():
    net = critic()
    real, fake = torch.randn(2, 4, 3, dtype=torch.float64)
    names, weights = zip(*net.named_parameters(), strict=True)

    def penalty(*values):
        run = lambda x: torch.func.functional_call(net, dict(zip(names, values, strict=True)), x)  # noqa: E731
        return gradient_penalty(run, real, fake, generator=torch.Generator().manual_seed(1))

    assert torch.autograd.gradcheck(penalty, [w.detach().requires_grad_() for w in weights])


def test_r1_is_half_the_mean_squared_slope():
    net = critic()
    x = torch.randn(6, 3, dtype=torch.float64)
    torch.testing.assert_close(r1_penalty(net, x), by_hand(net, x).square().mean() / 2)


def test_zero_slopes_are_finite_in_value_and_gradient():
    net = critic(torch.float32)
    with torch.no_grad():
        net[2].weight.zero_()
    x = torch.randn(4, 3)
    found = gradient_penalty(net, x, -x)
    assert found.item() == 1.0
    found.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    # A plain norm would be NaN here.
    weight = torch.zeros(3, requires_grad=True)
    torch.sqrt(weight.square().sum()).backward()
    assert torch.isnan(weight.grad).all()


def test_it_is_computed_wide_and_leaves_its_inputs_alone():
    net = critic(torch.float32)
    real = torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_penalty(net, real, torch.zeros(4, 3), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    again = gradient_penalty(net, real.detach(), torch.zeros(4, 3), generator=torch.Generator().manual_seed(0))
    assert found.dtype == torch.float32
    assert torch.equal(found, again)
    found.backward()
    assert real.grad is None
    with torch.no_grad():
        assert torch.isfinite(gradient_penalty(net, real.bfloat16(), torch.zeros(4, 3, dtype=torch.bfloat16)))


def test_pictures_and_patches_of_scores():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
    x = torch.randn(2, 3, 8, 8)
    norms = gradient_norms(net, x)
    alone = torch.cat([gradient_norms(net, one[None]) for one in x])
    torch.testing.assert_close(norms, alone)
    assert norms.shape == (2,)


def test_what_is_wrong_is_named():
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="equal shape"):
        gradient_penalty(critic(), x, x[:2])
    with pytest.raises(ValueError, match="equal shape"):
        gradient_penalty(critic(), x[:0], x[:0])
    with pytest.raises(ValueError, match="floating point"):
        gradient_penalty(critic(), x.long(), x.long())
    with pytest.raises(ValueError, match="do not depend"):
        gradient_penalty(lambda p: torch.ones(4, requires_grad=True), x, x)
    with pytest.raises(ValueError, match="floating-point batch"):
        r1_penalty(critic(), x[:0])
    assert torch.isnan(gradient_penalty(critic(torch.float32), x * torch.nan, x))


def test_a_plain_square_root_is_caught(monkeypatch):
    monkeypatch.setattr(g, "_root", torch.sqrt)
    with pytest.raises(AssertionError):
        test_zero_slopes_are_finite_in_value_and_gradient()


def test_clipping():
    weights = [torch.randn(4, 3, requires_grad=True), torch.tensor([torch.nan, 5.0])]
    before = [w.detach().clone() for w in weights]
    clip_weights(weights, 0.2)
    torch.testing.assert_close(weights[0].detach(), before[0].clamp(-0.2, 0.2))
    assert torch.isnan(weights[1][0])
    assert float(weights[1][1]) == pytest.approx(0.2)
    for bound in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            clip_weights(weights, bound)
