"""Which detection finds which object, at the edges of the rules: ranges, thresholds, equal overlaps, limits."""

from __future__ import annotations

import pytest
import torch
from tests.parts.metrics.test_average_precision import figures_of, one


def test_ranges_of_area_hold_their_ends():
    """An object of 32 x 32 pixels is small and medium; one pixel more or less is one of them alone."""
    for side, names in ((32.0, ("small", "medium")), (96.0, ("medium", "large")), (33.0, ("medium",))):
        box = [[0, 0, side, side]]
        found = figures_of([(one(box, [0], [0.9]), one(box, [0]))]).compute()
        for name in ("small", "medium", "large"):
            assert float(found[f"map_{name}"]) == pytest.approx(1.0 if name in names else -1.0)
            assert float(found[f"mar_{name}"]) == pytest.approx(1.0 if name in names else -1.0)


def test_the_threshold_itself_is_a_hit():
    there, found = one([[0, 0, 10, 10]], [0]), one([[0, 0, 10, 5]], [0], [0.9])  # an IoU of 0.5
    figures = figures_of([(found, there)])
    assert float(figures.voc()["map"]) == float(figures.compute()["map_50"]) == pytest.approx(1.0)
    assert float(figures.voc(0.51)["map"]) == 0
    assert float(figures.compute()["map"]) == pytest.approx(0.1)
    exact = figures_of([(one([[0, 0, 9, 9]], [0], [0.9]), one([[0, 0, 9, 9]], [0]))], iou_thresholds=[1.0])
    assert float(exact.compute()["map"]) == pytest.approx(1.0)
    assert float(exact.compute()["map_50"]) == -1, "a threshold that was not asked for has no figure"


def test_of_equal_overlaps_voc_takes_the_first_object_and_coco_the_last():
    there = one([[0, 0, 10, 10], [0, 0, 10, 10]], [0, 0], iscrowd=torch.tensor([True, False]))
    found = one([[0, 0, 10, 10]], [0], [0.9])
    figures = figures_of([(found, there)])
    assert float(figures.voc()["map"]) == 0, "the first is difficult, so the detection is ignored"
    assert float(figures.compute()["map"]) == pytest.approx(1.0)
    assert [len(figures.pictures), len(figures)] == [1, 1]


def test_detections_beyond_the_last_limit_are_cut_off():
    """The surest of a class in a picture, in each class and picture apart."""
    boxes = [[20.0 * i, 0, 20 * i + 10, 10] for i in range(4)]
    there, found = one(boxes, [0, 0, 0, 1]), one(boxes, [0, 0, 0, 1], [0.9, 0.8, 0.7, 0.1])
    figures = figures_of([(found, there)] * 2, max_detection_thresholds=(1, 2)).compute()
    assert float(figures["mar_1"]) == pytest.approx((1 / 3 + 1) / 2)
    assert float(figures["mar_2"]) == pytest.approx((2 / 3 + 1) / 2)
    assert figures["mar_2_per_class"].tolist() == pytest.approx([2 / 3, 1])
    assert figures["map_50_per_class"].tolist() == pytest.approx([67 / 101, 1])
