"""The claims on average precision and on the Fréchet distance hold, and would not if the metrics were wrong."""

from __future__ import annotations

import pytest
import torch

from volvelle.claims import average_precision, frechet_distance
from volvelle.claims.claim import Measurement
from volvelle.errors import VolvelleError
from volvelle.parts.metrics import average_precision as curves
from volvelle.parts.metrics import mean_average_precision
from volvelle.systems.generation.extractor import PixelFeatures


def broken(findings):
    return [f.what for f in findings if f.held is False]


# Average precision.


def test_the_loop_follows_the_kit_by_hand():
    """A hit, its copy (a false alarm), a difficult object (ignored), a hit: precisions 1 and 2 / 3."""
    box = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], dtype=torch.float64)
    target = {"boxes": box, "labels": torch.zeros(3).long(), "iscrowd": torch.tensor([False, True, False])}
    pred = {"boxes": box[[0, 0, 1, 2]], "labels": torch.zeros(4).long(), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    assert average_precision.by_loops([(pred, target)], 0, eleven=False) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision.by_loops([(pred, target)], 0, eleven=True) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision.by_loops([(pred, target)], 1, eleven=True) is None


def test_the_claim_on_average_precision_holds():
    found = average_precision.measure("quick")
    assert found.verdict == "held", broken(found.findings)
    assert "average precision" in found.pictures["low"]


def test_precision_that_is_not_made_monotone_would_be_noticed(monkeypatch):
    monkeypatch.setattr(curves, "monotone", lambda precision: precision)
    found = broken(average_precision._voc(2, 10))
    assert found == [
        "largest difference of VOC 2007's AP (11 points) from the loop",
        "largest difference of VOC 2010's AP (area) from the loop",
    ]


def test_copies_that_count_as_hits_would_be_noticed(monkeypatch):
    right = mean_average_precision.match_voc

    def wrong(cells, threshold):
        hits, ignored = right(cells, threshold)
        return hits | (cells.mask & ~ignored), ignored

    monkeypatch.setattr(mean_average_precision, "match_voc", wrong)
    assert broken(average_precision._voc(2, 10))


def test_an_area_in_place_of_101_points_would_be_noticed(monkeypatch):
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(
        mean_average_precision, "recall_levels", lambda n, *rest: torch.linspace(0, 1, 1001, dtype=torch.float64)
    )
    found, versions = average_precision._coco(1, 10)
    assert broken(found)
    assert versions


# Fréchet distance.


def test_the_closed_form_holds_and_one_without_the_cross_term_would_be_noticed(monkeypatch):
    assert broken(frechet_distance._closed()) == []
    monkeypatch.setattr(
        "volvelle.parts.metrics.frechet.frechet_distance",
        lambda m1, s1, m2, s2: (m1 - m2).square().sum() + (s1.trace().sqrt() - s2.trace().sqrt()) ** 2,
    )
    assert len(broken(frechet_distance._closed())) == 3


def test_bias_falls_with_samples_and_an_unbiased_estimate_would_break_the_claim(monkeypatch):
    assert broken([*frechet_distance._known(4), *frechet_distance._order(4)]) == []
    truth = frechet_distance.WIDTH * (1 - 0.5**0.5) ** 2
    monkeypatch.setattr(frechet_distance, "sampled", lambda d, scale, n, draws: truth + (1e-6 if n % 400 else -1e-6))
    assert Measurement(frechet_distance._known(1)).verdict == "not held"


def pictures(count, seed):
    """Smooth blobs, so that every disturbance changes them."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=draw) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (28, 28), mode="bilinear")


def test_every_disturbance_rises_and_a_distance_that_does_not_would_be_noticed():
    real, others, foreign = pictures(300, 0), pictures(300, 1), -pictures(300, 2).abs()
    curves, floor = frechet_distance.disturbed(PixelFeatures(), real, others, foreign)
    assert all(values[0] == floor for values in curves.values())
    assert {kind for kind, values in curves.items() if values != sorted(values)} <= {"blur", "swirl"}, curves
    curves["noise"][2] = curves["noise"][1]
    found = frechet_distance._rising(curves, floor, "pixels-8")
    assert found[0].held is False
    assert "noise" in str(found[1].value)


def test_all_of_it_is_measured_and_nothing_without_pictures(monkeypatch):
    def missing(name, *, size):
        raise VolvelleError(f"no {name}")

    extractors = "volvelle.systems.generation.extractor.open_extractor"
    monkeypatch.setattr(extractors, lambda name, *, size: PixelFeatures())
    monkeypatch.setattr(
        frechet_distance, "drawn", lambda real, count: (pictures(real, 0), pictures(count, 1), pictures(count, 2))
    )
    found = frechet_distance.measure("quick")
    assert found.findings[0].value in range(7)
    assert "salt and pepper" in found.pictures["levels"]
    halves = next(f for f in found.findings if f.what.startswith("halves of one set"))
    assert halves.held
    monkeypatch.setattr(extractors, missing)
    assert frechet_distance.measure("quick").verdict == "not measurable here"


@pytest.mark.parametrize("kind", frechet_distance.LEVELS)
def test_disturbances_keep_range_and_shape_and_grow(kind):
    before, foreign = pictures(40, 3), pictures(40, 4)
    moved = []
    for level in frechet_distance.LEVELS[kind]:
        after = frechet_distance.disturb(before, kind, level, foreign)
        assert after.shape == before.shape
        assert after.abs().max() <= 1 + 1e-5
        moved.append(float((after - before).square().mean()))
    assert moved == sorted(moved)
    assert moved[0] > 0
