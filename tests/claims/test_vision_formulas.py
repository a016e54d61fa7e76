"""The claims axial-rope, roi-align, soft-nms and unpooling: their formulas hold, and wrong ones are not held."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import axial_rope, garments, roi_align, soft_nms, unpooling
from volvelle.errors import VolvelleError
from volvelle.parts.position import axial
from volvelle.parts.regions import roi_align as aligning
from volvelle.parts.regions import soft_nms as softly
from volvelle.parts.resampling import unpooling as back

RIGHT = {
    "rope": axial.apply_axial_rope,
    "align": aligning.roi_align,
    "soft": softly.soft_nms,
    "unpool": back.max_unpool2d,
}


def broken(found):
    return [finding.what for finding in found.findings if finding.held is False]


@pytest.mark.parametrize("claim", [axial_rope, roi_align, soft_nms, unpooling])
def test_the_formulas_hold(claim, monkeypatch):
    monkeypatch.setattr(soft_nms, "OBJECTS", 6)
    found = claim.measure("quick")
    assert broken(found) == []
    assert found.verdict == "held"
    assert len({finding.what for finding in found.findings}) == len(found.findings)


def rows_alone(q, k, positions, **options):
    """Columns turn nothing."""
    return RIGHT["rope"](q, k, positions * torch.tensor([1, 0]), **options)


def added(q, k, positions, **options):
    """Positions that are added to the features instead of turning them."""
    return q + positions.sum(-1)[:, None], k


@pytest.mark.parametrize(("mutant", "what"), [(rows_alone, "drawn apart"), (added, "moved by 7 rows")])
def test_a_wrong_rotation_is_not_held(mutant, what, monkeypatch):
    monkeypatch.setattr(axial, "apply_axial_rope", mutant)
    assert any(what in one for one in broken(axial_rope.measure("quick")))


def rounded(maps, boxes, bins, **options):
    """Corners that are rounded to cells first."""
    boxes = (
        [one.round() for one in boxes]
        if isinstance(boxes, list)
        else torch.cat((boxes[:, :1], boxes[:, 1:].round()), 1)
    )
    return RIGHT["align"](maps, boxes, bins, **options)


def test_a_rounding_align_is_not_held(monkeypatch):
    monkeypatch.setattr(aligning, "roi_align", rounded)
    found = broken(roi_align.measure("quick"))
    assert any("from a bin's middle" in one for one in found)
    assert any("over RoI pooling" in one for one in found)


def hard(boxes, scores, **options):
    """Everything that overlaps is removed, as by NMS at 0.3."""
    return RIGHT["soft"](boxes, scores, sigma=1e-6)


def test_a_hard_suppression_gains_nothing(monkeypatch):
    monkeypatch.setattr(softly, "soft_nms", hard)
    assert any("less NMS at 0.3" in one for one in broken(soft_nms.measure("quick")))


def moved(values, indices, *words, **options):
    """Each value a place too far."""
    return RIGHT["unpool"](values, indices, *words, **options).roll(1, -1)


def test_misplaced_values_are_not_held(monkeypatch):
    monkeypatch.setattr(back, "max_unpool2d", moved)
    assert len(broken(unpooling.measure("quick"))) == 3


@pytest.fixture
def pictures(monkeypatch):
    """The full claims on random pictures, a step a network."""
    draw = torch.Generator().manual_seed(0)

    def few(train, test):
        images, labels = torch.rand(80, 1, 28, 28, generator=draw), torch.randint(10, (80,), generator=draw)
        return (images, labels), (images[:40], labels[:40])

    monkeypatch.setattr(garments, "garments", few)
    for claim in (axial_rope, unpooling):
        monkeypatch.setattr(claim, "STEPS", 1)
        monkeypatch.setattr(claim, "SEEDS", 1)
    monkeypatch.setattr("volvelle.claims.garments.scenes", few_scenes)


def few_scenes(images, labels, count, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(70, 1, 56, 56, generator=draw), torch.randint(11, (70, 56, 56), generator=draw)


@pytest.mark.parametrize(
    ("claim", "figures"), [(axial_rope, ["rotary: accuracy at 56 x 56"]), (unpooling, ["bilinear: boundary IoU"])]
)
def test_networks_are_trained_and_compared(claim, figures, pictures):
    found = {finding.what: finding for finding in claim.measure("full").findings}
    assert set(figures) <= set(found)
    assert all(0 <= found[one].value <= 100 for one in figures)


@pytest.mark.parametrize("claim", [axial_rope, unpooling])
def test_without_pictures_the_formula_is_left(claim, monkeypatch):
    def missing(train, test):
        raise VolvelleError("no network")

    monkeypatch.setattr(garments, "garments", missing)
    found = claim.measure("full")
    assert found.verdict == "held"
    assert found.notes == ["nothing was trained: no network"]


def test_networks_differ_in_positions_alone():
    rotary, learned = (axial_rope.network(kind, 0) for kind in ("rotary", "learned"))
    assert {name for name, _ in learned.named_parameters()} - {name for name, _ in rotary.named_parameters()} == {
        "table"
    }
    ways = {kind: unpooling.network(kind, 0).state_dict() for kind in unpooling.KINDS}
    for other in ways.values():
        assert all(torch.equal(other[name], value) for name, value in ways["nearest"].items())
    with torch.no_grad():
        outs = [unpooling.network(kind, 0).eval()(torch.rand(1, 1, 22, 26, generator=torch.Generator().manual_seed(0)))
                for kind in unpooling.KINDS]  # fmt: skip
    assert {out.shape for out in outs} == {(1, 11, 22, 26)}
    assert not torch.equal(outs[0], outs[1])
