"""The claim rslora: exponents on a small network, and that wrong scales are not held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from volvelle.adapt.methods import LoRA
from volvelle.claims import garments as pictures
from volvelle.claims import rslora
from volvelle.errors import VolvelleError

RANKS = (4, 16, 64)


def some(train, test):
    """Random pictures, brighter where the label is odd: as learnable as two classes of garments."""
    draw = torch.Generator().manual_seed(0)

    def part(count):
        y = torch.randint(2, (count,), generator=draw)
        return torch.rand(count, 1, 28, 28, generator=draw) * (0.5 + 0.5 * y[:, None, None, None]), y

    return part(min(train, 512)), part(min(test, 256))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pictures, "garments", some)
    monkeypatch.setattr(rslora, "WIDTH", 128)
    monkeypatch.setattr(rslora, "QUICK", (RANKS, 1, 8))


def exponents(found):
    return {f.what: f.held for f in found.findings if "exponent" in f.what}


def test_exponents_are_those_of_the_mathematics():
    held = exponents(rslora.measure("quick"))
    assert len(held) == 6
    assert all(held.values()), held


def test_scales_that_are_swapped_are_not_held(monkeypatch):
    """A mutant: rslora=true divides by the rank, and the plain method by its root."""
    right = rslora.method
    monkeypatch.setattr(rslora, "method", lambda rank, root: right(rank, root=not root))
    found = rslora.measure("quick")
    assert found.verdict == "not held"
    assert not any(exponents(found).values())


def test_a_scale_without_the_root_is_not_held(monkeypatch):
    """A mutant: rslora changes nothing."""
    monkeypatch.setattr(rslora, "method", lambda rank, root: LoRA(rank, 16.0, targets=("1", "3")))
    held = exponents(rslora.measure("quick"))
    assert [kept for what, kept in held.items() if what.startswith("rsLoRA")] == [False] * 3


def test_a_training_starts_from_the_base_and_leaves_it_alone():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    before = [p.clone() for p in net.parameters()]
    sets = some(512, 256)
    start = rslora._loss(net, sets[1]).item()
    idle = rslora.trained(net, sets, 4, 0, 3, 0.0, root=True)
    moved = rslora.trained(net, sets, 4, 0, 8, 1e-3, root=True)
    assert idle.loss == pytest.approx(start, rel=1e-6)
    assert moved.loss < start
    assert moved.gradient > 0
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def test_without_pictures_nothing_is_claimed(monkeypatch):
    def missing(train, test):
        raise VolvelleError("no network")

    monkeypatch.setattr(pictures, "garments", missing)
    assert "no network" in rslora.measure("quick").unmeasurable
