"""The claims sinusoidal, mrope, similarity and precision-recall hold, and wrong formulas are not held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volvelle.claims import garments as pictures
from volvelle.claims import mrope, precision_recall, similarity, sinusoidal
from volvelle.data import scenes
from volvelle.errors import VolvelleError
from volvelle.parts.metrics import manifold_precision_recall as manifolds
from volvelle.parts.metrics import psnr, ssim
from volvelle.parts.position import multimodal_rope
from volvelle.parts.position import sinusoidal as tables


def broken(found):
    return [finding.what for finding in found.findings if finding.held is False]


def test_sinusoidal_positions_hold():
    assert broken(sinusoidal.measure("quick")) == []


def swapped(positions, dim, **options):
    """Sines and cosines of different frequencies in one pair."""
    table = RIGHT_TABLE(positions, dim, **options)
    return torch.stack((table[..., ::2], table[..., 1::2].roll(1, -1)), -1).flatten(-2)


def squared(positions, dim, **options):
    """Positions that are no longer evenly spaced."""
    return RIGHT_TABLE(positions * positions, dim, **options)


RIGHT_TABLE = tables.sinusoidal_positions


@pytest.mark.parametrize(("mutant", "what"), [(swapped, "difference from the formula"), (squared, "one linear map")])
def test_a_wrong_table_is_not_held(mutant, what, monkeypatch):
    monkeypatch.setattr(tables, "sinusoidal_positions", mutant)
    assert any(what in one for one in broken(sinusoidal.measure("quick")))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mrope, "GRID", (2, 5, 4))


def test_mrope_holds(small):
    found = mrope.measure("quick")
    assert broken(found) == []
    assert found.findings[-2].value == 39


@pytest.mark.parametrize(
    ("mutant", "what"),
    [
        (lambda right: lambda q, k, at, **o: right(q, k, at.flip(-1), **o), "features that a coordinate turns"),
        (lambda right: lambda q, k, at, **o: right(q, k, at * at, **o), "all tokens moved by one step"),
        (lambda right: lambda q, k, at, **o: right(q, k, at, **o | {"base": 9999.0}), "difference from RoPE"),
    ],
)
def test_a_wrong_rotation_is_not_held(mutant, what, small, monkeypatch):
    """Coordinates exchanged, positions squared, another base."""
    monkeypatch.setattr(multimodal_rope, "apply_mrope", mutant(multimodal_rope.apply_mrope))
    assert any(what in one for one in broken(mrope.measure("quick")))


class Drawn:
    """Scenes without garments: noise made smooth, with edges."""

    def __init__(self, count, **_):
        pass

    def scene(self, number):
        draw = np.random.default_rng(number)
        smooth = np.kron(draw.random((16, 16, 3)), np.ones((8, 8, 1)))
        return type("Scene", (), {"image": (255 * smooth).astype(np.uint8)})


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(scenes, "Scenes", Drawn)


def test_similarity_holds(drawn):
    assert set(broken(similarity.measure("quick"))) <= {
        # Squares of 8 are what blocks of 8 leave alone; a garment is not.
        "least SSIM of those that keep the structure, minus the largest of the others"
    }


@pytest.mark.parametrize(
    ("mutant", "what"),
    [
        (lambda x, y, span: 1 - (x - y).abs().flatten(1).mean(1), "at one squared error"),
        (lambda x, y, span: RIGHT_SSIM(x, y, span) + 0.001 * x.flatten(1).mean(1), "arguments exchanged"),
        (lambda x, y, span: RIGHT_SSIM(x, y, span, window=9), "scikit-image"),
    ],
)
def test_another_similarity_is_not_held(mutant, what, drawn, monkeypatch):
    if what == "scikit-image":
        pytest.importorskip("skimage")
    monkeypatch.setattr(ssim, "structural_similarity", mutant)
    assert any(what in one for one in broken(similarity.measure("quick")))


RIGHT_SSIM = ssim.structural_similarity


def test_decibels_of_another_error_are_not_held(drawn, monkeypatch):
    monkeypatch.setattr(psnr, "peak_signal_noise_ratio", lambda x, y, span: (x - y).abs().flatten(1).amax(1))
    assert any("PSNR" in one for one in broken(similarity.measure("quick")))


def classes(train, test):
    """Ten kinds of pictures: a bright row each, at another height, of another length every time."""
    draw = torch.Generator().manual_seed(train)

    def part(count):
        y = torch.arange(count) % 10
        x = 0.05 * torch.rand(count, 1, 28, 28, generator=draw)
        ends = torch.randint(8, 28, (count,), generator=draw)
        for picture, label, end in zip(x, y, ends, strict=True):
            picture[0, 2 * label + 2 : 2 * label + 5, :end] = 1.0
        return x, y

    return part(min(train, 600)), part(min(test, 400))


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(pictures, "garments", classes)
    monkeypatch.setattr(precision_recall, "COUNT", {"quick": 200})


def test_precision_and_recall_hold(kinds):
    found = precision_recall.measure("quick")
    assert broken(found) == []
    assert len([finding for finding in found.findings if finding.held]) == 6


def test_exchanged_they_are_not_held(kinds, monkeypatch):
    right = manifolds.manifold_precision_recall
    monkeypatch.setattr(manifolds, "manifold_precision_recall", lambda *given: right(*given)[::-1])
    assert len(broken(precision_recall.measure("quick"))) >= 4


def test_without_pictures_nothing_is_claimed(monkeypatch):
    def missing(*_, **__):
        raise VolvelleError("no network")

    monkeypatch.setattr(pictures, "garments", missing)
    monkeypatch.setattr(scenes, "Scenes", missing)
    assert "no network" in precision_recall.measure("quick").unmeasurable
    assert "no network" in similarity.measure("quick").unmeasurable
