"""Losses of adversarial games against their definitions, and what their papers say of them."""

from __future__ import annotations

import pytest
import torch

from volvelle.parts.adversarial import losses
from volvelle.parts.adversarial.losses import KINDS, gan_loss

SCORES = torch.tensor([[-3.0, 0.2], [0.9, 1.7], [40.0, -40.0]], dtype=torch.float64)


def definition(kind, real, player, s):
    """The table at the head of the file, one score at a time."""
    d = 1 / (1 + torch.exp(-s))
    if kind == "minimax":
        return torch.log(1 - d) if player == "generator" else -torch.log(d if real else 1 - d)
    if kind == "non-saturating":
        return -torch.log(d if real else 1 - d)
    if kind == "least-squares":
        return (s - (1.0 if real else 0.0)) ** 2 / 2
    if kind == "hinge" and player == "discriminator":
        return torch.clamp(1 - s if real else 1 + s, min=0)
    return -s if real else s


CASES = [(k, r, "discriminator") for k in KINDS for r in (True, False)] + [(k, True, "generator") for k in KINDS]


def check(kind, real, player):
    s = SCORES.clamp(-9, 9)  # beyond, 1 - D loses the definition's digits, not ours
    expected = definition(kind, real, player, s).mean()
    torch.testing.assert_close(gan_loss(s, real, kind, for_=player), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "real", "player"), CASES)
def test_the_definition(kind, real, player):
    check(kind, real, player)


@pytest.mark.parametrize(("kind", "real", "player"), CASES)
def test_gradients_and_huge_scores(kind, real, player):
    s = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gan_loss(x, real, kind, for_=player), s)
    huge = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = gan_loss(huge, real, kind, for_=player)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(huge.grad).all()


def test_the_minimax_gradient_vanishes_where_the_discriminator_is_sure_and_the_other_does_not():
    s = torch.tensor([-20.0], requires_grad=True)
    slopes = [float(torch.autograd.grad(gan_loss(s, True, k, for_="generator"), s)[0].abs()) for k in KINDS[:2]]
    assert slopes[0] < 1e-8
    assert slopes[1] > 0.999


def test_the_best_discriminator_gives_the_jensen_shannon_divergence():
    p, q = (torch.rand(2, 50, dtype=torch.float64) + 0.01).unbind()
    p, q = p / p.sum(), q / q.sum()
    best = (p / q).log()  # D = p / (p + q)
    value = sum((w * gan_loss(s[None], r)).sum() for w, s, r in _terms(p, q, best))
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    torch.testing.assert_close(-value, 2 * js - 2 * torch.log(torch.tensor(2.0, dtype=torch.float64)))
    for _ in range(20):
        other = best + 0.3 * torch.randn(50, dtype=torch.float64)
        assert sum((w * gan_loss(s[None], r)).sum() for w, s, r in _terms(p, q, other)) > value


def _terms(p, q, scores):
    for mass, real in ((p, True), (q, False)):
        yield from ((m, s, real) for m, s in zip(mass, scores, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_averaged_wide(dtype):
    s = torch.full((4096,), 1.001, dtype=dtype)
    found = gan_loss(s, True, "wasserstein")
    assert found.dtype == torch.float32
    assert float(found) == -float(s[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert gan_loss(s, False).dtype == torch.float32


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="kind must be one of minimax"):
        gan_loss(SCORES, True, "wgan")
    with pytest.raises(ValueError, match="real=True"):
        gan_loss(SCORES, False, for_="generator")
    with pytest.raises(ValueError, match="at least one score"):
        gan_loss(torch.zeros(0), True)
    with pytest.raises(ValueError, match="discriminator or generator"):
        gan_loss(SCORES, True, for_="critic")
    assert torch.isnan(gan_loss(torch.tensor([0.0, torch.nan]), True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exchanged_label_is_caught(kind, monkeypatch):
    original = losses._each
    monkeypatch.setattr(losses, "_each", lambda s, real, kind, player: original(s, not real, kind, player))
    with pytest.raises(AssertionError):
        check(kind, True, "discriminator")
