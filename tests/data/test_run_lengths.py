"""Run lengths of masks: pycocotools' letters, round trips, boxes, unions, and strings that are none."""

from __future__ import annotations

import numpy as np
import pytest

from volvelle.data.polygons import fill_polygons, trace_polygons
from volvelle.data.run_lengths import RunLengths, compress, expand, union
from volvelle.errors import VolvelleError


def masks(count=120, seed=0):
    """Noise of every density, and blocks, of ragged sizes."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        mask = draw.random(draw.integers(1, 30, 2)) < draw.choice([0, 0.02, 0.5, 0.9, 1])
        yield np.kron(mask, np.ones((4, 3), dtype=bool)) if number % 3 == 0 else mask


def test_every_mask_comes_back():
    for mask in masks():
        found = RunLengths.of(mask)
        assert np.array_equal(found.mask(), mask)
        assert found.area == mask.sum()
        assert found.counts.sum() == mask.size
        for compressed in (False, True):
            assert RunLengths.from_coco(found.to_coco(compressed=compressed)) == found
        y, x = np.nonzero(mask)
        box = (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else (0, 0, 0, 0)
        assert found.box == box


@pytest.mark.peer
def test_letters_areas_and_boxes_are_pycocotools():
    peer = pytest.importorskip("pycocotools.mask")
    for mask in masks(seed=1):
        found, theirs = RunLengths.of(mask), peer.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert found.to_coco() == {"size": theirs["size"], "counts": theirs["counts"].decode()}
        assert found.area == peer.area(theirs)
        x1, y1, x2, y2 = found.box
        assert [x1, y1, x2 - x1, y2 - y1] == peer.toBbox(theirs).tolist()


def test_large_counts_and_both_signs_of_differences():
    counts = np.array([0, 30_000_000, 5, 400_000_000, 1, 2, 3, 100_000_000, 15, 16, 17, 31, 32, 33])
    assert expand(compress(counts)).tolist() == counts.tolist()
    assert compress(np.zeros(0, dtype=np.int64)) == ""


def test_a_part_is_placed_without_the_whole():
    draw = np.random.default_rng(3)
    for _ in range(60):
        high, wide = draw.integers(1, 20, 2)
        y1, y2 = np.sort(draw.integers(0, high + 1, 2))
        x1, x2 = np.sort(draw.integers(0, wide + 1, 2))
        whole = np.zeros((high, wide), dtype=bool)
        whole[y1:y2, x1:x2] = draw.random((y2 - y1, x2 - x1)) < 0.7
        part = RunLengths.placed(np.ascontiguousarray(whole[y1:y2, x1:x2].T), (x1, y1), (high, wide))
        assert part == RunLengths.of(whole)


def test_unions():
    pairs = list(zip(masks(seed=4), masks(seed=5), strict=True))
    for one, two in pairs:
        other = np.resize(two, one.shape)
        assert np.array_equal(union([RunLengths.of(one), RunLengths.of(other)]).mask(), one | other)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"size": [2, 3], "counts": [1, 2]}, "add up to 2 x 3 = 6"),
        ({"size": [2, 3], "counts": [7, -1]}, "must be a string or whole numbers"),
        ({"size": [2, 3], "counts": "6Z"}, "break off"),
        ({"size": [2, 3], "counts": "6 "}, "letter 1"),
        ({"size": [2, 3], "counts": "6\u00e9"}, "add up|letter 1"),
        ({"size": [2, 3], "counts": "o" * 20 + "0"}, "more than 13 letters"),
        ({"size": [2], "counts": "6"}, "size must be"),
        ({"size": [2, 3.5], "counts": "6"}, "size must be"),
        ({"size": [2**30, 2**30], "counts": "6"}, "add up"),
        ({"size": [2, 3]}, "counts must be"),
    ],
)
def test_what_is_no_mask_is_named(record, told):
    with pytest.raises(VolvelleError, match=told):
        RunLengths.from_coco(record)


# Polygons.


@pytest.mark.peer
def test_filling_is_pycocotools():
    peer = pytest.importorskip("pycocotools.mask")
    draw = np.random.default_rng(6)
    kinds = (
        lambda n: draw.random(n) * 40,
        lambda n: draw.integers(0, 40, n).astype(float),
        lambda n: draw.random(n) * 70 - 15,
        lambda n: np.round(draw.random(n) * 80) / 2,
    )
    for number in range(160):
        high, wide = (int(side) for side in draw.integers(1, 40, 2))
        polygons = [kinds[number % 4](2 * draw.integers(3, 9)).tolist() for _ in range(1 + number % 3)]
        theirs = peer.merge(peer.frPyObjects(polygons, high, wide))
        assert fill_polygons(polygons, (high, wide)).to_coco()["counts"] == theirs["counts"].decode()


def test_outlines_fill_to_the_mask_again():
    from scipy.ndimage import label

    for mask in masks(seed=7):
        polygons = trace_polygons(mask)
        assert np.array_equal(fill_polygons(polygons, (mask.shape[0], mask.shape[1])).mask(), mask)
        assert len(polygons) == label(mask)[1]


def test_a_tolerance_takes_points_and_few_pixels():
    y, x = np.mgrid[:120, :160]
    ring = (np.hypot(y - 60, x - 80) < 50) & (np.hypot(y - 60, x - 80) > 15)
    (exact,), (loose,) = trace_polygons(ring), trace_polygons(ring, tolerance=1.0)
    assert len(loose) < len(exact) / 5
    wrong = fill_polygons([loose], ring.shape).mask() != ring
    assert 0 < wrong.sum() < 0.03 * ring.sum()
    assert trace_polygons(np.ones((1, 1), dtype=bool), tolerance=2.0) == []


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], ["a"] * 6, [1, 2, float("nan"), 4, 5, 6], 3])
def test_what_is_no_polygon_is_named(polygon):
    with pytest.raises(VolvelleError, match="polygon: wants"):
        fill_polygons([polygon], (4, 4))


def test_equal_masks_hash_alike():
    mask = np.eye(6, 8, dtype=bool)
    one, other = RunLengths.of(mask), RunLengths((6, 8), RunLengths.of(mask).counts.astype(np.int32))
    assert one == other
    assert {one, other, RunLengths.of(~mask)} == {one, RunLengths.of(~mask)}


@pytest.mark.parametrize("shape", [(1, 6, 8), (6,), ()])
def test_only_a_mask_of_two_dimensions_is_one(shape):
    with pytest.raises(VolvelleError, match=r"a mask is \(y, x\), got \("):
        RunLengths.of(np.ones(shape, dtype=bool))


def test_run_lengths_are_traced_as_their_masks_are():
    for mask in masks(seed=2):
        assert trace_polygons(RunLengths.of(mask)) == trace_polygons(mask)
        assert trace_polygons(RunLengths.of(mask), tolerance=1.0) == trace_polygons(mask, tolerance=1.0)
