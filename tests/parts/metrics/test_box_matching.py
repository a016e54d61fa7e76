"""Which detection finds which object, at the edges of the rules: ranges, thresholds, equal overlaps, limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.parts.metrics.test_average_precision import figures_of, one

from volvelle.parts.metrics import box_matching


def test_ranges_of_area_hold_their_ends():
    """An object of 32 x 32 pixels is small and medium; one pixel more or less is one of them alone."""
    for side, names in ((32.0, ("small", "medium")), (96.0, ("medium", "large")), (33.0, ("medium",))):
        box = [[0, 0, side, side]]
        found = figures_of([(one(box, [0], [0.9]), one(box, [0]))]).compute()
        for name in ("small", "medium", "large"):
            assert float(found[f"map_{name}"]) == pytest.approx(1.0 if name in names else -1.0)
            assert float(found[f"mar_{name}"]) == pytest.approx(1.0 if name in names else -1.0)
        for name in ("map", "map_50", "mar_100"):
            assert found[f"{name}_per_class"].tolist() == pytest.approx([1.0]), "of objects of all areas"


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
    for limits in ((1, 2), (1, 2, 3)):
        figures = figures_of([(found, there)] * 2, max_detection_thresholds=limits).compute()
        assert float(figures["mar_1"]) == pytest.approx((1 / 3 + 1) / 2)
        assert float(figures["mar_2"]) == pytest.approx((2 / 3 + 1) / 2)
        assert figures[f"mar_{limits[-1]}_per_class"].tolist() == pytest.approx([limits[-1] / 3, 1])
        assert figures["map_50_per_class"].tolist() == pytest.approx([(67 if len(limits) == 2 else 101) / 101, 1])


def test_figures_of_one_threshold_and_of_all():
    """An IoU of 0.6 is a hit at 0.5, 0.55 and 0.6."""
    found, there = one([[0, 0, 10, 6]], [0], [0.9]), one([[0, 0, 10, 10]], [0])
    figures = figures_of([(found, there)]).compute()
    assert figures["map_50_per_class"].tolist() == pytest.approx([1])
    assert figures["map_per_class"].tolist() == pytest.approx([0.3])
    without = figures_of([(found, there)], iou_thresholds=[0.75]).compute()
    assert without["map_50_per_class"].tolist() == [-1], "0.5 was not asked for"


def test_a_class_without_objects_has_no_figure():
    found, there = one([[0, 0, 10, 10], [0, 0, 9, 9]], [0, 4], [0.9, 0.8]), one([[0, 0, 10, 10]], [0])
    figures = figures_of([(found, there)])
    assert figures.voc()["map_per_class"].tolist() == pytest.approx([1, -1])
    assert float(figures.voc()["map"]) == pytest.approx(1)
    assert figures.compute()["map_per_class"].tolist() == pytest.approx([1, -1])
    assert figures.compute()["classes"].tolist() == [0, 4]


@pytest.mark.parametrize("area", [0.0, 0.5])
def test_an_object_without_area_is_a_small_one(area):
    found, there = one([[0, 0, 10, 10]], [0], [0.9]), one([[0, 0, 10, 10]], [0], area=torch.tensor([area]))
    figures = figures_of([(found, there)]).compute()
    assert [float(figures[f"map{name}"]) for name in ("", "_small", "_medium")] == pytest.approx([1, 1, -1])


@pytest.mark.parametrize(("area", "counts"), [(-0.5, False), (1e10, True), (1e10 + 0.5, False)])
def test_areas_beyond_all_ranges_are_ignored(area, counts):
    area = torch.tensor([area], dtype=torch.float64)
    figures = figures_of([(one([[0, 0, 10, 10]], [0], [0.9]), one([[0, 0, 10, 10]], [0], area=area))]).compute()
    found = [float(figures[f"{name}{range_}"]) for name in ("map", "mar") for range_ in ("_small", "_large")]
    assert found == pytest.approx([-1, 1, -1, 1] if counts else [-1] * 4)
    assert [float(figures[name]) for name in ("map", "mar_100")] == pytest.approx([1, 1] if counts else [-1, -1])


def test_objects_keep_their_order_however_many_there_are():
    """Of a hundred equal objects of each class the first alone is difficult, so that VOC ignores the detection."""
    labels = [0, 1, 2] * 100
    there = one([[0, 0, 10, 10]] * 300, labels, iscrowd=torch.arange(300) < 3)
    figures = figures_of([(one([[0, 0, 10, 10]] * 3, [0, 1, 2], [0.9] * 3), there)])
    assert figures.voc()["map_per_class"].tolist() == [0, 0, 0]


def test_an_overlap_just_below_one_counts_as_one():
    """As in pycocotools, whose largest threshold lies a ten-thousand-millionth below 1."""
    for less, hit in ((5e-11, 1.0), (5e-10, 0.0)):
        found, there = one([[0, 0, 1, 1 - less]], [0], [0.9]), one([[0, 0, 1, 1]], [0])
        found, there = ({**x, "boxes": x["boxes"].double()} for x in (found, there))
        found["boxes"][0, 3] = 1 - less
        assert float(figures_of([(found, there)], iou_thresholds=[1.0]).compute()["map"]) == pytest.approx(hit)


def test_boxes_without_area_overlap_nothing():
    boxes = torch.tensor([[[3.0, 3, 3, 3], [0, 0, 4, 4]]])
    crowd = torch.tensor([[False, False]])
    assert box_matching.overlaps(boxes, boxes, crowd).tolist() == [[[0, 0], [0, 1]]]
    assert box_matching.overlaps(boxes, boxes, ~crowd).tolist() == [[[0, 0], [0, 1]]]


def test_overlaps_of_boxes_of_less_than_a_pixel():
    boxes = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.0, 0, 0.25, 0.5], [1.0, 1, 2, 2]]])
    found = box_matching.overlaps(boxes, boxes, torch.zeros(1, 3, dtype=torch.bool))
    assert found.tolist() == [[[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]]
    crowd = box_matching.overlaps(boxes, boxes, torch.ones(1, 3, dtype=torch.bool))
    assert crowd.tolist() == [[[1, 0.5, 0], [1, 1, 0], [0, 0, 1]]], "the share of the detection"


def blocks_of(counts, monkeypatch, block):
    """(detections, objects) of the cells of each block, for pictures of one class with so many of each.

    The cells of a block are padded to the most of each, and to one object at least.
    """
    monkeypatch.setattr(box_matching, "BLOCK", block)
    pictures = []
    for many, there in counts:
        found, truth = one([[0, 0, 9, 9]] * many, [0] * many, [0.5] * many), one([[0, 0, 9, 9]] * there, [0] * there)
        pictures += figures_of([(found, truth)]).pictures
    classes = torch.zeros(1, dtype=torch.int64)
    found = box_matching._detections(pictures, classes, None)
    blocks = []
    for rows, cells in box_matching._blocks(pictures, classes, found):
        many, there = cells.mask.sum(1).tolist(), cells.there.sum(1).tolist()
        assert rows.shape == cells.mask.shape == (len(many), max(many))
        assert cells.there.shape == (len(many), max(1, *there))
        blocks.append(list(zip(many, there, strict=True)))
    return blocks


def test_blocks_hold_cells_of_like_size_as_many_as_fit(monkeypatch):
    """By detections, then by objects; a block is full where one more cell would not fit, a large one stands alone."""
    draw = torch.Generator().manual_seed(0)
    counts = [(1 + int(a), int(b)) for a, b in torch.randint(0, 6, (40, 2), generator=draw)]
    in_order = sorted(counts)

    def pairs(cells):
        return len(cells) * max(many for many, _ in cells) * max(1, *(there for _, there in cells))

    for block in (1, 12, 60):
        found = blocks_of(counts, monkeypatch, block)
        assert [cell for cells in found for cell in cells] == in_order
        assert all(len(cells) == 1 or pairs(cells) <= block for cells in found)
        assert all(pairs([*cells, after[0]]) > block for cells, after in itertools.pairwise(found))
    assert len(blocks_of(counts, monkeypatch, 10**6)) == 1
    assert blocks_of([(2, 0), (1, 0)], monkeypatch, 60) == [[(1, 0), (2, 0)]], "no object at all"
    alone = blocks_of([(1, 0)] * 10, monkeypatch, 4)
    assert [len(cells) for cells in alone] == [4, 4, 2], "a cell without objects is as large as one with one"
