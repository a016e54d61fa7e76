"""The claim on Segment Anything: its verdict follows from its figures, its objects are what it says."""

from __future__ import annotations

import numpy as np
import pytest

from volvelle.claims import sam
from volvelle.claims.claim import Measurement
from volvelle.claims.run import run_claim
from volvelle.hub import status
from volvelle.train.promptable_measure import Measured

GOOD = {"iou_1": 0.5, "iou_2": 0.6, "iou_3": 0.65, "iou_5": 0.7, "best_of_three": 0.6, "single": 0.5, "iou_box": 0.6}


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [({}, "held"), ({"best_of_three": 0.45}, "not held"), ({"iou_2": 0.45}, "not held"), ({"iou_5": 0.55}, "not held")],
)
def test_wrong_figures_break_the_claim(wrong, verdict):
    runs = [
        Measured([], GOOD),
        Measured([], {**GOOD, **{name: 2 * value - GOOD[name] for name, value in wrong.items()}}),
    ]
    assert Measurement(sam._learnt(runs)).verdict == verdict


@pytest.mark.skipif(status("fashion-mnist").state != "ready", reason="fashion-mnist is not stored here")
def test_nested_objects_are_garments_and_all_of_them():
    scenes = sam.Nested(12, "train")
    for index in range(len(scenes)):
        image, objects = scenes[index]
        masks = [objects.mask(i) for i in range(len(objects))]
        assert len(masks) > 2
        assert image.size == (sam.SIZE, sam.SIZE)
        np.testing.assert_array_equal(np.sum(masks[:-1], axis=0), masks[-1])
        assert objects.labels == [0] * (len(masks) - 1) + [1]


@pytest.mark.slow
@pytest.mark.skipif(status("efficientnet-lite0").state != "ready", reason="efficientnet-lite0 is not stored here")
def test_the_claim_is_measured(tmp_path):
    record = run_claim("sam", "quick", tmp_path)
    assert record["verdict"] in ("held", "not held")
