"""The claim box-regression: what follows from the formulas holds in a small simulation; wrong formulas are caught."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import box_regression
from volvelle.parts.regions import iou

EXPERIMENT = ("error left by DIoU over GIoU", "steps of DIoU until a tenth of the error, over GIoU's")
"""What the paper found in its simulation, and no formula promises."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(box_regression, "POINTS", {"quick": 1})
    monkeypatch.setattr(box_regression, "STEPS", 40)


def broken():
    found = box_regression.measure("quick")
    return [f.what for f in found.findings if f.held is False and f.what not in EXPERIMENT]


def test_what_follows_from_the_formulas_holds():
    assert broken() == []


def penalised(right):
    return lambda a, b: right(a, b) - 0.1 * (a[..., :2] - b[..., :2]).abs().sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "mutant", "what"),
    [
        ("generalized_box_iou", lambda right: iou.box_iou, "least gradient"),
        ("distance_box_iou", lambda right: lambda *given: right(*given) + 1, "minus IoU, largest"),
        ("box_iou", penalised, "how far a box moved"),
    ],
)
def test_a_wrong_formula_is_not_held(name, mutant, what, monkeypatch):
    monkeypatch.setattr(iou, name, mutant(getattr(iou, name)))
    assert any(what in one for one in broken())


def test_the_published_step_differs_in_the_centre_alone():
    anchors, targets = box_regression.cases(1)
    ours = box_regression._uphill("distance_box_iou", anchors, targets)
    theirs = box_regression._published(anchors, targets)
    assert torch.equal(ours[:, 2:], theirs[:, 2:])
    towards = (targets - anchors)[:, :2]
    # It pushes on: nowhere less towards the target than the gradient.
    assert bool((((theirs - ours)[:, :2] * towards) >= 0).all())
    assert not torch.equal(ours[:, :2], theirs[:, :2])


def test_cases_are_those_of_the_paper():
    anchors, targets = box_regression.cases(3)
    assert len(anchors) == 3 * 49 * 7
    assert torch.allclose(targets[:, 2] * targets[:, 3], torch.ones(len(targets), dtype=torch.float64))
    areas = (anchors[:, 2] * anchors[:, 3]).unique()
    assert areas.min() == pytest.approx(0.5)
    assert areas.max() == pytest.approx(2.0)
    assert bool((anchors[:, :2].norm(dim=1) <= box_regression.RADIUS).all())
