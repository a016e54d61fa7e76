"""Small regions on run lengths, against labels of pixels; crops and grids."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label

from volvelle.data.run_lengths import RunLengths
from volvelle.errors import UsageError
from volvelle.systems.segmentation.sam.crops import crops
from volvelle.systems.segmentation.sam.options import EverythingOptions
from volvelle.systems.segmentation.sam.regions import clean_regions


def labelled(mask):
    """Labels of components by sides and corners, and their areas from 1 on."""
    names, _ = label(mask, np.ones((3, 3)))
    return names, np.bincount(names.ravel())[1:]


def on_pixels(mask, least):
    """The mask cleaned pixel by pixel, and whether anything changed; None where islands of one size compete."""
    names, areas = labelled(~mask)
    small = 1 + np.flatnonzero(areas < least)
    mask = mask | np.isin(names, small)
    names, areas = labelled(mask)
    islands = 1 + np.flatnonzero(areas < least)
    changed = bool(len(small) or len(islands))
    if len(islands) and len(islands) == len(areas):
        if (areas == areas.max()).sum() > 1:
            return None, changed
        return names == 1 + areas.argmax(), changed
    return mask & ~np.isin(names, islands), changed


def test_the_same_as_on_pixels():
    draw = np.random.default_rng(0)
    told = []
    for _ in range(250):
        mask = draw.random(draw.integers(1, 25, 2)) < draw.choice([0.05, 0.3, 0.5, 0.7, 0.95])
        least = int(draw.choice([1, 2, 3, 5, 10, 30]))
        cleaned, changed = clean_regions(RunLengths.of(mask), least)
        wanted, wants = on_pixels(mask, least)
        assert changed == wants
        if wanted is None:
            assert labelled(cleaned.mask())[1].tolist() == [labelled(cleaned.mask())[1].max()]
        else:
            assert np.array_equal(cleaned.mask(), wanted)
        told.append(changed)
    assert 20 < sum(told) < 230


def test_of_small_islands_the_largest_stays():
    mask = np.zeros((9, 9), dtype=bool)
    mask[1:3, 1:3] = mask[5:8, 4:8] = True
    cleaned, changed = clean_regions(RunLengths.of(mask), 50)
    assert (cleaned.area, cleaned.box, changed) == (12, (4, 5, 8, 8), True)
    empty = RunLengths.of(mask & False)
    assert clean_regions(empty, 5) == (empty, False)


@pytest.mark.peer
@pytest.mark.parametrize("size", [(60, 90), (901, 333), (64, 64)])
def test_crops_and_grids_are_theirs(size):
    from benchmarks.support.sam_peer import load_segment_anything

    try:
        load_segment_anything()
    except ImportError as error:
        pytest.skip(f"segment_anything does not load: {error}")
    from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

    for overlap, shrink in ((512 / 1500, 1), (0.2, 2), (0.0, 3)):
        options = EverythingOptions(points=9, crop_layers=2, crop_overlap=overlap, crop_shrink=shrink)
        boxes, layers = generate_crop_boxes(size, 2, overlap)
        grids = build_all_layer_point_grids(9, 2, shrink)
        ours = list(crops(size, options))
        assert [list(crop.box) for crop in ours] == boxes
        for crop, box, layer in zip(ours, boxes, layers, strict=True):
            theirs = grids[layer] * np.array([[box[2] - box[0], box[3] - box[1]]])
            assert np.allclose(crop.grid(), theirs, rtol=1e-14)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"iou": 1.5}, "iou: must lie"),
        ({"nms": float("nan")}, "nms: must lie"),
        ({"points": 0}, "points: must be 1"),
        ({"crop_layers": -1}, "crop_layers: must be 0"),
        ({"crop_overlap": 1.0}, "crop_overlap"),
        ({"offset": -1.0}, "offset"),
        ({"points": 8, "crop_layers": 2, "crop_shrink": 3}, "leaves no point"),
    ],
)
def test_options_that_make_no_sense(values, told):
    with pytest.raises(UsageError, match=told):
        EverythingOptions(**values)
